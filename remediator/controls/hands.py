"""What a control works with: a host's shell, its sudo, and one deadline for all its steps."""

import time
from collections.abc import Sequence
from typing import Literal

from fleet.model import Sudo
from fleet.shells import Completed, Shell, ShellError
from fleet.sudo import elevated
from runtime.errors import DefibError

Verb = Literal["status", "start", "stop", "restart", "logs"]
VERBS: frozenset[Verb] = frozenset({"status", "start", "stop", "restart", "logs"})
LOG_LINES = 200


class UnknownVerb(DefibError):  # noqa: N818
    """The service's control does not say how to do this."""


class Hands:
    """Runs the commands of one action on one host until `timeout` seconds have passed."""

    def __init__(self, shell: Shell, sudo: Sudo, timeout: float) -> None:
        self._shell, self._sudo = shell, sudo
        self._ran = False
        self._ends = time.monotonic() + timeout

    @property
    def left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    async def run(self, argv: Sequence[str]) -> Completed:
        """Run one command; past the deadline nothing more is started. Raises ShellError if nothing at all was run."""
        if self.left <= 0:
            return Completed(None, "", "", "the deadline passed")
        command, stdin = elevated(argv, self._sudo)
        try:
            done = await self._shell.run(command, timeout=self.left, stdin=stdin)
        except ShellError as error:
            if not self._ran:
                raise
            return Completed(None, "", "", f"the host was lost half-way: {error}")  # the steps before have been done
        self._ran = True
        return done


def good(done: Completed) -> bool:
    return done.status == 0
