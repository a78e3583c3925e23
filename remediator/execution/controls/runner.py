"""Run the commands of a control on a host: with its shell and its sudo, and one deadline for all steps."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fleet.inventory.model import SudoOptions
from fleet.managers.guarded_scripts import ManagerMessages, find_not_run
from fleet.shells import CompletedCommand, Shell, ShellError, get_wrapper_refusal
from fleet.shells.sudo import build_sudo_command, find_failure, find_refusal
from runtime.errors import DefibError

Verb = Literal["status", "start", "stop", "restart", "logs"]
VERBS: frozenset[Verb] = frozenset({"status", "start", "stop", "restart", "logs"})
LOG_LINES = 200
LISTED = 20  # names in an error message


class UnknownVerbError(DefibError):
    """The service's control does not support the verb."""


class UnknownComponentError(DefibError):
    """The service's control does not list the component."""

    def __init__(self, name: str, listed: Sequence[str]) -> None:
        more = ", …" if len(listed) > LISTED else ""
        super().__init__(
            f"the control does not list the component {name!r} (listed: {', '.join(listed[:LISTED])}{more})"
        )


class CommandRefusedError(ShellError):
    """The host's sudo or its wrapper refused the command; nothing was run."""

    retryable = False


class TargetNotFoundError(ShellError):
    """The host has no such target; nothing was run."""


@dataclass(frozen=True)
class TargetState:
    """The state of a target as its host reports it. Unknown fields are None or empty.

    `healing` is what on the host is about to restart the target, `withheld` the state in which somebody keeps it from
    running, `stopped` the evidence that somebody stopped it after its last start, `unsure` why that is not known.
    `selected` is what was selected where the control does not name its target. `exited` says that it has ended, and
    that nothing on the host is about to restart it. `unseen` and `refused` say why nothing is known. `age` and
    `stopped_for` are seconds since the last start and since that stop, by the host's clock.
    """

    state: str = ""
    started: str = ""
    pid: int | None = None
    restarts: int | None = None
    exit_status: int | None = None
    out_of_memory: bool | None = None
    healing: str = ""
    exited: bool = False
    age: float | None = None
    withheld: str = ""
    stopped: str = ""
    stopped_for: float | None = None
    unsure: str = ""
    unseen: str = ""
    refused: str = ""
    selected: str = ""

    def known_fields(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "") and name != "exited"}


class ControlRunner:
    """Runs the commands of one action on one host, until `timeout` seconds have passed."""

    def __init__(self, shell: Shell | None, sudo: SudoOptions, timeout: float, host: str = "the host") -> None:
        self._shell, self._sudo, self._host = shell, sudo, host
        self._has_run = False
        self._deadline = time.monotonic() + timeout

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", acts: bool = True) -> CompletedCommand:
        """Run one command; after the deadline no command is started. Raises ShellError if no command was run at all.

        With `acts=False` the command only reads, and does not count as run.
        """
        if self.remaining <= 0:
            return CompletedCommand(None, "", "", "the deadline passed")
        if self._shell is None:
            raise ShellError("the service has no host to run commands on")
        # A wrapper runs as root already.
        sudo = SudoOptions() if self._shell.wrapped else self._sudo
        command, stdin = build_sudo_command(argv, sudo, stdin)
        try:
            completed = await self._shell.run(command, timeout=self.remaining, stdin=stdin)
        except ShellError as error:
            if not self._has_run:
                raise
            return CompletedCommand(None, "", "", f"the connection was lost after the first command: {error}")
        if not self._has_run:
            self._raise_if_refused(completed, wrapped=self._shell.wrapped)
        self._has_run = self._has_run or acts
        return completed

    def _raise_if_refused(self, completed: CompletedCommand, *, wrapped: bool) -> None:
        reason = get_wrapper_refusal(completed) if wrapped else find_refusal(completed, self._sudo)
        if reason:
            raise CommandRefusedError(f"the command is not allowed on {self._host}: {reason}")
        sudo_failure = "" if wrapped else find_failure(completed, self._sudo)
        if sudo_failure:
            raise ShellError(f"{self._host}: {sudo_failure}")

    async def run_manager(
        self,
        argv: Sequence[str],
        target: str,
        messages: ManagerMessages,
        *,
        stdin: bytes = b"",
        acts: bool = True,
    ) -> CompletedCommand:
        """As `run`, for a process manager whose output says if it did nothing. Raises ShellError in that case."""
        had_run = self._has_run
        completed = await self.run(argv, stdin=stdin, acts=acts)
        reason = None if had_run else find_not_run(completed, messages)
        if reason is None:
            return completed
        self._has_run = False
        raise self.not_found(target) if reason.gone else ShellError(f"{self._host}: {reason.why}")

    def not_found(self, target: str) -> TargetNotFoundError:
        return TargetNotFoundError(f"there is no {target} on {self._host}")


def succeeded(completed: CompletedCommand) -> bool:
    return completed.status == 0
