"""Running a command as root, the way the inventory says this host allows it."""

from collections.abc import Sequence

from fleet.model import Sudo
from fleet.shells import Completed

_REFUSALS = (
    "password is required", "incorrect password", "no password was provided", "try again", "not allowed",
    "is not in the sudoers file", "account validation failure",
)  # fmt: skip


def elevated(argv: Sequence[str], sudo: Sudo) -> tuple[list[str], bytes]:
    """The argv to run and what to write to its stdin; a password never stands in an argv."""
    if sudo.mode == "none":
        return list(argv), b""
    if sudo.password is None:
        return ["sudo", "-n", "--", *argv], b""
    return ["sudo", "-S", "-p", "", "--", *argv], sudo.password.get_secret_value().encode() + b"\n"


def refusal(done: Completed, sudo: Sudo) -> str:
    """What sudo said in place of running a command, or nothing where it ran."""
    if sudo.mode == "none" or done.status != 1:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sudo: ", "Sorry, ")) or line.endswith(" sudoers file.")]
    return next((line for line in reversed(said) if any(words in line for words in _REFUSALS)), "")
