"""What we know of supervisor: argv, and how its answers read."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _program(name: str) -> str:
    group, colon, program = name.rpartition(":")
    parts = [group, program] if colon else [program]
    for part in parts:
        # `all` and `group:*` would mean more than one, and supervisorctl splits at blanks.
        if not part or part == "all" or part.startswith("-") or any(c.isspace() or c in ":*/[]" for c in part):
            raise ValueError("is not a program of supervisor (write name or group:name)")
    return name


Program = Annotated[str, AfterValidator(_program)]


def verb(name: str, program: str, config: Path | None) -> list[str]:
    """`supervisorctl start|stop|restart|status PROGRAM`."""
    return [*_supervisorctl(config), name, program]


def logs(program: str, config: Path | None, size: int) -> list[str]:
    """The last `size` bytes of what the program wrote."""
    return [*_supervisorctl(config), "tail", f"-{size}", program]


def _supervisorctl(config: Path | None) -> list[str]:
    return ["supervisorctl", *(["-c", str(config)] if config else [])]


def refused(output: str) -> str | None:
    """The first refusal in the output of a verb; supervisorctl says some of them with exit status 0."""
    lines = (line.strip() for line in output.splitlines())
    return next((line for line in lines if "ERROR" in line and "(not running)" not in line), None)


def is_running(output: str) -> bool:
    """Whether `status` says that the program runs; STARTING and BACKOFF do not."""
    words = output.split()
    return len(words) > 1 and words[1] == "RUNNING"
