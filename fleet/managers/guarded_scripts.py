"""Scripts that check before they act, and the detection of commands that did nothing.

A command that did nothing has not failed: nothing was run. A guarded script marks its output where a check stopped it.
For other commands, each process manager has a table of the messages that it prints where it does nothing.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fleet.shells import CompletedCommand
from fleet.shells.sudo import SCRIPT_HEAD

NOT_RUN_STATUS = 75  # exit status of a script that a check stopped
NOT_RUN_MARK = "defib: nothing was run"
NOT_FOUND = 127  # exit status of sh where the program is not installed


@dataclass(frozen=True)
class ManagerMessages:
    """Patterns of whole lines that a process manager prints where it did nothing, and where the target is gone.

    `even_with_status_0`: it prints them also with exit status 0.
    """

    not_run: tuple[str, ...]
    gone: tuple[str, ...]
    even_with_status_0: bool = False


@dataclass(frozen=True)
class NotRun:
    """The reason why nothing was run; `gone` where the target does not exist."""

    why: str
    gone: bool


def find_not_run(done: CompletedCommand, messages: ManagerMessages) -> NotRun | None:
    """Return why the command did nothing, or None where it may have done something."""
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    marked = done.status == NOT_RUN_STATUS and errors[-1:] == [NOT_RUN_MARK]
    if not marked and (done.status is None or (done.status == 0 and not messages.even_with_status_0)):
        return None
    # The first line of stdout only: the following ones may be of a later step, after a success.
    lines = done.stdout.strip().splitlines()[:1] + [line for line in errors if line != NOT_RUN_MARK]
    for gone, patterns in ((True, messages.gone), (False, messages.not_run)):
        for line in lines:
            if any(re.fullmatch(pattern, line.strip()) for pattern in patterns):
                return NotRun(line.strip(), gone)
    if marked or done.status == NOT_FOUND:
        return NotRun(lines[-1] if lines else f"exit status {done.status}", gone=False)
    return None


def build_script(*steps: str) -> list[str]:
    """Return the argv of a script in which `halt` ends the script, marked as not having acted.

    It is one compound command on one line, without the characters that sudoers reads as patterns: sudo compares the
    command with all its arguments as one text, so that nobody who may run it may run a part of it.
    """
    halt = f'halt() {{ echo "{NOT_RUN_MARK}" >&2; exit {NOT_RUN_STATUS}; }}'
    return ["sh", "-c", f"{SCRIPT_HEAD}{'; '.join([halt, *steps])}; }}"]


def echo_to_stderr(text: str) -> str:
    """Return a step that prints a line to stderr; `text` may use the script's variables."""
    return f'echo "{text}" >&2'


class ShellVariable(str):
    """A word of a command that is a variable of the script."""

    __slots__ = ()


def quote_command(argv: Sequence[str]) -> str:
    """Return a command as a step of a script, with its words quoted."""
    return " ".join(f'"${word}"' if isinstance(word, ShellVariable) else shlex.quote(word) for word in argv)
