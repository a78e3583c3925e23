"""Carry actions out: run the command within its deadline, then verify from outside that the service recovered."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog

from fleet.inventory.model import (
    HostAlert,
    Inventory,
    Remediable,
    RemediationStep,
    RunbookStep,
    Service,
    SudoOptions,
    WakeStep,
    is_host_alert,
)
from fleet.json_client import ClientError
from fleet.shells import KILL_DELAY, CompletedCommand, HostKeyError, Shell, ShellError
from fleet.shells.pool import Shells
from remediator.clients.exporter import Exporter
from remediator.execution import evidence
from remediator.execution.controls import CONTROLS, find_options
from remediator.execution.controls.recreate import recreate
from remediator.execution.controls.runner import CommandRefusedError, ControlRunner, TargetState, Verb
from remediator.incidents import actions
from remediator.incidents.actions import Claim, CommandOutcome, Ending, Evidence
from remediator.metrics import RemediatorMetrics
from remediator.policy.situation import Blocked, Decision, Observation
from remediator.record.database import Database, StorageError
from remediator.record.situations import firing_names
from remediator.record.transaction import Transaction
from runtime.errors import DefibError
from runtime.redaction import Redactor

OUTPUT_LIMIT = 8000  # characters
DRAIN_TIMEOUT = 15.0  # seconds that running commands have at shutdown
READ_AGAIN = 5.0  # seconds after which interrupted actions are read again if that failed
FIRST_PAUSE = 0.25  # seconds between two probes of a verification, which grow
LONGEST_PAUSE = 5.0
FIRST_STATE_PAUSE = 1.0  # seconds between two readings of the state of a target that does not come up, which grow
LONGEST_STATE_PAUSE = 10.0
EXITS_SEEN = 2  # readings in a row: the first may be of a moment between two starts
WAKE_TIMEOUT = 120.0  # seconds of the command that wakes an agent
CRASH_LOOP_RESTARTS = 3  # by the host, of a target that was just restarted
REMOVED_RUNBOOK = "the runbook was removed from the inventory, or renamed"
Command = Verb | RemediationStep  # what an action runs: a verb of the control, or a step beyond it
P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()


class _NotVerifiedError(DefibError):
    """Whether the service is up could not be determined."""


class _ExitedError(DefibError):
    """The host reported that the target exited after its start."""


class Executor:
    """Carries claimed actions out, each in a task. Every step is recorded before the next one begins.

    `changed` is called with the action's service whenever an action has progressed.
    """

    def __init__(
        self,
        database: Database,
        inventory: Inventory,
        exporter: Exporter,
        metrics: RemediatorMetrics,
        redact: Redactor,
        changed: Callable[[str], None],
    ) -> None:
        self._database, self._inventory, self._exporter = database, inventory, exporter
        self._metrics, self._redact, self._changed = metrics, redact, changed
        self._shells = Shells(inventory.hosts, control=True)
        self._group: asyncio.TaskGroup | None = None  # None before the start and after `drain`
        self._claiming = asyncio.Lock()
        self._commands: dict[asyncio.Task[Any], tuple[str, str]] = {}  # the host and target of each
        self._running: dict[int, tuple[Claim, asyncio.Task[None]]] = {}  # by action

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Accept actions from now on, and resume those that were running when the process ended."""
        while (interrupted := await self._accept(group)) is None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(READ_AGAIN)
        for action in interrupted:
            self._start_task(self._resume(action), action)

    async def _accept(self, group: asyncio.TaskGroup) -> Sequence[Claim] | None:
        """Return the interrupted actions, or None if they cannot be read: others must not be claimed before that."""
        async with self._claiming:
            try:
                interrupted = await self._database.read(actions.running_actions)
            except StorageError as error:
                log.error("interrupted_actions_not_read", error=str(error))  # noqa: TRY400 - no traceback needed
                return None
            self._group = group
            return interrupted

    async def drain(self) -> None:
        """Start no more actions, and wait for running commands, then cancel them. The next start verifies them."""
        async with self._claiming:
            self._group = None
        if self._commands:
            _, unfinished = await asyncio.wait(self._commands, timeout=DRAIN_TIMEOUT)
            for command in unfinished:
                command.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def close(self) -> None:
        await self._shells.close()

    async def reload(self, inventory: Inventory, exporter: Exporter) -> None:
        """Use another inventory; end the actions of services that it no longer has."""
        self._inventory, self._exporter = inventory, exporter
        for action, task in list(self._running.values()):
            if inventory.find_subject(action.service) is None:
                task.cancel()
                await self._end(action, Ending("unknown", _describe_removal(action.service)))
        await self._shells.reload(inventory.hosts)

    async def execute(
        self, service: Remediable, command: Command, claim: Callable[[Transaction], Claim | str | Decision]
    ) -> Claim | str | Decision:
        """Claim an action and start it; otherwise return what holds it."""
        async with self._claiming:
            if self._group is None:
                return "stopping"
            # A command may outlast its action if its service leaves the inventory.
            if (service.host, service.target) in self._commands.values():
                return Decision("wait", "target-busy")
            claimed = await self._database.write_with_priority(claim)
            if isinstance(claimed, Claim):
                task = asyncio.create_task(self._execute(claimed, service, command), name=f"command {service.id}")
                self._commands[task] = service.host, service.target
                task.add_done_callback(lambda done: self._commands.pop(done, None))
                self._start_task(self._verify_after(task, service), claimed)
            return claimed

    def _start_task(self, work: Coroutine[Any, Any, None], action: Claim) -> None:
        assert self._group is not None  # noqa: S101 - nothing is claimed before `start`
        task = self._group.create_task(self._guard(work, action), name=f"{action.kind} {action.service}")
        self._running[action.id] = action, task
        task.add_done_callback(lambda _task: self._running.pop(action.id, None))

    async def _guard(self, work: Coroutine[Any, Any, None], action: Claim) -> None:
        try:
            await work
        except Exception:  # the action must release its locks, and not end the others
            log.exception("action_failed", service=action.service, action=action.id)
            await self._end(action, Ending("unknown", "internal error; see the log"))

    async def collect_evidence(self, service: Remediable) -> tuple[Evidence, TargetState | None]:
        """Collect what a command may destroy, and the target's state."""
        host = self._inventory.host_of(service)
        return await evidence.collect_evidence(service, host, self._find_shell(service), self._redact)

    async def read_target_state(self, service: Remediable) -> TargetState | None:
        host = self._inventory.host_of(service)
        return await evidence.read_target_state(service, host, self._find_shell(service), self._redact)

    def _find_shell(self, service: Remediable) -> Shell | None:
        with contextlib.suppress(ShellError):
            return self._shell(service)
        return None

    def _shell(self, service: Remediable) -> Shell | None:
        """Return the shell of a service's host; None if it has no host. Raises ShellError."""
        return self._shells.get(service.host) if service.host in self._inventory.hosts else None

    async def run_command(self, service: Remediable, command: Command, component: str = "") -> CompletedCommand:
        """Run a verb of a service's control, for one component if there is a name, or a step beyond it.

        Raises ShellError, UnknownVerbError and UnknownComponentError.
        """
        if isinstance(service, HostAlert):
            assert isinstance(command, RunbookStep)  # noqa: S101 - there are no other steps
            return await self._run_on_host(service, command.runbook.run, command.runbook.timeout)
        if isinstance(command, WakeStep):
            return await self._run_on_host(service, command.command, WAKE_TIMEOUT)
        control, options = service.control, find_options(service, component)
        assert control is not None  # noqa: S101 - it has options
        host = self._inventory.host_of(service)
        runner = ControlRunner(
            self._shell(service), host.sudo if host else SudoOptions(), control.timeout, service.host
        )
        if isinstance(command, str):
            return await CONTROLS[control.kind].run(command, options, runner)
        if command.recreate is not None and command.recreate.command:
            return await runner.run(command.recreate.command)
        return await recreate(options, runner)

    async def _run_on_host(self, subject: Remediable, argv: Sequence[str], timeout: float) -> CompletedCommand:
        host = self._inventory.host_of(subject)
        sudo = host.sudo if host is not None else SudoOptions()
        return await ControlRunner(self._shell(subject), sudo, timeout, subject.host).run(list(argv))

    async def _execute(self, action: Claim, service: Remediable, command: Command) -> Claim | None:
        """Run the command and record its outcome; None if nothing was run, which ends the action."""
        component = action.component
        log.info("action_started", service=service.id, action=action.id, kind=action.kind, component=component or None)
        try:
            completed = await self.run_command(service, command, component)
        except asyncio.CancelledError:
            completed = CompletedCommand(None, "", "", "the remediator was stopped while the command ran")
        except ShellError as error:
            why = self._redact(f"nothing was run: {error}")
            await self._end(action, Ending("failed", why, reached=False, blocked=_blocked_by(error)))
            return None
        outcome = _outcome(completed)
        output = self._redact.redact_tail(completed.output, OUTPUT_LIMIT)
        why = self._redact(completed.why) or _describe_exit(service, action.kind, completed)
        log.info("command_ended", service=service.id, action=action.id, outcome=outcome, exit_status=completed.status)
        ended_at = self._database.clock.now()
        stored = await self._store(
            actions.record_command_end, action, outcome, completed.status, output, why, at=ended_at
        )
        self._changed(action.service)  # others on its host need not wait for the verification
        return stored

    async def _verify_after(self, command: "asyncio.Task[Claim | None]", service: Remediable) -> None:
        action = await asyncio.shield(command)  # at shutdown, `drain` waits for the command
        if action is not None:
            await self._finish(action, service)

    async def _resume(self, action: Claim) -> None:
        """Verify an action that was running when the process ended. The outcome of its command is unknown."""
        if action.command is None:
            why = "the remediator was interrupted while the command ran"
            now = self._database.clock.now()
            action = await self._store(actions.record_command_end, action, "unknown", None, "", why, at=now)
        service = self._inventory.find_subject(action.service)
        if service is None:
            await self._end(action, Ending("unknown", _describe_removal(action.service)))
            return
        await self._finish(action, service)

    async def _finish(self, action: Claim, service: Remediable) -> None:
        """Verify that the service or component is up, or that the host's alert is resolved, and end the action."""
        if action.kind == "stop":
            await self._end(action, Ending(action.command or "unknown", action.why))
            return
        if action.command == "failed":
            crashed = _exited_at_start(service, action)
            await self._end(action, Ending("failed", action.why or "the command failed", crashed=crashed))
            return
        why, verified, crashed = "", True, False
        try:
            if isinstance(service, HostAlert):
                why = await self._wait_until_resolved(action, service)
            else:
                why = await self._verify(action, service)
        except _NotVerifiedError as error:
            why, verified = str(error), False
        except _ExitedError as error:
            why, crashed = str(error), True
        if isinstance(service, Service):
            await self._store_state_after(action, service)
        if not why:
            await self._end(action, Ending(action.command or "unknown", action.why, recovered=True))
        else:
            state: CommandOutcome = "failed" if action.command == "succeeded" and verified else "unknown"
            await self._end(
                action,
                Ending(
                    state, "; ".join(part for part in (action.why, why) if part), verified=verified, crashed=crashed
                ),
            )

    async def _store_state_after(self, action: Claim, service: Service) -> None:
        """Record the exporter's observation and the target's state after the command."""
        with contextlib.suppress(DefibError, TimeoutError):
            observed = await self._exporter.observe(service.id)
            await self._store(actions.add_evidence, action, {"probe after": observed.summary})
        state = await self.read_target_state(service)
        if state is not None and state.state:
            await self._store(actions.store_facts_after, action, state.known_fields())

    async def _verify(self, action: Claim, service: Service) -> str:
        """Return why the service did not come up within `start_within` and stay up for `hold`; empty if it did.

        A component only has to come up: the service may be down because of others. Raises _NotVerifiedError if that
        could not be observed, and _ExitedError if the host says that it cannot come up.
        """
        watch = asyncio.create_task(self._watch_exit(action, service))
        up = asyncio.create_task(self._wait_until_up(action, service))
        try:
            await asyncio.wait((watch, up), return_when=asyncio.FIRST_COMPLETED)
            if not up.done():
                raise _ExitedError(watch.result())
            why = up.result()
        finally:
            for task in (watch, up):
                task.cancel()
            await asyncio.gather(watch, up, return_exceptions=True)
        if why:
            return why
        if action.up_at is None:
            await self._store(actions.record_up, action, at=self._database.clock.now())
            log.info("component_up" if action.component else "service_up", service=service.id, action=action.id)
            self._changed(action.service)
        return (
            ""
            if action.component
            else await self._watch_hold(service, self._inventory.remediation.for_service(service).hold)
        )

    async def _wait_until_resolved(self, action: Claim, alert: HostAlert) -> str:
        """Return why the alert was not resolved within `resolve_within`; empty if it was."""
        runbook = alert.find_runbook(action.kind)
        if runbook is None:
            return REMOVED_RUNBOOK
        ends = (action.command_ended_at or action.claimed_at) + runbook.resolve_within
        if action.command == "unknown":  # it may still be running
            ends = max(ends, action.claimed_at + runbook.timeout + KILL_DELAY)
        pause = FIRST_PAUSE
        while await self._is_firing(action, alert):
            left = ends - self._database.clock.now()
            if left <= 0:
                return f"{alert.alert} was not resolved within {runbook.resolve_within:g} s"
            await asyncio.sleep(min(pause, max(0.05, left)))
            pause = min(LONGEST_PAUSE, pause * 1.5)
        if action.up_at is None:
            await self._store(actions.record_up, action, at=self._database.clock.now())
            log.info("alert_over", service=alert.id, action=action.id)
        return ""

    async def _is_firing(self, action: Claim, alert: HostAlert) -> bool:
        """Whether an alert of an action's incident fires; also if that cannot be read now."""
        try:
            return bool(await self._database.read(firing_names, action.incident_id or 0, [alert.alert]))
        except StorageError:
            return True

    async def _watch_exit(self, action: Claim, service: Service) -> str:
        """Read the target's state until it has exited; returns how. Never returns where that cannot be known."""
        control = service.control
        if control is None or not CONTROLS[control.kind].reports_stops or action.component or action.kind != "restart":
            await asyncio.Event().wait()
        pause, exits, restarts = FIRST_STATE_PAUSE, 0, 0
        began = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(pause)
            state = await self.read_target_state(service)
            passed = asyncio.get_running_loop().time() - began
            exits = exits + 1 if state is not None and state.exited else 0
            restarts = max(restarts, (state.restarts or 0) if state is not None and state.healing else 0)
            if exits >= EXITS_SEEN and state is not None:
                if state.exit_status is None:
                    return f"it exited within {passed:.0f} s after its start"
                return f"it exited with status {state.exit_status} within {passed:.0f} s after its start"
            if restarts >= CRASH_LOOP_RESTARTS:
                return f"it exits again and again: its host restarted it {restarts} times within {passed:.0f} s"
            pause = min(LONGEST_STATE_PAUSE, pause * 1.5)

    async def _wait_until_up(self, action: Claim, service: Service) -> str:
        """Probe until the service or the component is up; returns why not when the deadline has passed."""
        what = f"component {action.component}: " if action.component else ""
        control, rules = service.control, self._inventory.remediation.for_service(service)
        start_within = control.start_within if control else 0.0
        if service.agent is not None:  # its next ping, or progress, takes longer than its start
            start_within = max(start_within, service.agent.recover_within)
        ends = (action.command_ended_at or action.claimed_at) + start_within
        if action.command == "unknown" and control is not None:
            # The command may still be running: keep the target locked until it cannot be.
            ends = max(ends, action.claimed_at + control.timeout + KILL_DELAY)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(0.0, ends - self._database.clock.now())
        pause = FIRST_PAUSE
        determined = False  # a probe since the command has determined the service's status
        while True:
            try:
                observed = await self._exporter.probe(service.id, service.probe.timeout)
                if _is_up(observed, action.component):
                    return ""
                last = observed.summary if not observed.success else "not up for long enough"
                determined = determined or bool(observed.success) or observed.reason not in rules.never_for
                conclusive = determined
            except ClientError as error:
                last, conclusive = f"cannot query the exporter: {error}", False
            if loop.time() >= deadline and not conclusive:
                raise _NotVerifiedError(f"{what}cannot determine whether the service is up; {last}")
            if loop.time() >= deadline:
                return f"{what}not up within {start_within:g} s; {last}"
            await asyncio.sleep(min(pause, max(0.05, deadline - loop.time())))
            pause = min(LONGEST_PAUSE, pause * 1.5)

    async def _watch_hold(self, service: Service, hold: float) -> str:
        """Observe the service for `hold` seconds, then probe it; returns why it is not up."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + hold
        while (left := ends - loop.time()) > 0:
            await asyncio.sleep(min(left, max(0.5, hold / 10)))
            with contextlib.suppress(ClientError):
                observed = await self._exporter.observe(service.id)
                if observed.up is False:
                    return f"down again within {hold:g} s; {observed.summary}"
        # The exporter may not have probed the service in the meantime.
        give_up = loop.time() + (service.control.start_within if service.control else 0.0)
        failures = 0
        while failures < service.probe.fail_after:
            try:
                observed = await self._exporter.probe(service.id, service.probe.timeout)
            except ClientError as error:
                if loop.time() > give_up:
                    message = f"cannot determine whether the service is up after {hold:g} s"
                    raise _NotVerifiedError(f"{message}; cannot query the exporter: {error}") from error
            else:
                if observed.success:
                    return ""
                if observed.up is False:
                    return f"not up after {hold:g} s; {observed.summary}"
                failures += 1
            await asyncio.sleep(1.0)
        return f"not up after {hold:g} s; {service.probe.fail_after} probes in a row failed"

    async def _store(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Write to the record, and repeat until it is stored: an outcome must not be lost."""
        while True:
            try:
                return await self._database.write_with_priority(work, *args, **kwargs)
            except StorageError as error:
                log.error("outcome_not_stored", error=str(error), hint="trying again")  # noqa: TRY400 - no traceback needed
                await asyncio.sleep(LONGEST_PAUSE)

    async def _end(self, action: Claim, ending: Ending) -> None:
        ended = await self._store(actions.end_action, action, ending)
        if not ended:
            return
        log.info("action_ended", service=action.service, action=action.id, state=ending.state, why=ending.why or None)
        self._metrics.actions.labels(action.service, action.kind, ending.state).inc()
        self._metrics.action_duration.observe(max(0.0, self._database.clock.now() - action.claimed_at))
        self._changed(action.service)


