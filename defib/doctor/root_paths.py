"""The doctor's checks of what root runs on a host for the account: could the account put something else there?"""

import re
from collections.abc import Collection, Iterable, Sequence

from defib.doctor.findings import Finding
from fleet.inventory.model import SudoOptions
from fleet.shells import CompletedCommand, Shell
from fleet.shells.sudo import build_sudo_command

TIMEOUT = 10.0  # seconds
LISTED = 3  # paths in a message
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
_RULE = re.compile(r"^\t(?:sha\d+:\S+ )?(ALL|/\S+)", re.MULTILINE)  # of `sudo -ll`


async def check_root_paths(
    host: str, shell: Shell, sudo: SudoOptions, commands: Iterable[Sequence[str]]
) -> list[Finding]:
    """Check the commands of controls that sudo runs as root, and the account's rules of sudo; none is run."""
    rules = parse_rules(await _list_rules(shell, sudo))
    commands = list(commands)
    programs = {argv[0] for argv in commands} | {rule for rule in rules if rule != "ALL"}
    arguments = {word for argv in commands for word in argv[1:] if word.startswith("/") and "\n" not in word}
    changeable = await find_changeable(shell, sorted(programs | arguments))
    severe = [each for each in changeable if each[0] in programs]
    fix = "make them and the directories above belong to root: chown root and chmod go-w"
    check = "files that root uses"
    if changeable:
        detail = "; ".join(_describe(name, place) for name, place in (severe or changeable)[:LISTED])
        findings = [Finding(host, check, "fail" if severe else "warn", detail, fix)]
    else:
        findings = [Finding(host, check, "pass", "the account can change none of them")]
    if "ALL" in rules:
        fix = f"allow only what the controls need: `defib host setup {host}`"
        findings.append(Finding(host, "sudo rules", "warn", "the account may run every command as root", fix))
    return findings


async def find_changeable(shell: Shell, names: Collection[str]) -> list[tuple[str, str]]:
    """Return which programs and paths the shell's account can change, and the path of each that it can change."""
    completed = await shell.run(["sh", "-c", SCRIPT, "sh", *names], timeout=TIMEOUT)
    pairs = (line.partition("\t") for line in completed.stdout.splitlines())
    return [(name, place) for name, tab, place in pairs if tab]


def parse_rules(listed: str) -> set[str]:
    """Return the programs and directories that `sudo -ll` lists, with `ALL` for every command."""
    return set(_RULE.findall(listed))


async def _list_rules(shell: Shell, sudo: SudoOptions) -> str:
    argv, stdin = build_sudo_command(["-"], sudo)
    at = argv.index("--")
    listing = ["env", "LC_ALL=C", *argv[:at], "-l", "-l"]
    completed: CompletedCommand = await shell.run(listing, timeout=TIMEOUT, stdin=stdin)
    return completed.stdout


def _describe(name: str, place: str) -> str:
    return (
        f"the account can change {name}" if name == place else f"the account can change {place}, and so replace {name}"
    )
