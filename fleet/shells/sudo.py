"""Running a command as root, the way the inventory says this host allows it."""

from collections.abc import Sequence

from fleet.inventory.model import Sudo
from fleet.shells import Completed

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


def build_sudo_command(argv: Sequence[str], sudo: Sudo) -> tuple[list[str], bytes]:
    """The argv to run and what to write to its stdin; a password never stands in an argv."""
    if sudo.mode == "none":
        return list(argv), b""
    if sudo.password is None:
        return ["sudo", "-n", "--", *argv], b""
    return ["sudo", "-S", "-p", "", "--", *argv], sudo.password.get_secret_value().encode() + b"\n"


def find_refusal(done: Completed, sudo: Sudo) -> str:
    """What sudo said in place of running a command that it does not allow, or nothing where it ran."""
    return _said(done, sudo, _REFUSALS)


def find_failure(done: Completed, sudo: Sudo) -> str:
    """What sudo said in place of running a command where it cannot run any, or not this one; or nothing."""
    return _said(done, sudo, _FAILURES)


def _said(done: Completed, sudo: Sudo, words: Sequence[str]) -> str:
    if sudo.mode == "none" or done.status not in (1, NOT_FOUND):
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sudo: ", "Sorry, ")) or line.endswith(" sudoers file.")]
    return next((line for line in reversed(said) if any(each in line for each in words)), "")
