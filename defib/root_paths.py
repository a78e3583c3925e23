"""What root runs on a host for Defib's account, and the account could replace."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fleet.inventory.model import SudoOptions
from fleet.shells import Shell, ShellError
from fleet.shells.sudo import build_sudo_command

TIMEOUT = 10.0  # seconds
# Prints `name<TAB>path` for each program, file or directory that the account can change itself, or by replacing a
# directory above it. Programs without a path are looked up as sudo does. Nothing is changed.
SCRIPT = r"""
[ "$(id -u)" -ne 0 ] || exit 0
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
changeable() {
    at=$1 below=
    while :; do
        # The owner can give itself the right. In a sticky directory, only one's own files can be replaced.
        if [ -O "$at" ] || { [ -w "$at" ] && { [ -z "$below" ] || [ ! -k "$at" ]; }; }; then return 0; fi
        [ "$at" != / ] || return 1
        below=$at at=${at%/*}
        at=${at:-/}
    done
}
for name; do
    case $name in /*) path=${name%/} ;; *) path=$(command -v -- "$name") || continue ;; esac
    case $path in /*) ;; *) continue ;; esac
    real=$(readlink -f -- "$path") && [ -e "$real" ] || continue
    if changeable "$real" || changeable "$path"; then printf '%s\t%s\n' "$name" "$at"; fi
done
exit 0
"""
# Of `sudo -ll`.
_RULE = re.compile(r"^\t(?:sha\d+:\S+ )?(ALL|/\S+)(.*)", re.MULTILINE)
_SECURE_PATH = re.compile(r"^Matching Defaults entries for .*\n(?: .*\n)*?.*\bsecure_path=", re.MULTILINE)
_ONE_FORM = re.compile(r"/\S*/sh -c \{ .*|\S+(?: \S+)?")  # a script in braces, or at most one argument


@dataclass(frozen=True)
class SudoRules:
    """What sudo allows an account.

    `programs`: programs and directories, with `ALL` for every command. `ambiguous`: rules whose arguments sudo accepts
    also if they are divided otherwise. `secure_path`: whether sudo replaces the account's `PATH`.
    """

    programs: frozenset[str] = frozenset()
    ambiguous: tuple[str, ...] = ()
    secure_path: bool = False


def names_in(commands: Collection[Sequence[str]]) -> set[str]:
    """Return the programs of commands, and the paths among their arguments."""
    paths = {word for argv in commands for word in argv[1:] if word.startswith("/") and "\n" not in word}
    return paths | {argv[0] for argv in commands}


async def find_changeable(shell: Shell, names: Collection[str]) -> list[tuple[str, str]]:
    """Return which programs and paths the shell's account can change, and the path of each that it can change.

    Raises ShellError if that cannot be determined.
    """
    completed = await shell.run(["sh", "-c", SCRIPT, "sh", *names], timeout=TIMEOUT)
    if completed.status != 0:
        raise ShellError(completed.why or completed.output)
    pairs = (line.partition("\t") for line in completed.stdout.splitlines())
    return [(name, place) for name, tab, place in pairs if tab]


def parse_rules(listed: str) -> SudoRules:
    """Return the rules in the output of `sudo -ll`."""
    found = _RULE.findall(listed)
    rules = [f"{program}{arguments}".rstrip() for program, arguments in found]
    return SudoRules(
        frozenset(program for program, _ in found),
        tuple(rule for rule in rules if _ONE_FORM.fullmatch(rule) is None),
        _SECURE_PATH.search(listed) is not None,
    )


async def list_rules(shell: Shell, sudo: SudoOptions) -> SudoRules:
    """Return what sudo allows the shell's account."""
    argv, stdin = build_sudo_command(["-"], sudo)
    at = argv.index("--")
    listing = ["env", "LC_ALL=C", *argv[:at], "-l", "-l"]
    completed = await shell.run(listing, timeout=TIMEOUT, stdin=stdin)
    return parse_rules(completed.stdout)
