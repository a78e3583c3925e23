"""Errors and warnings about the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import DefibError

Location = Sequence[str | int]


@dataclass(frozen=True)
class ConfigProblem:
    """An error or a warning about the configuration, with the file, line and key that it is about.

    The line is 0 if it is about the file itself. Where a host or service inherits what is wrong, `user` names it, and
    `location` is the key there.
    """

    file: str
    line: int
    path: str
    message: str
    user: str = ""
    location: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.file}{f':{self.line}' if self.line else ''}: {where}{self.message}"


class ConfigurationError(DefibError):
    """The configuration has errors; `problems` lists all of them."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


def format_path(location: Location) -> str:
    """Return a location as it is shown: `notify.routes[0].channels`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