def _describe_removal(subject: str) -> str:
    return REMOVED_RUNBOOK if is_host_alert(subject) else "the service was removed from the inventory, or renamed"


def _is_up(observed: Observation, component: str) -> bool:
    """Whether a probe shows that a component is up; without a name, that the service is."""
    return component in observed.components_up if component else bool(observed.success and observed.up)


def _describe_exit(service: Remediable, kind: str, completed: CompletedCommand) -> str:
    """Return which command failed with which exit status; empty if it did not."""
    if isinstance(service, HostAlert) or kind == "wake":
        return f"{kind} exited {completed.status}" if completed.status else ""
    if not completed.status or service.control is None:
        return ""
    return f"{service.control.kind} {kind} exited {completed.status}"


def _exited_at_start(service: Remediable, action: Claim) -> bool:
    """Whether the output of a restart says that the target has started and has exited."""
    pattern = CONTROLS[service.control.kind].exited_at_start if service.control is not None else ""
    return action.kind == "restart" and bool(pattern) and re.search(pattern, action.output, re.MULTILINE) is not None


def _outcome(completed: CompletedCommand) -> CommandOutcome:
    if completed.status is None:
        return "unknown"
    return "succeeded" if completed.status == 0 else "failed"


def _blocked_by(error: ShellError) -> Blocked | None:
    """Return what an operator must fix before the action can work, if the error says so."""
    if isinstance(error, CommandRefusedError):
        return "sudo-refused"
    # Without a pinned key, the host's key has not changed.
    if isinstance(error, HostKeyError) and error.changed:
        return "host-key-changed"
    return None if error.retryable else "shell-refused"
