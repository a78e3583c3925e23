"""How a host says that a command did nothing: such a command has not failed, since nothing was run.

Some commands are scripts that look before they act. What stops one of them before it has acted is marked as such; of a
command that has acted at once, only the words of its manager tell. Each manager has a table of them.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fleet.shells import Completed

NOT_RUN_STATUS = 75  # of a script that has not acted
NOT_RUN_MARK = "defib: nothing was run"
NOT_FOUND = 127  # the program is not installed


@dataclass(frozen=True)
class ManagerMessages:
    """Patterns of whole lines: what a manager prints where it did nothing, and where the target is not there.

    `in_spite_of_success`: the program prints them also with exit status 0.
    """

    not_run: tuple[str, ...]
    gone: tuple[str, ...]
    in_spite_of_success: bool = False


@dataclass(frozen=True)
class NotRun:
    """Why nothing was run; `gone` where the target is not there."""

    why: str
    gone: bool


def find_not_run(done: Completed, words: ManagerMessages) -> NotRun | None:
    """Why the command did nothing, or None where it may have done something."""
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    marked = done.status == NOT_RUN_STATUS and errors[-1:] == [NOT_RUN_MARK]
    if not marked and (done.status is None or (done.status == 0 and not words.in_spite_of_success)):
        return None
    # Of what is printed where something was done, the first line may be a success.
    lines = done.stdout.strip().splitlines()[:1] + [line for line in errors if line != NOT_RUN_MARK]
    for gone, patterns in ((True, words.gone), (False, words.not_run)):
        for line in lines:
            if any(re.fullmatch(pattern, line.strip()) for pattern in patterns):
                return NotRun(line.strip(), gone)
    if marked or done.status == NOT_FOUND:
        return NotRun(lines[-1] if lines else f"exit status {done.status}", gone=False)
    return None


def build_script(*steps: str) -> list[str]:
    """The argv of a script in which `halt` ends it, marked as not having acted.

    It is one line, and one command: sudo compares a command and its arguments as one text, so that whoever may run it
    might otherwise run a part of it. It does without the characters that sudoers reads as patterns.
    """
    halt = f'halt() {{ echo "{NOT_RUN_MARK}" >&2; exit {NOT_RUN_STATUS}; }}'
    return ["sh", "-c", f"{{ set -f; {'; '.join([halt, *steps])}; }}"]


def echo_to_stderr(text: str) -> str:
    """The step of a script that prints a line to its standard error; it may use the script's variables."""
    return f'echo "{text}" >&2'


class ShellVariable(str):
    """The name of a variable of a script, as a word of a command in it."""

    __slots__ = ()


def quote_command(argv: Sequence[str]) -> str:
    """A command of a script."""
    return " ".join(f'"${word}"' if isinstance(word, ShellVariable) else shlex.quote(word) for word in argv)
