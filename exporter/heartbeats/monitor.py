"""The heartbeats in force: receives pings, notices who is late, and says which services have changed.

A state that is seen by others is one that is stored. Times are of a steady clock that continues over restarts.
"""

import asyncio
import contextlib
import heapq
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from exporter.heartbeats.agent import AgentStatus, parse_report
from exporter.heartbeats.bodies import END_LIMIT, HEAD_LIMIT, SentBody
from exporter.heartbeats.creation import LimitReachedError, check_slug, find_remaining, make_services
from exporter.heartbeats.rate_limit import admit
from exporter.heartbeats.registry import HeartbeatRegistry, HeartbeatUrls
from exporter.heartbeats.schedule import create_schedule
from exporter.heartbeats.series import render_heartbeat
from exporter.heartbeats.state import HeartbeatState, Ping, Timing
from exporter.heartbeats.store import HeartbeatStore, HeartbeatStoreError, ReceivedPing, ensure_ping_key
from exporter.heartbeats.writer import PingWriter, States
from exporter.probes.heartbeat import HeartbeatProbeOptions, check_body
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.model import Inventory, Service
from fleet.inventory.units import format_duration
from fleet.pings import BODY_LIMIT, PingKind
from runtime.clock import SteadyClock, StoredClock, boot_id, seconds_since_boot
from runtime.logs import LimitedLog
from runtime.redaction import Redactor, mask_credentials

FAULT_LIMIT = 300  # characters of a failed job's output that become a part of the reason
CLIENT_LIMIT = 200  # characters
RATE_LIMIT = 60  # pings of one heartbeat in a minute
CREATE_LIMIT = 60  # heartbeats that are created in a minute
TICK = 1.0  # seconds
ABSENT_AFTER = 5.0  # seconds in which the program did not run: pings were not received
STORE_TIME_EVERY = 5.0
JUMP = 1.0  # seconds that the system time has been set by: cron expressions are due at other times
REPORTED_TOGETHER = 100
_log = LimitedLog()
log = structlog.get_logger()


@dataclass(slots=True)
class Heartbeat:
    """A heartbeat in force. `queued_for` is the earliest deadline for which it is in the queue."""

    service: Service
    timing: Timing
    state: HeartbeatState
    queued_for: float = math.inf
    used: float = 0.0  # of RATE_LIMIT, at the time `used_at`
    used_at: float = 0.0
    report_problem: str = ""  # why the agent's last report was not understood
    agent_status: AgentStatus | None = None  # as it was published

    @property
    def options(self) -> HeartbeatProbeOptions:
        options: HeartbeatProbeOptions = self.service.probe.options
        return options

    def find_agent_status(self, now: float) -> AgentStatus | None:
        """Return what an agent does; None if it is none, has reported nothing, or is not up."""
        settings, state = self.service.agent, self.state.agent
        if settings is None or state is None or self.state.status(self.timing, now)[0] != "up":
            return None
        return state.status(settings, now)


