"""The snapshot: the state of all services, from the exporter and the record, refreshed at most once per second."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import structlog

from fleet.inventory.model import Inventory
from fleet.json_client import ClientError
from remediator.clients.exporter import Exporter, ServiceChanges
from remediator.policy.maintenance_windows import find_window
from remediator.policy.service_states import STATES, ServiceState, find_state
from remediator.record.database import Database, StorageError
from remediator.record.overview import Overview, read_overview
from runtime.logs import LimitedLog
from runtime.shared_reads import SharedReads

DEADLINE = 2.0  # seconds for each source
REFRESH_EVERY = 1.0
WATCHED_FOR = 30.0  # seconds after the last request in which the snapshot is kept fresh
log = structlog.get_logger()
limited_log = LimitedLog()


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """A service as lists show it. Times are Unix times; texts from outside are not redacted yet."""

    id: str
    title: str
    host: str
    group: str
    category: str
    provider: str
    severity: str
    state: ServiceState
    since: float | None = None  # of `up`
    reason: str = ""  # of the last probe, if it failed
    failure: str = ""
    probed_at: float | None = None
    job_started_at: float | None = None  # of a heartbeat
    latency: float | None = None
    recent: str = ""
    alerts: tuple[str, ...] = ()
    incident: int | None = None
    verb: str = ""  # of the last decision
    decision: str = ""  # its reason
    detail: str = ""
    acknowledged_by: str = ""
    action: str = ""  # kind of the action in progress
    phase: str = ""  # of the action: queued, running, verifying
    action_id: int | None = None
    component: str = ""  # that the action restarts; empty: the whole service
    maintenance: str = ""
    paused: bool = False  # it is probed only on request
    stopped_by: str = ""  # through Defib
    stop_reason: str = ""
    components_down: tuple[str, ...] = ()  # the first ones by the last probe
    dependencies_down: tuple[str, ...] = ()  # the names of services that it depends on, and that do not work
    verbs: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[int, str]:
        """The broken ones first."""
        return STATES.index(self.state), self.sort_name

    @property
    def sort_name(self) -> str:
        """The name, with numbers that are sorted by their value."""
        return re.sub(r"[0-9]+", lambda number: number[0].zfill(12), self.title.lower())

    def looks_like(self, other: "ServiceRow") -> bool:
        """Whether both look the same but for what each probe changes."""
        measured = {"probed_at": None, "job_started_at": None, "latency": None, "recent": ""}
        return replace(self, **measured) == replace(other, **measured)  # type: ignore[arg-type]  # a literal's values


@dataclass(frozen=True)
class Problem:
    """A source that cannot be read, and since when in Unix time."""

    source: Literal["exporter", "record"]
    text: str
    since: float


@dataclass
class Snapshot:
    """The rows by service, with the version in which each changed its looks or its results last.

    `created` are the heartbeats that jobs have created, which are in no list of services, with such versions.
    """

    version: int = 0
    rows: dict[str, ServiceRow] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    overview: Overview = field(default_factory=Overview)
    mismatched: frozenset[str] = frozenset()
    problems: Mapping[str, Problem] = field(default_factory=dict)
    head_version: int = 0  # in which counts, banners or the set of services changed

    def describe(self) -> Mapping[str, Any]:
        """Return what every page shows: the version, what is unusual, and which sources have problems."""
        return {
            "version": self.version,
            "problems": [asdict(each) for each in self.problems.values()],
            "automation": asdict(self.overview.automation),
            "maintenance": [dict(each) for each in self.overview.maintenance],
            "mismatched": sorted(self.mismatched),
        }

    def changed_since(self, version: int) -> list[ServiceRow]:
        return [self.rows[name] for name, at in self.changed.items() if at > version and name in self.rows]

    def measured_since(self, version: int) -> list[ServiceRow]:
        return [self.rows[name] for name, at in self.measured.items() if at > version and name in self.rows]

    def created_since(self, version: int) -> list[str]:
        return [name for name, at in self.created.items() if at > version]


class SnapshotSource:
    """Keeps the snapshot fresh while somebody watches."""

    def __init__(self, database: Database, get_exporter: Callable[[], Exporter]) -> None:
        self._database, self._get_exporter = database, get_exporter
        # Versions grow across restarts of the process, so that a browser never has a newer one.
        self.snapshot = Snapshot(version=int(time.time()))
        self._services: dict[str, Mapping[str, Any]] = {}  # as the exporter describes them
        self._cursor = ""
        self._reading: asyncio.Task[ServiceChanges] | None = None  # in progress
        self._pending: set[str] = set()  # services that changed since rows were built
        self._windows: Mapping[str, str] = {}  # of maintenance in the inventory, by service
        self._dependents: Mapping[str, set[str]] = {}
        self._inventory: Inventory | None = None  # for which the rows were built
        self._refreshed_at = self._watched_at = float("-inf")
        self._lock = asyncio.Lock()
        self._watched = asyncio.Event()
        self._refreshed = asyncio.Condition()
        self._pages = SharedReads(running=8, waiting=40)

    async def run(self) -> None:
        """Refresh until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self.wait_until_watched()
            started = loop.time()
            try:
                await self.refresh()
            except Exception:  # the next round may succeed
                if limited_log.admits("snapshot_failed"):
                    log.exception("snapshot_failed")
            await asyncio.sleep(max(0.1, started + REFRESH_EVERY - loop.time()))

    async def get(self) -> Snapshot:
        """Return the snapshot as `read` does, and keep it fresh for a while."""
        self.watch()
        return await self.read()

    async def read(self, patience: float = 0.0) -> Snapshot:
        """Return the snapshot, refreshed if it is older than a second.

        Wait up to `patience` seconds more if the exporter has not answered within the deadline.
        """
        if asyncio.get_running_loop().time() - self._refreshed_at > REFRESH_EVERY:
            await self.refresh()
        if patience and self._reading is not None:
            await asyncio.wait([self._reading], timeout=patience)
            await self.refresh()
        return self.snapshot

    def watch(self) -> None:
        """Keep the snapshot fresh for a while."""
        self._watched_at = asyncio.get_running_loop().time()
        self._watched.set()

    async def wait_until_watched(self) -> None:
        """Wait while nobody watches."""
        if asyncio.get_running_loop().time() - self._watched_at > WATCHED_FOR:
            self._watched.clear()
            await self._watched.wait()

    async def wait_for_change(self, version: int, timeout: float) -> None:
        """Wait until the snapshot is newer than `version`, or for some seconds."""
        try:
            async with asyncio.timeout(timeout), self._refreshed:
                await self._refreshed.wait_for(lambda: self.snapshot.version > version)
        except TimeoutError:
            return

    async def refresh(self) -> None:
        """Read both sources, each within its deadline; what cannot be read stays as it was."""
        before = self._refreshed_at
        async with self._lock:
            if self._refreshed_at > before:
                return  # somebody else has just done it
            problem, (overview, record_problem) = await asyncio.gather(self._read_exporter(), self._read_record())
            found = [each for each in (problem, record_problem) if each is not None]
            problems: Mapping[str, Problem] = {each.source: each for each in found}
            self._update(set(self._pending), overview, problems)
            self._refreshed_at = asyncio.get_running_loop().time()
        async with self._refreshed:
            self._refreshed.notify_all()

    async def read_from_exporter(self, path: str) -> Mapping[str, Any]:
        """Return what the exporter answers now. Raises ClientError, also if it does not answer in time."""
        try:
            return await self._pages.read(path, lambda: self._get_exporter().read(path), DEADLINE)
        except TimeoutError as error:
            raise ClientError(str(error) or "no answer in time") from error

    async def _read_exporter(self) -> Problem | None:
        """Read the services that have changed; returns why that failed."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._get_exporter().list_changes(self._cursor), name="list_changes")
        reading = self._reading
        try:
            async with _deadline():
                changes = await asyncio.shield(reading)
        except ClientError as error:
            return self._problem("exporter", str(error)) if _needs_exporter(self._database.inventory) else None
        finally:
            # A list of thousands of services may take longer than the deadline: the next round goes on waiting for it.
            if reading.done():
                self._reading = None
        self._cursor = changes.cursor
        # Kept until rows are built of them, also if that fails this time.
        self._pending |= {str(each["id"]) for each in changes.services}
        if changes.complete:
            self._pending |= self._services.keys()
            self._services.clear()
        self._services.update({str(each["id"]): each for each in changes.services})
        return None

    async def _read_record(self) -> tuple[Overview, Problem | None]:
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._database.read(read_overview), None
        except (StorageError, TimeoutError) as error:
            return self.snapshot.overview, self._problem("record", str(error) or "no answer in time")

    def _problem(self, source: Literal["exporter", "record"], message: str) -> Problem:
        known = self.snapshot.problems.get(source)
        return Problem(source, message, known.since if known is not None else time.time())

    def _update(self, changed: set[str], overview: Overview, problems: Mapping[str, Problem]) -> None:
        old, inventory = self.snapshot, self._database.inventory
        if inventory is not self._inventory:
            changed = {*inventory.services, *old.rows}
            self._inventory, self._dependents = inventory, _find_dependents(inventory)
        windows = self._find_windows(inventory)
        changed = changed | {name for name, _ in windows.items() ^ self._windows.items()}
        if overview.maintenance != old.overview.maintenance:
            changed = changed | {*inventory.services, *old.rows}
        names = changed | overview.services_that_differ(old.overview)
        version, number = old.version + 1, len(old.rows)
        rows, looks, measured = old.rows, old.changed, old.measured
        affected: set[str] = set()  # whose rows show the states of others, in the next round
        for name in names:
            row = self._build_row(name, inventory, overview, windows.get(name, ""))
            before = rows.get(name)
            if row is None:
                for each in (rows, looks, measured):
                    each.pop(name, None)
                continue
            if before is None or not row.looks_like(before):
                looks[name] = version
            if before is None or before.state != row.state:
                affected |= self._dependents.get(name, set())
            if row != before:
                measured[name] = version
            rows[name] = row
        created = self._update_created(old.created, names, inventory, version)
        counts: Mapping[str, int] = Counter(row.state for row in rows.values())
        mismatched = self._find_mismatched(inventory)
        texts, old_texts = ({name: each.text for name, each in by.items()} for by in (problems, old.problems))
        head = (counts, len(rows), created.keys(), overview.banners, texts, mismatched)
        old_head = (old.counts, number, old.created.keys(), old.overview.banners, old_texts, old.mismatched)
        is_new_head = head != old_head
        if names or is_new_head:
            self.snapshot = Snapshot(
                version, rows, looks, measured, created, counts, overview, mismatched, problems,
                version if is_new_head else old.head_version,
            )  # fmt: skip
        self._windows = windows
        self._pending = affected

    def _find_windows(self, inventory: Inventory) -> Mapping[str, str]:
        """Return the maintenance windows of the inventory that are in effect, by service."""
        if not inventory.remediation.maintenance:
            return {}
        now = self._database.clock.unix(self._database.clock.now())
        found = (
            (name, find_window(inventory, name, inventory.host_of(each), now))
            for name, each in inventory.services.items()
        )
        return {name: window.why for name, window in found if window is not None}

    def _find_mismatched(self, inventory: Inventory) -> frozenset[str]:
        """Return the services that only one of the exporter and the remediator has."""
        if not self._services:
            return frozenset()
        configured = {name for name in self._services if not self._is_created(name)}
        return frozenset(configured ^ inventory.services.keys())

    def _update_created(
        self, old: Mapping[str, int], names: Iterable[str], inventory: Inventory, version: int
    ) -> dict[str, int]:
        """Return the heartbeats that jobs have created, with the versions of their last changes."""
        changed = {name: version for name in names if self._is_created(name)}
        kept = {**old, **changed}
        return {name: at for name, at in kept.items() if self._is_created(name) and name not in inventory.services}

    def _is_created(self, name: str) -> bool:
        return self._services.get(name, {}).get("created") is True

    def _build_row(self, name: str, inventory: Inventory, overview: Overview, window: str) -> ServiceRow | None:
        service, seen = inventory.services.get(name), self._services.get(name)
        if service is None:
            return None
        host = inventory.host_of(service)
        row = ServiceRow(
            name, service.title, service.host, host.group if host is not None else "", service.category,
            service.provider, service.severity, "unknown",
            verbs=tuple(service.control.options.verbs) if service.control is not None else (),
            dependencies_down=tuple(
                each.title for name in service.depends_on
                if (each := self.snapshot.rows.get(name)) is not None and each.state in ("down", "stopped")
            ),
        )  # fmt: skip
        if seen is not None:
            row = _add_observation(row, seen)
        row = _add_record(row, overview, self._database.clock.unix)
        held = _find_maintenance(row, overview) or window
        up = seen.get("up") if seen is not None else None
        is_impaired = bool(row.alerts or row.components_down)
        state = find_state(up, is_stopped=name in overview.stops, decision=row.decision, is_impaired=is_impaired)
        return replace(row, maintenance=held, state=state)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """Raise ClientError if the exporter does not answer in time."""
    try:
        async with asyncio.timeout(DEADLINE):
            yield
    except TimeoutError as error:
        raise ClientError("no answer in time") from error


def _needs_exporter(inventory: Inventory) -> bool:
    """Whether the exporter has anything to do: with the gateway alone, it need not run."""
    return bool(inventory.services or inventory.hosts or inventory.exporter.heartbeats.create)


def _find_dependents(inventory: Inventory) -> Mapping[str, set[str]]:
    """Return the services that depend on each service."""
    found: dict[str, set[str]] = {}
    for name, service in inventory.services.items():
        for each in service.depends_on:
            found.setdefault(each, set()).add(name)
    return found


def _find_maintenance(row: ServiceRow, overview: Overview) -> str:
    """Return who put the service, its host or its group into maintenance, and why; empty if nobody did."""
    scopes = {("service", row.id), ("host", row.host), ("group", row.group)}
    found = (each for each in overview.maintenance if (each["scope"], each["name"]) in scopes)
    return next((f"{each['asked_by']}: {each['reason']}" for each in found), "")


def _add_observation(row: ServiceRow, seen: Mapping[str, Any]) -> ServiceRow:
    last = seen.get("last") or {}
    failed = last.get("success") is False
    return replace(
        row, since=parse_time(seen.get("since")), reason=last.get("reason") or "" if failed else "",
        failure=last.get("message") or "" if failed else "", probed_at=parse_time(last.get("started_at")),
        job_started_at=parse_time(seen.get("job_started_at")),
        latency=last.get("duration_seconds"), recent=seen.get("recent") or "", paused=seen.get("paused") is True,
        components_down=tuple(seen.get("components_down") or ()),
    )  # fmt: skip


def _add_record(row: ServiceRow, overview: Overview, unix: Callable[[float], float]) -> ServiceRow:
    incident, action = overview.incidents.get(row.id), overview.actions.get(row.id)
    row = replace(row, alerts=overview.alerts.get(row.id, ()))
    if incident is not None:
        row = replace(
            row, incident=incident["id"], verb=incident["verb"] or "", decision=incident["reason"] or "",
            detail=incident["detail"] or "", acknowledged_by=incident["acknowledged_by"] or "",
        )  # fmt: skip
        if row.since is None and incident["down_at"] is not None:
            row = replace(row, since=unix(incident["down_at"]))
    if action is not None:
        row = replace(row, action=action.kind, phase=action.phase, action_id=action.id, component=action.component)
    if (stop := overview.stops.get(row.id)) is not None:
        row = replace(row, stopped_by=stop["asked_by"], stop_reason=stop["reason"], since=unix(stop["at"]))
    return row


def parse_time(text: str | None) -> float | None:
    """Return the Unix time of an RFC 3339 text."""
    return None if text is None else datetime.fromisoformat(text).timestamp()
