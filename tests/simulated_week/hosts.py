"""What the exporter publishes of hosts: the collectors' series, of machines that are made up."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from exporter.scheduler.collector_scheduler import retry_pause
from exporter.scheduler.schedule import Schedule
from fleet.shells import CONNECT_TIMEOUT
from tests.simulated_week import logs
from tests.simulated_week.events import DAY, GPUS, HOUR, KILLED_FOR, MINUTE, START, UNITS, WEEK, Span, Week
from tests.simulated_week.scrapes import EXPORTER_LABELS, Scrapes
from tests.simulated_week.store import Labels, as_labels

EVERY = 30.0  # seconds between two runs of a collector
RUN_TAKES = 0.5
GIB = 2.0**30
GROWTH = 0.002  # of a disk each day
DOWNLOAD = 160 * GIB
FILLS_WITHIN = 5 * MINUTE  # from 80 % to the end, for the disk that fills up
PRUNED_AT = 4 * HOUR  # time of day at which containers that have exited are removed
NIGHT = (22 * HOUR, 8 * HOUR)
ALL_COLLECTORS = ("system", "gpu", "docker", "systemd", "supervisor")
Value = float | Callable[[float], float | None] | None  # of the time at which a collector ran


@dataclass(frozen=True)
class Run:
    """A run of the collectors of a host; `at` is when it read the host, `ended` when its result is published."""

    at: float
    ended: float
    is_answered: bool


def list_runs(week: Week, host: str, begin: float, end: float) -> Iterator[Run]:
    """Yield the runs of an exporter that runs from `begin` to `end`."""
    dead_host, dead = week.dead_host
    schedule = Schedule.for_key(host, EVERY, EVERY)
    randomness = random.Random(f"{host} {begin}")
    failed = 0
    due = at = schedule.first_due(START + begin) - START
    while at < end:
        is_answered = host != dead_host or at not in dead
        ended = at + (RUN_TAKES if is_answered else CONNECT_TIMEOUT)
        yield Run(at, ended, is_answered)
        failed = 0 if is_answered else failed + 1
        due = schedule.next_due(START + due, START + ended, stable=True)[0] - START
        at = due if is_answered else ended + retry_pause(EVERY, failed) * randomness.uniform(0.5, 1.0)


def find_host_lost(week: Week, scrapes: Scrapes) -> float:
    """Return when the exporter finds that the dead host does not answer."""
    host, _ = week.dead_host
    runs = (run for begin, end in scrapes.exporter_runs for run in list_runs(week, host, begin, end))
    return next(run.ended for run in runs if not run.is_answered)


class SimulatedHost:
    """A host with its containers, units and GPUs."""

    def __init__(self, week: Week, host: str, seed: int) -> None:
        self._week, self.host = week, host
        self._random = random.Random(f"{seed} {host}")
        self._cores = 64 if week.has_gpus(host) else 16
        self._services = [name for name, each in sorted(week.inventory.services.items()) if each.host == host]

    def list_metrics(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        """Yield name, value and labels of every series of a host that answers."""
        options = {name for name, each in self._week.inventory.hosts[self.host].collect if each}
        for collector in ALL_COLLECTORS:
            if collector in options:
                success = self._has_all_gpus if collector == "gpu" else 1.0
                yield "host_collect_success", success, {"collector": collector}
        yield from self._system()
        yield from self._filesystems()
        yield from self._containers()
        yield from self._units()
        if "supervisor" in options:
            for program in ("worker", "scheduler"):
                yield "host_program_running", 1.0, {"program": program}
                yield "host_program_finished", 0.0, {"program": program}
        if "gpu" in options:
            yield from self._gpus()

    def _noise(self, mean: float, deviation: float) -> Callable[[float], float]:
        gauss = self._random.gauss
        return lambda at: max(0.0, gauss(mean, deviation))

    def _counter(self, rate: float) -> Callable[[float], float]:
        """Return a counter that grows by about `rate` a second, by day more than at night."""
        begun = self._random.uniform(1e4, 1e6)
        return lambda at: begun + rate * (at + 0.3 * DAY / (2 * math.pi) * (1 - math.cos(2 * math.pi * at / DAY)))

    def _system(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        yield "host_load1", self._load, {}
        yield "host_cpu_count", float(self._cores), {}
        yield "host_memory_total_bytes", 256 * GIB, {}
        yield "host_memory_available_bytes", self._noise(90 * GIB, 8 * GIB), {}
        yield "host_boot_timestamp_seconds", self._boot_time, {}
        yield "host_clock_offset_seconds", self._noise(0.0, 0.01), {}
        yield "host_clock_synchronized", 1.0, {}
        yield "host_oom_kills_total", self._oom_kills, {}
        yield "host_file_descriptors_allocated", self._noise(9000, 500), {}
        yield "host_file_descriptors_limit", 1_000_000.0, {}
        yield "host_conntrack_entries", self._noise(4000, 600), {}
        yield "host_conntrack_limit", 262_144.0, {}
        if self._random.random() < 0.3:
            yield "host_raid_degraded_disks", 0.0, {"device": "md0"}
        for direction in ("receive", "transmit"):
            labels = {"device": "eth0", "direction": direction}
            yield "host_network_packets_total", self._counter(20_000), labels
            yield "host_network_errors_total", self._counter(0.001), labels
        yield "host_disk_io_weighted_seconds_total", self._counter(0.8), {"device": "nvme0n1"}

    def _load(self, at: float) -> float:
        begin = self._week.nightly_load.get(self.host)
        usual = self._cores * max(0.02, self._random.gauss(0.35, 0.08))
        return self._cores * 1.3 if begin is not None and begin <= at % DAY < begin + 30 * MINUTE else usual

    def _boot_time(self, at: float) -> float:
        host, dead = self._week.dead_host
        return START + (dead.end - 30 if host == self.host and at >= dead.end else -30 * DAY)

    def _oom_kills(self, at: float) -> float:
        host, _, killed_at = self._week.oom_kill
        return 2.0 + (host == self.host and at >= killed_at)

    def _filesystems(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        boot = 0.85 if self.host in self._week.high_boot else 0.4
        root, data = self._random.uniform(0.4, 0.75), self._random.uniform(0.5, 0.78)
        for mountpoint, size, used in (
            ("/", 480 * GIB, self._used_of_root(root)),
            ("/boot", 1 * GIB, lambda at: boot),
            ("/data", 4000 * GIB, self._used_of_data(data, 4000 * GIB)),
        ):
            labels = {"mountpoint": mountpoint, "device": f"/dev/{mountpoint.strip('/') or 'root'}", "fstype": "ext4"}
            yield "host_filesystem_size_bytes", size, labels
            yield "host_filesystem_available_bytes", _left(size, used), labels
            yield "host_filesystem_files", 30_000_000.0, labels
            yield "host_filesystem_files_free", 27_000_000.0, labels

    def _growth(self) -> Callable[[float], float]:
        """Return what a disk has grown by since its last weekly rotation."""
        rotated = self._random.uniform(0, WEEK)
        return lambda at: GROWTH * ((at - rotated) % WEEK) / DAY

    def _used_of_root(self, base: float) -> Callable[[float], float]:
        host, full = self._week.full_disk
        growth = self._growth()

        def used(at: float) -> float:
            usual = base + growth(at)
            if self.host != host or not full.begin - FILLS_WITHIN <= at < full.end:
                return usual
            filled = (at - full.begin) / FILLS_WITHIN
            return min(0.99, 0.8 + 0.19 * filled) if filled >= 0 else usual + (0.8 - usual) * (1 + filled)

        return used

    def _used_of_data(self, base: float, size: float) -> Callable[[float], float]:
        download = self._week.downloads.get(self.host)
        growth = self._growth()

        def used(at: float) -> float:
            part = 0.0
            if download is not None and download.begin <= at < download.end + DAY:  # removed a day later
                part = min(1.0, (at - download.begin) / (download.end - download.begin))
            return base + growth(at) + part * DOWNLOAD / size

        return used

    def _containers(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        week = self._week
        for name in self._services:
            yield from self._container_of_service(name)
        for name, runs in week.one_shot.get(self.host, ()):
            listed = Span(runs.begin, _next_time_of_day(runs.end, PRUNED_AT))
            yield from _container(name, listed.__contains__, runs.__contains__, 0.0, "no")

    def _container_of_service(self, name: str) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        week = self._week
        redeploys, exited = week.redeploys[name], week.exited.get(name, ())
        _, killed, killed_at = week.oom_kill
        has_health = name.endswith("-worker")

        def is_replaced(at: float) -> bool:
            return any(span.begin <= at < span.begin + 5 for span in redeploys)

        def is_starting(at: float) -> bool:
            return any(at in span for span in redeploys)

        def runs(at: float) -> bool:
            was_killed = name == killed and killed_at <= at < killed_at + KILLED_FOR
            return not was_killed and not any(at in span for span in exited)

        def is_up(at: float) -> bool:
            return runs(at) and not (has_health and is_starting(at))

        yield from _container(name, lambda at: not is_replaced(at), is_up, 1.0, "unless-stopped", runs)
        restarts = lambda at: None if is_replaced(at) else float(name == killed and at >= killed_at)  # noqa: E731
        yield "host_container_restarts_total", restarts, {"container": name}
        if has_health:
            for health in ("starting", "healthy", "unhealthy"):
                yield "host_container_health", _health(health, runs, is_replaced, is_starting), {
                    "container": name, "health": health,
                }  # fmt: skip

    def _units(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        begin = self._random.uniform(2 * HOUR, 3 * HOUR)
        backup = Span(begin, begin + self._random.uniform(5 * MINUTE, 20 * MINUTE))
        failed = self._week.failed_backup.get(self.host)

        def has_failed(at: float) -> bool:
            return failed is not None and at in failed

        for unit in UNITS:
            if unit == "backup.service":
                yield "host_unit_active", lambda at: float(at % DAY in backup and not has_failed(at)), {"unit": unit}
                finished = lambda at: float(at % DAY not in backup and not has_failed(at))  # noqa: E731
                yield "host_unit_finished", finished, {"unit": unit}
            else:
                yield "host_unit_active", 1.0, {"unit": unit}
                yield "host_unit_finished", 0.0, {"unit": unit}
            yield "host_unit_restarts_total", 0.0, {"unit": unit}
        if self.host in self._week.failed_unit:
            name, span = self._week.failed_unit[self.host]
            yield "host_unit_active", lambda at: 0.0 if at in span else None, {"unit": name}

    def _has_all_gpus(self, at: float) -> float:
        host, _, span = self._week.lost_gpu
        return float(host != self.host or at not in span)

    def _gpus(self) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        yield "gpu_count", lambda at: GPUS - 1 + self._has_all_gpus(at), {}
        for index in range(GPUS):
            yield from self._gpu(index)

    def _gpu(self, index: int) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
        host, lost, span = self._week.lost_gpu
        card = {"gpu": str(index)}

        def is_lost(at: float) -> bool:
            return host == self.host and lost == index and at in span

        def unless_lost(value: float | Callable[[float], float]) -> Callable[[float], float | None]:
            return lambda at: None if is_lost(at) else value(at) if callable(value) else value

        if host == self.host and lost == index:
            last = START + span.begin
            yield "gpu_xid_last_timestamp_seconds", lambda at: last if at >= span.begin else None, {**card, "xid": "79"}
        yield "gpu_healthy", lambda at: float(not is_lost(at)), card
        yield "gpu_utilization_ratio", unless_lost(self._utilization(index)), card
        yield "gpu_memory_total_bytes", unless_lost(80 * GIB), card
        yield "gpu_memory_used_bytes", unless_lost(60 * GIB), card
        for sensor, mean in (("gpu", 66.0), ("memory", 78.0)):
            yield "gpu_temperature_celsius", unless_lost(self._noise(mean, 3.0)), {**card, "sensor": sensor}
        yield "gpu_ecc_errors_total", unless_lost(0.0), {**card, "kind": "uncorrected", "scope": "volatile"}
        for kind in ("pending", "failure"):
            yield "gpu_remapped_rows", unless_lost(0.0), {**card, "kind": kind}
        yield "gpu_recovery_needed", unless_lost(0.0), {**card, "action": "None"}
        for reason in ("hw_slowdown", "hw_power_brake_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown"):
            yield "gpu_throttle_active", unless_lost(0.0), {**card, "reason": reason}

    def _utilization(self, index: int) -> Callable[[float], float]:
        is_idle = (self.host, index) in self._week.idle_gpus
        uniform = self._random.uniform

        def utilization(at: float) -> float:
            is_night = at % DAY >= NIGHT[0] or at % DAY < NIGHT[1]
            return 0.0 if is_idle and is_night else uniform(0.1, 0.95)

        return utilization


def _left(size: float, used: Callable[[float], float]) -> Callable[[float], float]:
    return lambda at: size * (1 - used(at))


def _container(
    name: str,
    exists: Callable[[float], bool],
    is_up: Callable[[float], bool],
    exit_code: float,
    policy: str,
    runs: Callable[[float], bool] | None = None,
) -> Iterator[tuple[str, Value, Mapping[str, str]]]:
    running = runs or is_up
    labels = {"container": name}
    yield "host_container_up", lambda at: float(is_up(at)) if exists(at) else None, labels
    yield "host_container_exit_code", lambda at: exit_code if exists(at) and not running(at) else None, labels
    info = {**labels, "image": "registry/app:1", "restart_policy": policy}
    yield "host_container_info", lambda at: 1.0 if exists(at) else None, info


def _health(
    health: str,
    runs: Callable[[float], bool],
    is_replaced: Callable[[float], bool],
    is_starting: Callable[[float], bool],
) -> Callable[[float], float | None]:
    def value(at: float) -> float | None:
        if is_replaced(at) or not runs(at):
            return None
        return float(health == ("starting" if is_starting(at) else "healthy"))

    return value


def _next_time_of_day(after: float, time_of_day: float) -> float:
    return after + (time_of_day - after) % DAY


def list_series(
    week: Week, host: str, scrapes: Scrapes, seed: int, is_used: Callable[[str], bool]
) -> Iterator[tuple[Labels, list[float | None]]]:
    """Yield the series of a host that are used, with a value, or None, for each minute."""
    observed = _list_observed(week, host, scrapes)
    group = {"host": host, "group": week.inventory.hosts[host].group}
    info = {**group, "address": week.inventory.hosts[host].address}
    is_up: list[float | None] = [None if run is None else float(run.is_answered) for run in observed]
    key_changed: list[float | None] = [0.0 if run is not None and run.is_answered else None for run in observed]
    known: list[float | None] = [1.0 if each else None for each in scrapes.is_exporter_scraped]
    for name, values, labels in (
        ("host_up", is_up, group), ("host_key_changed", key_changed, group), ("host_info", known, info),
    ):  # fmt: skip
        yield as_labels(name, {**labels, **EXPORTER_LABELS}), values
    for name, value, own in SimulatedHost(week, host, seed).list_metrics():
        if is_used(name):
            series = [_evaluate(name, value, run) for run in observed]
            yield as_labels(name, {**own, "host": host, **EXPORTER_LABELS}), series
    for name, counter, own in logs.list_counters(week, host, seed):
        if is_used(name):
            yield as_labels(name, {**own, "host": host, **EXPORTER_LABELS}), _count(scrapes, observed, counter)


def _count(scrapes: Scrapes, observed: Sequence[Run | None], counter: Callable[[float], float]) -> list[float | None]:
    """Return a counter of the exporter: it starts with it, and is kept while the host does not answer."""
    values: list[float | None] = [None] * scrapes.count
    for begin, end in scrapes.exporter_runs:
        counted, first = 0.0, None
        for minute in scrapes.minutes_between(begin, end):
            run = observed[minute]
            if run is not None and run.is_answered:
                first = counter(run.at) if first is None else first
                counted = counter(run.at) - first
            values[minute] = counted if first is not None else None
    return values


def _evaluate(name: str, value: Value, run: Run | None) -> float | None:
    if run is None:
        return None
    if not run.is_answered:
        return 0.0 if name == "host_collect_success" else None
    return value(run.at) if callable(value) else value


def _list_observed(week: Week, host: str, scrapes: Scrapes) -> Sequence[Run | None]:
    """Return for each minute the run that is published."""
    observed: list[Run | None] = [None] * scrapes.count
    for begin, end in scrapes.exporter_runs:
        runs = list_runs(week, host, begin, end)
        current, following = None, next(runs, None)
        for minute in scrapes.minutes_between(begin, end):
            while following is not None and following.ended <= minute * MINUTE:
                current, following = following, next(runs, None)
            observed[minute] = current
    return observed
