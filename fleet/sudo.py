"""Running a command as root, the way the inventory says this host allows it."""

from collections.abc import Sequence

from fleet.model import Sudo


def elevated(argv: Sequence[str], sudo: Sudo) -> tuple[list[str], bytes]:
    """The argv to run and what to write to its stdin; a password never stands in an argv."""
    if sudo.mode == "none":
        return list(argv), b""
    if sudo.password is None:
        return ["sudo", "-n", "--", *argv], b""
    return ["sudo", "-S", "-p", "", "--", *argv], sudo.password.get_secret_value().encode() + b"\n"
