"""Commands as root, in the way that the inventory has for the host."""

import shlex
from collections.abc import Sequence

from fleet.inventory.model import SudoOptions
from fleet.shells import CompletedCommand

_REFUSALS = (
    "password is required", "incorrect password", "no password was provided", "try again", "not allowed",
    "is not in the sudoers file", "account validation failure",
)  # fmt: skip
_FAILURES = (
    "you must have a tty", '"no new privileges" flag', "effective uid is not 0", "must be owned by uid 0",
    "unable to execute", "unable to initialize", "unable to open", "unable to stat", "no valid sudoers sources",
    "not found",
)  # fmt: skip
NOT_FOUND = 127
SCRIPT_HEAD = "{ set -f; "  # of the scripts of process managers, which are one compound command each


def enclose(argv: Sequence[str]) -> list[str]:
    """Return the command in a form that sudo distinguishes from every other one.

    sudo compares a command with its rules by the arguments joined with spaces: who may run `a "b c"` may also run
    `a b c`, and `a "b c" d` is as good as `a b "c d"`. A script in braces has one form only: cut off at any space it is
    a syntax error, and joined to `-c` an unknown option.
    """
    match list(argv):
        case [_] | ["sh", "-c", str()] if len(argv) == 1 or argv[2].startswith(SCRIPT_HEAD):
            return list(argv)
        case [_, argument] if argument and " " not in argument:
            return list(argv)
    return ["sh", "-c", f"{{ exec {shlex.join(argv)}; }}"]


def build_sudo_command(argv: Sequence[str], sudo: SudoOptions, stdin: bytes = b"") -> tuple[list[str], bytes]:
    """Return the argv to run and its stdin, which begins with the password where there is one.

    sudo gets the command as `enclose` returns it, as in its rules. It leaves the password unread where it needs none.
    """
    if sudo.mode == "none":
        return list(argv), stdin
    if sudo.password is None:
        return ["sudo", "-n", "--", *enclose(argv)], stdin
    return ["sudo", "-S", "-p", "", "--", *enclose(argv)], sudo.password.get_secret_value().encode() + b"\n" + stdin


def find_refusal(done: CompletedCommand, sudo: SudoOptions) -> str:
    """Return sudo's message where it does not allow the command; empty otherwise."""
    return _find_message(done, sudo, _REFUSALS)


def find_failure(done: CompletedCommand, sudo: SudoOptions) -> str:
    """Return sudo's message where it cannot run the command, or any command; empty otherwise."""
    return _find_message(done, sudo, _FAILURES)


def _find_message(done: CompletedCommand, sudo: SudoOptions, phrases: Sequence[str]) -> str:
    if sudo.mode == "none" or done.status not in (1, NOT_FOUND):
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith(("sudo: ", "Sorry, ")) or line.endswith(" sudoers file.")]
    return next((line for line in reversed(messages) if any(phrase in line for phrase in phrases)), "")
