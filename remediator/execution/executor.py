"""Carrying actions out: the command with its deadlines, then looking from outside whether it helped."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog
from sqlalchemy import Connection

from fleet.inventory.model import Inventory, RemediationStep, Service, Sudo
from fleet.shells import KILL_DELAY, Completed, HostKeyError, Shell, ShellError
from fleet.shells.pool import Shells
from remediator.clients.peers import Exporter, PeerError
from remediator.execution import evidence
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.context import Facts, Hands, NotAllowed, UnknownVerb, Verb
from remediator.execution.controls.recreate import recreate
from remediator.incidents import actions
from remediator.incidents.actions import Claim, CommandOutcome, Seen
from remediator.metrics import Metrics
from remediator.policy import Blocked, Decision, Observation
from remediator.record.database import Database, StorageError
from runtime.errors import DefibError
from runtime.redaction import Redactor

OUTPUT_KEPT = 8000
FINISH_WITHIN = 15.0  # seconds that commands have to end when we are to stop
FIRST_LOOK = 0.25
LONGEST_LOOK = 5.0
P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()


class Actor:
    """Carries out what was claimed, each action in a task of `group`, and keeps every step on the record first.

    `changed` is called with its service whenever an action has come to something.
    """

    def __init__(
        self,
        database: Database,
        inventory: Inventory,
        exporter: Exporter,
        metrics: Metrics,
        redact: Redactor,
        changed: Callable[[str], None],
    ) -> None:
        self._database, self._inventory, self._exporter = database, inventory, exporter
        self._metrics, self._redact, self._changed = metrics, redact, changed
        self._shells = Shells(inventory.hosts, control=True)
        self._group: asyncio.TaskGroup | None = None  # there is none before the start and after the stop
        self._claiming = asyncio.Lock()
        self._commanding: dict[asyncio.Task[Any], tuple[str, str]] = {}  # the host and target of each
        self._running: dict[int, tuple[Claim, asyncio.Task[None]]] = {}  # by action

    async def begin(self, group: asyncio.TaskGroup) -> None:
        """Act from now on; what a crash left half done is taken up."""
        async with self._claiming:  # what is claimed from now on was not left by a crash
            left = await self._database.run_first(actions.running_actions)
            self._group = group
        for action in left:
            self._start(self._resume(action), action)

    async def drain(self) -> None:
        """Begin nothing more, and let the commands that run finish; what became of the others is not known.

        All verification is taken up at the next start.
        """
        async with self._claiming:  # what is being claimed now is begun
            self._group = None
        if self._commanding:
            _, late = await asyncio.wait(self._commanding, timeout=FINISH_WITHIN)
            for command in late:
                command.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def close(self) -> None:
        await self._shells.close()

    async def take(self, inventory: Inventory, exporter: Exporter) -> None:
        """Go on with another inventory; what runs on a service that it does not have any more is given up."""
        self._inventory, self._exporter = inventory, exporter
        for action, task in list(self._running.values()):
            if action.service not in inventory.services:
                task.cancel()
                await self._end(action, "unknown", "the service was removed from the inventory, or renamed, meanwhile")
        await self._shells.reload(inventory.hosts)

    async def act(
        self, service: Service, doing: "Doing", claim: Callable[[Connection], Claim | str | Decision]
    ) -> Claim | str | Decision:
        """Claim an action and begin it; what holds it back where something does."""
        async with self._claiming:
            if self._group is None:
                return "stopping"
            # A command goes on though its service has left the inventory, and its action has ended.
            if (service.host, service.target) in self._commanding.values():
                return Decision("wait", "target-busy")
            claimed = await self._database.run_first(claim)
            if isinstance(claimed, Claim):
                command = asyncio.create_task(self._command(claimed, service, doing), name=f"command {service.id}")
                self._commanding[command] = service.host, service.target
                command.add_done_callback(lambda done: self._commanding.pop(done, None))
                self._start(self._carry_out(command, service), claimed)
            return claimed

    def _start(self, work: Coroutine[Any, Any, None], action: Claim) -> None:
        assert self._group is not None  # noqa: S101 - nothing is claimed where nothing may act
        task = self._group.create_task(self._guarded(work, action), name=f"{action.kind} {action.service}")
        self._running[action.id] = action, task
        task.add_done_callback(lambda _task: self._running.pop(action.id, None))

    async def _guarded(self, work: Coroutine[Any, Any, None], action: Claim) -> None:
        try:
            await work
        except Exception:  # one broken action must neither end the others nor hold its locks for ever
            log.exception("an action broke", service=action.service, action=action.id)
            await self._end(action, "unknown", "an error of ours; the log says more")

    async def look(self, service: Service) -> tuple[Seen, Facts | None]:
        """What is to be seen of a service on its host, before a command destroys it."""
        return await evidence.look(
            service, self._inventory.host_of(service), self._shell_of_or_none(service), self._redact
        )

    async def facts(self, service: Service) -> Facts | None:
        """How a service's target stands, by its host."""
        return await evidence.facts(
            service, self._inventory.host_of(service), self._shell_of_or_none(service), self._redact
        )

    def _shell_of_or_none(self, service: Service) -> Shell | None:
        with contextlib.suppress(ShellError):
            return self._shell_of(service)
        return None

    async def command(self, service: Service, doing: "Doing") -> Completed:
        """Run one verb of a service's control, or a step beyond. Raises ShellError and UnknownVerb."""
        control = service.control
        if control is None:
            raise UnknownVerb("the service has no control")
        host = self._inventory.host_of(service)
        hands = Hands(self._shell_of(service), host.sudo if host else Sudo(), control.timeout, service.host)
        if isinstance(doing, str):
            return await CONTROLS[control.kind].control(doing, control.options, hands)
        if doing.recreate is not None and doing.recreate.command:
            return await hands.run(doing.recreate.command)
        return await recreate(control.options, hands)

    def _shell_of(self, service: Service) -> Shell | None:
        """The shell of a service's host; one that has none needs none. Raises ShellError."""
        return self._shells.get(service.host) if service.host in self._inventory.hosts else None

    async def _carry_out(self, command: "asyncio.Task[Claim | None]", service: Service) -> None:
        ended = await asyncio.shield(command)  # a command is ended and kept, also when we are to stop
        if ended is not None:
            await self._see_through(ended, service)

    async def _command(self, action: Claim, service: Service, doing: "Doing") -> Claim | None:
        """Run the command and keep how it ended; None where nothing was run, which has ended the action."""
        log.info("action", service=service.id, action=action.id, kind=action.kind)
        try:
            done = await self.command(service, doing)
        except asyncio.CancelledError:
            done = Completed(None, "", "", "the remediator was stopped while the command ran")
        except ShellError as error:
            why = self._redact(f"nothing was run: {error}")
            await self._end(action, "failed", why, reached=False, blocked=_blocked_by(error))
            return None
        outcome: CommandOutcome = "unknown" if done.status is None else "succeeded" if done.status == 0 else "failed"
        output, why = self._redact(done.output)[-OUTPUT_KEPT:], self._redact(done.why)
        log.info("command ended", service=service.id, action=action.id, outcome=outcome, exit_status=done.status)
        now = self._database.clock.now()
        return await self._store(actions.command_ended, action, outcome, done.status, output, why, now)

    async def _resume(self, action: Claim) -> None:
        """Take up an action that we were killed in: what its command did is not known, so look."""
        if action.command is None:
            why = "the remediator was interrupted while the command ran"
            now = self._database.clock.now()
            action = await self._store(actions.command_ended, action, "unknown", None, "", why, now)
        service = self._inventory.services.get(action.service)
        if service is None:
            await self._end(action, "unknown", "the service is no longer in the inventory")
            return
        await self._see_through(action, service)

    async def _see_through(self, action: Claim, service: Service) -> None:
        """Verify: exit status is not recovery."""
        if action.kind == "stop":
            await self._end(action, action.command or "unknown", action.why)
            return
        if action.command == "failed":
            await self._end(action, "failed", action.why or "the command said that it failed")
            return
        why, seen = "", True
        try:
            why = await self._verify(action, service) or ""
        except _NotSeen as error:
            why, seen = str(error), False
        await self._keep_after(action, service)
        if not why:
            await self._end(action, action.command or "unknown", action.why, came_back=True)
        else:
            state: CommandOutcome = "failed" if action.command == "succeeded" and seen else "unknown"
            await self._end(action, state, "; ".join(part for part in (action.why, why) if part), seen=seen)

    async def _keep_after(self, action: Claim, service: Service) -> None:
        """Keep how the target stands after the command, and what the exporter says of it."""
        now = self._database.clock.now()
        with contextlib.suppress(DefibError, TimeoutError):
            seen = await self._exporter.observe(service.id)
            await self._store(actions.keep_evidence, action, {"probe after": probed(seen)}, now)
        facts = await self.facts(service)
        if facts is not None and facts.state:
            await self._store(actions.facts_after, action, facts.told())

    async def _verify(self, action: Claim, service: Service) -> str | None:
        """None once the service was up within `start_within` and stayed so for `hold`, else what was seen instead.

        Raises _NotSeen where nobody could see it.
        """
        control, rules = service.control, self._inventory.remediation.for_service(service)
        start_within = control.start_within if control else 0.0
        ends = (action.command_ended_at or action.claimed_at) + start_within
        if action.command == "unknown" and control is not None:
            # It may be running still: until it cannot be any more, nothing else is done to the target.
            ends = max(ends, action.claimed_at + control.timeout + KILL_DELAY)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(0.0, ends - self._database.clock.now())
        look = FIRST_LOOK
        told = False  # whether a probe since the command has said something of the service
        while True:
            try:
                seen = await self._exporter.probe(service.id, service.probe.timeout)
                if seen.success and seen.up:
                    break
                last = f"{seen.reason}: {seen.message}" if not seen.success else "not up for long enough"
                told = told or seen.success or seen.reason not in rules.never_for
                checked = told
            except PeerError as error:
                last, checked = f"the exporter could not be asked: {error}", False
            if loop.time() >= deadline and not checked:
                raise _NotSeen(f"whether it is up could not be seen; {last}")
            if loop.time() >= deadline:
                return f"not up within {start_within:g} s; {last}"
            await asyncio.sleep(min(look, max(0.05, deadline - loop.time())))
            look = min(LONGEST_LOOK, look * 1.5)
        if action.up_at is None:
            await self._store(actions.came_up, action, self._inventory, self._database.clock.now())
            log.info("up again", service=service.id, action=action.id)
            self._changed(action.service)
        return await self._stays_up(service, rules.hold)

    async def _stays_up(self, service: Service, hold: float) -> str | None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + hold
        while (left := ends - loop.time()) > 0:
            await asyncio.sleep(min(left, max(0.5, hold / 10)))
            with contextlib.suppress(PeerError):
                seen = await self._exporter.observe(service.id)
                if seen.up is False:
                    return f"up, but not for {hold:g} s; {seen.reason}: {seen.message}"
        # A service that is probed every half hour was not looked at meanwhile.
        patience = loop.time() + (service.control.start_within if service.control else 0.0)
        looks = 0
        while looks < service.probe.fail_after:
            try:
                seen = await self._exporter.probe(service.id, service.probe.timeout)
            except PeerError as error:
                if loop.time() > patience:
                    raise _NotSeen(
                        f"whether it is up after {hold:g} s could not be seen; the exporter could not be asked: {error}"
                    ) from error
            else:
                looks += 1
                if seen.success:
                    return None
                if seen.up is False:
                    return f"not up after {hold:g} s; {seen.reason}: {seen.message}"
            await asyncio.sleep(1.0)
        return f"not up after {hold:g} s, though not down by {service.probe.fail_after} failures in a row"

    async def _store(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Keep what happened, however long the database takes to accept it: an action's outcome is not dropped."""
        while True:
            try:
                return await self._database.run_first(work, *args, **kwargs)
            except StorageError as error:
                log.error("an outcome cannot be stored yet", error=str(error))  # noqa: TRY400
                await asyncio.sleep(LONGEST_LOOK)

    async def _end(
        self,
        action: Claim,
        state: CommandOutcome,
        why: str,
        *,
        reached: bool = True,
        seen: bool = True,
        came_back: bool = False,
        blocked: Blocked | None = None,
    ) -> None:
        now = self._database.clock.now()
        ended = await self._store(
            actions.action_ended, action, state, why, self._inventory, now,
            reached=reached, seen=seen, came_back=came_back, blocked=blocked,
        )  # fmt: skip
        if not ended:
            return
        log.info("action ended", service=action.service, action=action.id, state=state, why=why or None)
        self._metrics.actions.labels(action.service, action.kind, state).inc()
        self._metrics.action_duration.observe(max(0.0, now - action.claimed_at))
        self._changed(action.service)


Doing = Verb | RemediationStep


class _NotSeen(DefibError):  # noqa: N818 - no error of ours
    """A verification could not be made: whether the service is up is not known."""


def probed(seen: Observation) -> str:
    """A probe's outcome in a line."""
    return f"{seen.reason}: {seen.message}" if seen.reason else "success"


def _blocked_by(error: ShellError) -> Blocked | None:
    """What only a person can mend, where the error is of that."""
    if isinstance(error, NotAllowed):
        return "sudo-refused"
    # A host of which no key was pinned yet is not one whose key has changed.
    if isinstance(error, HostKeyError) and error.changed:
        return "host-key-changed"
    return None if error.retryable else "shell-refused"