class HeartbeatMonitor:
    """The heartbeats in force. Its database is open while there are any, or jobs may create some."""

    def __init__(self, redact: Redactor, publish: Callable[[str, Mapping[str, str]], None]) -> None:
        """`publish` replaces the lines of a service on `/metrics`; none remove them."""
        self.registry = HeartbeatRegistry()
        self._redact, self._publish = redact, publish
        self._heartbeats: dict[str, Heartbeat] = {}
        self._agents: dict[str, Heartbeat] = {}  # those heartbeats that are agents'
        self._database: _OpenDatabase | None = None
        self._boot = ""  # the ID of the machine's boot, which is read with the database
        self._clock = SteadyClock(0.0)
        self._deadlines: list[tuple[float, str]] = []  # a heap, in which some are out of date
        self._changed: dict[str, float] = {}  # services to report, and when they have changed
        self._started: set[str] = set()  # services whose jobs have started
        self._wake = asyncio.Event()
        self._present_until = 0.0  # until when pings could be received
        self._time_stored_at = 0.0
        self._correction = 0.0  # seconds between the steady clock and the system time
        self._inventory = Inventory()
        self._created, self._created_at = 0.0, 0.0  # of CREATE_LIMIT, and the time of that

    @property
    def is_receiving(self) -> bool:
        """Whether there are heartbeats, or jobs may create some."""
        return self._database is not None

    @property
    def created(self) -> Mapping[str, Service]:
        """The services that jobs have created."""
        return {name: each.service for name, each in self._heartbeats.items() if each.state.is_created}

    async def apply(self, inventory: Inventory) -> None:
        """Switch to an inventory. Raises StartError, TokenError and HeartbeatStoreError."""
        services = {
            name: service
            for name, service in inventory.services.items()
            if isinstance(service.probe.options, HeartbeatProbeOptions)
        }
        settings = inventory.exporter.heartbeats
        if not services and settings.create is None:
            self.registry.replace((), "", "")
            await self._replace({})
            await self.close()
            return
        key = settings.ping_key
        if key is None:
            key = await asyncio.to_thread(ensure_ping_key, settings.database)
        if self._database is None or self._database.path != settings.database:
            opened = await asyncio.to_thread(_OpenDatabase, settings.database)
            await self.close()
            self._heartbeats = {}  # their times are of the other database's clock
            self._open(opened)
        created = make_services(inventory, find_remaining(inventory, self._find_created()))
        self._inventory = inventory
        in_force = [*services.values(), *created.values()]
        self.registry.replace(in_force, key.get_secret_value(), settings.base_url)
        self._redact.add(self.registry.secrets)
        await self._replace({**services, **created}, inventory.notify.timezone, created)

    def _find_created(self) -> list[str]:
        """Return the heartbeats that jobs have created, also those that are stored only."""
        stored = self._database.states if self._database is not None else {}
        states = {**stored, **{name: each.state for name, each in self._heartbeats.items()}}
        return [name for name, state in states.items() if state.is_created]

    async def create(self, slug: str) -> Service | None:
        """Create a heartbeat, and return its service; None if it exists already.

        Raises NotCreatedError, RateLimitedError and HeartbeatStoreError.
        """
        inventory, database, now = self._inventory, self._database, self._clock.now()
        settings, created = check_slug(inventory, slug), self.created
        if slug in created:
            return None
        if len(created) >= settings.at_most or database is None:
            raise LimitReachedError(settings.at_most)
        self._created, self._created_at = admit(self._created, self._created_at, now, CREATE_LIMIT), now
        service = make_services(inventory, [slug])[slug]
        state = HeartbeatState(now, is_created=True)
        heartbeat = Heartbeat(service, self._create_timing(service, inventory.notify.timezone), state)
        await database.writer.change(lambda: {slug: state})
        self._heartbeats[slug] = heartbeat
        self._redact.add([self.registry.add(service)])
        self._schedule(heartbeat)
        self._show(heartbeat)
        return service

    async def remove(self, name: str) -> None:
        """Forget a heartbeat that a job has created. Raises KeyError and HeartbeatStoreError."""
        database, heartbeat = self._database, self._heartbeats[name]
        if not heartbeat.state.is_created or database is None:
            raise KeyError(name)
        del self._heartbeats[name]  # first, so that no ping stores it again
        try:
            await database.writer.run(database.store.forget, [name])
        except HeartbeatStoreError:
            self._heartbeats[name] = heartbeat
            raise
        self._changed.pop(name, None)
        self.registry.remove(heartbeat.service)
        self._publish(name, {})

    def find_forgotten(self) -> list[str]:
        """Return the created heartbeats that have been down without a ping for longer than configured."""
        settings, now = self._inventory.exporter.heartbeats.create, self._clock.now()
        if settings is None:
            return []
        created = {name: each for name, each in self._heartbeats.items() if each.state.is_created}
        since = {name: each.state.silent_since(each.timing, now) for name, each in created.items()}
        return [name for name, at in since.items() if at is not None and now - at >= settings.forget_after]

    def _open(self, database: "_OpenDatabase") -> None:
        """Continue where the last run has ended."""
        self._database, self._clock, self._boot = database, database.clock, database.boot
        database.writer = PingWriter(database.store, self._read_clock, self._states_after, self._note_stored)
        now = self._clock.now()
        self._present_until = database.present_until
        self._time_stored_at, self._correction = now, self._clock.unix(now) - now

    async def _replace(
        self, services: Mapping[str, Service], timezone: str = "UTC", created: Collection[str] = ()
    ) -> None:
        now, database = self._clock.now(), self._database
        before, self._heartbeats = self._heartbeats, {}
        stored = database.states if database is not None else {}
        removed = (before.keys() | stored.keys()) - services.keys()
        changed, added = [], []
        for name, service in services.items():
            heartbeat = before.get(name)
            is_kept = heartbeat is not None and heartbeat.state.is_created == (name in created)
            if heartbeat is None or heartbeat.service != service or not is_kept:
                state = heartbeat.state if heartbeat is not None else stored.get(name)
                if state is None:
                    state = HeartbeatState(now)
                    added.append(name)
                elif state.is_created and name not in created:  # it was added to the inventory
                    state = replace(state, is_created=False)
                    added.append(name)
                heartbeat = Heartbeat(service, self._create_timing(service, timezone), state)
                changed.append(name)
            self._heartbeats[name] = heartbeat
        self._agents = {name: each for name, each in self._heartbeats.items() if each.service.agent is not None}
        for name in removed:
            self._publish(name, {})
            self._changed.pop(name, None)
        if database is not None:
            database.states = {}
            try:
                if removed:
                    await database.writer.run(database.store.forget, removed)
                await database.writer.change(lambda: self._read_states(added))  # since when they are known
                await self._note_absence(now)
            except HeartbeatStoreError as error:
                self._log_fault(error)
        for name in changed:
            heartbeat = self._heartbeats[name]
            self._schedule(heartbeat)
            self._show(heartbeat)
            self.recheck(name)

    def _read_states(self, names: Iterable[str]) -> States:
        return {name: self._heartbeats[name].state for name in names if name in self._heartbeats}

    def _create_timing(self, service: Service, timezone: str) -> Timing:
        options: HeartbeatProbeOptions = service.probe.options
        schedule = create_schedule(options, timezone, self._clock.unix, self._clock.from_unix)
        return Timing(schedule, options.grace, options.start_grace)

    async def close(self) -> None:
        """Store what still waits, and the time, and close the database."""
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(HeartbeatStoreError):
                await database.writer.change(dict)
            await database.writer.close()
            database.store.close()

    async def receive(
        self,
        name: str,
        kind: PingKind,
        exit_status: int | None,
        run_id: str,
        body: SentBody,
        *,
        client: str,
        duration: float | None = None,
    ) -> None:
        """Store a ping of a heartbeat. Raises KeyError, RateLimitedError and HeartbeatStoreError."""
        heartbeat, database = self._heartbeats[name], self._database
        now = self._clock.now()
        heartbeat.used, heartbeat.used_at = admit(heartbeat.used, heartbeat.used_at, now, RATE_LIMIT), now
        if database is None:
            raise KeyError(name)  # a reload has removed all heartbeats
        head = body.head.decode("utf-8", "replace")
        redacted = self._redact.redact_head(head, BODY_LIMIT, is_cut=len(body.head) >= HEAD_LIMIT)
        fault = ""
        if kind == "success":
            fault = mask_credentials(self._find_fault(heartbeat, body.head[:BODY_LIMIT]))
            kind = "fail" if fault else kind
        elif kind == "fail":
            output = self._redact.redact_tail(body.end.decode("utf-8", "replace"), END_LIMIT)
            fault = _describe_failure(exit_status, mask_credentials(output)[-FAULT_LIMIT:])
        report, problem = None, ""
        if heartbeat.service.agent is not None:
            try:
                report = parse_report(redacted.encode())
            except ValueError as error:  # the agent is alive, whatever it reports
                problem = str(error)
        client = self._redact.redact_head(client, CLIENT_LIMIT)
        stored = mask_credentials(redacted)[:BODY_LIMIT]  # output of jobs may have secrets that Defib does not know
        await database.writer.write(
            ReceivedPing(name, now, kind, exit_status, run_id, fault, stored, body.is_cut, client, report, duration)
        )
        heartbeat.report_problem = problem

    def _find_fault(self, heartbeat: Heartbeat, body: bytes) -> str:
        """Return why the body of a successful ping is not as expected; empty if it is."""
        try:
            check_body(heartbeat.options.expect, body, ProbeDetails(redact=self._redact))
        except ProbeFailure as failure:
            return failure.message
        return ""

    def list_all(self) -> list[Heartbeat]:
        return list(self._heartbeats.values())

    def find(self, name: str) -> Heartbeat | None:
        return self._heartbeats.get(name)

    def find_urls(self, name: str) -> HeartbeatUrls | None:
        """Return the URLs of a heartbeat, which are secrets."""
        return self.registry.find_urls(name)

    async def read_pings(self, name: str) -> Sequence[ReceivedPing]:
        """Return the last pings of a heartbeat, newest first. Raises HeartbeatStoreError."""
        database = self._database
        return [] if database is None else await database.writer.run(database.store.read_pings, name)

    def find_agent_status(self, name: str) -> AgentStatus | None:
        """Return what an agent does; None if the service is none, or that is unknown."""
        heartbeat = self._heartbeats.get(name)
        return None if heartbeat is None else heartbeat.find_agent_status(self._clock.now())

    def now(self) -> float:
        return self._clock.now()

    def to_unix(self, at: float) -> float:
        return self._clock.unix(at)

    def check(self, name: str) -> None:
        """Raise ProbeFailure unless the service is up: with `late`, `failed`, or `error` while nothing is known."""
        heartbeat = self._heartbeats.get(name)
        if heartbeat is None:
            raise ProbeFailure("error", "no pings are received: the exporter has not loaded this service")
        status, _ = heartbeat.state.status(heartbeat.timing, self._clock.now())
        if status == "waiting":
            raise ProbeFailure(
                "error", f"no ping has been received yet; expected {heartbeat.options.describe_schedule()}"
            )
        if status == "failed":
            raise ProbeFailure("failed", heartbeat.state.fault)
        if status == "late":
            raise ProbeFailure("late", _describe_lateness(heartbeat))

    def recheck(self, name: str) -> None:
        """Have a service reported again, with the time at which its state has changed."""
        heartbeat = self._heartbeats.get(name)
        if heartbeat is None:
            return
        now = self._clock.now()
        status, since = heartbeat.state.status(heartbeat.timing, now)
        if status != "waiting":
            self._changed[name] = since
            self._wake.set()

    async def run(self, report: Callable[[str, float], Awaitable[None]], note: Callable[[str], None]) -> None:
        """Report each service whose state may have changed, with the Unix time of that, until cancelled.

        `note` is called when a job has started, and when an agent begins or ceases to be stuck, to wait or to be idle.
        """
        while True:
            await self._wait()
            await self._check_presence()
            self._collect_overdue()
            changed, self._changed = self._changed, {}
            for number, (name, since) in enumerate(changed.items(), 1):
                await report(name, self._clock.unix(since))
                if number % REPORTED_TOGETHER == 0:
                    await asyncio.sleep(0)
            started, self._started = self._started, set()
            for name in started:
                note(name)
            now = self._clock.now()
            for name, heartbeat in self._agents.items():
                status = heartbeat.find_agent_status(now)
                if status != heartbeat.agent_status:
                    heartbeat.agent_status = status
                    note(name)

    async def _wait(self) -> None:
        """Wait for a ping or a deadline, at most `TICK`."""
        until = min(TICK, self._deadlines[0][0] - self._clock.now()) if self._deadlines else TICK
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until)):
                await self._wake.wait()
        self._wake.clear()

    async def _check_presence(self) -> None:
        now = self._clock.now()
        is_due = now >= self._time_stored_at + STORE_TIME_EVERY
        was_absent = now > self._present_until + ABSENT_AFTER
        if self._database is not None and (is_due or was_absent):
            self._time_stored_at = now
            try:
                await self._note_absence(now)
            except HeartbeatStoreError as error:
                self._log_fault(error)
        if not was_absent:
            self._present_until = now
        correction = self._clock.unix(now) - now
        if abs(correction - self._correction) > JUMP:
            self._correction = correction
            for heartbeat in self._heartbeats.values():
                self._schedule(heartbeat)

    @staticmethod
    def _log_fault(error: HeartbeatStoreError) -> None:
        if _log.admits("heartbeats_not_stored"):
            log.error("heartbeats_not_stored", error=str(error), effect="pings are refused with 503")

    async def _note_absence(self, now: float) -> None:
        """Store the time; if no pings could be received for a while, extend the deadlines in it."""
        database, begin = self._database, self._present_until
        if database is None:
            return

        def compute() -> States:
            if now <= begin + ABSENT_AFTER:
                return {}
            states = {n: each.state.after_absence(each.timing, begin, now) for n, each in self._heartbeats.items()}
            return {n: state for n, state in states.items() if state is not self._heartbeats[n].state}

        await database.writer.change(compute)
        self._present_until = now

    def _collect_overdue(self) -> None:
        now = self._clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            at, name = heapq.heappop(self._deadlines)
            heartbeat = self._heartbeats.get(name)
            if heartbeat is None or heartbeat.queued_for != at:
                continue
            heartbeat.queued_for = math.inf
            status, since = heartbeat.state.status(heartbeat.timing, now)
            if status == "late":
                self._changed[name] = since
            else:
                self._schedule(heartbeat)

    def _schedule(self, heartbeat: Heartbeat) -> None:
        """Put the deadline into the queue, unless an earlier one is there, at which it is computed again."""
        deadline = heartbeat.state.deadline(heartbeat.timing)
        if deadline is not None and deadline < heartbeat.queued_for:
            heartbeat.queued_for = deadline
            heapq.heappush(self._deadlines, (deadline, heartbeat.service.id))
            if self._deadlines[0][1] == heartbeat.service.id:
                self._wake.set()

    def _read_clock(self) -> StoredClock:
        return StoredClock(self._boot, seconds_since_boot(), time.time(), self._clock.now())

    def _states_after(self, pings: Sequence[ReceivedPing]) -> States:
        states: dict[str, HeartbeatState] = {}
        for each in pings:
            heartbeat = self._heartbeats.get(each.service)
            if heartbeat is not None:  # else a reload has removed it
                state = states.get(each.service, heartbeat.state)
                ping = Ping(each.at, each.kind, each.exit_status, each.run_id, each.fault, each.duration)
                state = state.after_ping(ping, heartbeat.timing)
                states[each.service] = state if each.report is None else state.after_report(each.report, each.at)
        return states

    def _note_stored(self, states: States) -> None:
        for name, state in states.items():
            heartbeat = self._heartbeats.get(name)
            if heartbeat is None:
                continue
            before, heartbeat.state = heartbeat.state, state
            self._schedule(heartbeat)
            self._show(heartbeat)
            if state.last_ping != before.last_ping and state.last_ping is not None:
                self._changed[name] = state.last_ping
                self._wake.set()
            elif state.last_start != before.last_start:
                self._started.add(name)
                self._wake.set()

    def _show(self, heartbeat: Heartbeat) -> None:
        lines = render_heartbeat(heartbeat.service, heartbeat.state, heartbeat.timing, self._clock.unix)
        self._publish(heartbeat.service.id, lines)


class _OpenDatabase:
    """An open database, with its clock, and what it had stored. Opening it blocks. Raises StartError."""

    writer: PingWriter

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, HeartbeatStore(path)
        stored, self.boot = self.store.read_clock(), boot_id()
        running, calendar = seconds_since_boot(), time.time()
        offset = calendar - running if stored is None else stored.compute_offset(self.boot, running, calendar)
        self.clock = SteadyClock(offset)
        self.present_until = running + offset if stored is None else stored.steady
        self.states = self.store.read_states()


def _describe_failure(exit_status: int | None, output: str) -> str:
    what = "the job reported a failure" if exit_status is None else f"exit status {exit_status}"
    tail = " ".join(output.split())
    return f"{what}; its output ends with: {tail}" if tail else what


def _describe_lateness(heartbeat: Heartbeat) -> str:
    state, options = heartbeat.state, heartbeat.options
    if state.started_at is not None and state.deadline(heartbeat.timing) == state.started_at + options.start_grace:
        return f"the job has started, but did not end within {format_duration(options.start_grace)}"
    what = "no ping in time" if state.last_ping is not None else "no ping has been received"
    return f"{what}: expected {options.describe_schedule()}, at most {format_duration(options.grace)} late"
