"""What a control works with: a host's shell, its sudo, and one deadline for all its steps."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fleet.inventory.model import Sudo
from fleet.managers.guarded_scripts import ManagerMessages, find_not_run
from fleet.shells import Completed, Shell, ShellError, get_wrapper_refusal
from fleet.shells.sudo import build_sudo_command, find_failure, find_refusal
from runtime.errors import DefibError

Verb = Literal["status", "start", "stop", "restart", "logs"]
VERBS: frozenset[Verb] = frozenset({"status", "start", "stop", "restart", "logs"})
LOG_LINES = 200


class UnknownVerb(DefibError):  # noqa: N818
    """The service's control does not say how to do this."""


class NotAllowed(ShellError):  # noqa: N818
    """The host's sudo, or its wrapper, does not allow the command: nothing was run."""

    retryable = False


class Gone(ShellError):  # noqa: N818
    """The host has no such target: nothing was run."""


@dataclass(frozen=True)
class Facts:
    """How a target stands; what is not known is None, or empty. `unseen` and `refused` say why nothing is.

    In words: `healing` is what on the host is about to bring it back itself, `withheld` the state in which somebody
    keeps it from running, `stopped` that somebody stopped it after its last start, `unsure` why that cannot be told.
    `age` and `stopped_for` are seconds since its start and since that stop, by the host's own clock.
    """

    state: str = ""
    started: str = ""
    pid: int | None = None
    restarts: int | None = None
    exit_status: int | None = None
    out_of_memory: bool | None = None
    healing: str = ""
    age: float | None = None
    withheld: str = ""
    stopped: str = ""
    stopped_for: float | None = None
    unsure: str = ""
    unseen: str = ""
    refused: str = ""

    def told(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


class Hands:
    """Runs the commands of one action on one host until `timeout` seconds have passed; without a shell, none."""

    def __init__(self, shell: Shell | None, sudo: Sudo, timeout: float, host: str = "the host") -> None:
        self._shell, self._sudo, self._host = shell, sudo, host
        self._ran = False
        self._ends = time.monotonic() + timeout

    @property
    def left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    async def run(self, argv: Sequence[str], *, acts: bool = True) -> Completed:
        """Run one command; past the deadline nothing more is started. Raises ShellError if nothing at all was run.

        What is not said to act changes nothing of the target, and does not count as run.
        """
        if self.left <= 0:
            return Completed(None, "", "", "the deadline passed")
        if self._shell is None:
            raise ShellError("the service has no host to run commands on")
        # A wrapper is root already.
        command, stdin = (argv, b"") if self._shell.wrapped else build_sudo_command(argv, self._sudo)
        try:
            done = await self._shell.run(command, timeout=self.left, stdin=stdin)
        except ShellError as error:
            if not self._ran:
                raise
            return Completed(None, "", "", f"the host was lost half-way: {error}")  # the steps before have been done
        if not self._ran:
            self._refused(done, wrapped=self._shell.wrapped)
        self._ran = self._ran or acts
        return done

    def _refused(self, done: Completed, *, wrapped: bool) -> None:
        """Raises ShellError where the host's sudo, or its wrapper, has not run the command."""
        refused = get_wrapper_refusal(done) if wrapped else find_refusal(done, self._sudo)
        if refused:
            raise NotAllowed(f"the command is not allowed on {self._host}: {refused}")
        failed = "" if wrapped else find_failure(done, self._sudo)
        if failed:
            raise ShellError(f"{self._host}: {failed}")

    async def ask(self, argv: Sequence[str], target: str, words: ManagerMessages, *, acts: bool = True) -> Completed:
        """Run a command of which its manager says whether it did anything. Raises ShellError where it did not."""
        ran = self._ran
        done = await self.run(argv, acts=acts)
        found = None if ran else find_not_run(done, words)
        if found is None:
            return done
        self._ran = False
        raise self.gone(target) if found.gone else ShellError(f"{self._host}: {found.why}")

    def gone(self, target: str) -> Gone:
        """The error that says that there is no such target."""
        return Gone(f"there is no {target} on {self._host}")


def good(done: Completed) -> bool:
    return done.status == 0
