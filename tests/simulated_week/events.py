"""What happens in the week: the fleet, its normal life, and the faults. Times are seconds since the week began."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet.inventory.model import Inventory
from tests.support import inventory_of

START = 1_740_960_000  # Monday, 2025-03-03 00:00 UTC
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
WEEK = 7 * DAY
MINUTES = int(WEEK / MINUTE)
HOSTS, SERVICES = 20, 100
HOSTS_SCALED, SERVICES_SCALED = 50, 300
GPU_HOSTS, GPUS = 8, 4
UNITS = ("ssh.service", "docker.service", "chrony.service", "backup.service")

PROBE_FAILS = 2 / 10_000
KILLED_FOR = 10.0  # seconds until docker has restarted a container
REDEPLOYS, REDEPLOY_TAKES = 3, 40.0
ONE_SHOT_A_DAY = 30 * HOSTS // HOSTS_SCALED
IDLE_GPUS = 0.3
RENEWED_AT, LIFETIME = 30 * DAY, 90 * DAY
OUTAGES = tuple(minutes * MINUTE for minutes in (3, 4, 5, 8, 12, 15, 20, 30, 45, 60, 90, 120))


@dataclass(frozen=True)
class Span:
    begin: float
    end: float

    def __contains__(self, at: object) -> bool:
        return isinstance(at, float | int) and self.begin <= at < self.end

    def overlaps(self, other: "Span", margin: float = 0.0) -> bool:
        return self.begin < other.end + margin and other.begin < self.end + margin


@dataclass(frozen=True)
class Fault:
    """A fault that one of `alerts`, with these labels, must notify within `within` seconds."""

    name: str
    span: Span
    alerts: frozenset[str]
    labels: Mapping[str, str]
    within: float


@dataclass(frozen=True)
class Effect:
    """Alerts with these labels that begin in this time are caused by a fault."""

    fault: str
    alerts: frozenset[str]
    labels: Mapping[str, str]
    span: Span


# How soon each kind of fault is notified, as docs/alerts.md says: the time of the alert, one minute for the run of a
# collector or the evaluation, and one for the scrape.
WITHIN: Mapping[str, float] = {
    "ServiceDown": 3 * MINUTE,
    "HostDown": 3 * MINUTE,
    "HostDiskFull": 7 * MINUTE,
    "GPUMissing": 4 * MINUTE,
    "GPUUnhealthy": 3 * MINUTE,
    "HostOOMKill": 2 * MINUTE,
    "HostUnitFailed": 4 * MINUTE,
    "CertificateExpired": 2 * MINUTE,
    "ExporterDown": 3 * MINUTE,
    "GatewayUpstreamFailing": 4 * MINUTE,
}


@dataclass
class Week:
    """Everything that happens. `down` are the outages of services, `exited` those in which the container exits."""

    inventory: Inventory
    faults: list[Fault] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    redeploys: dict[str, list[Span]] = field(default_factory=dict)
    down: dict[str, list[Span]] = field(default_factory=dict)
    exited: dict[str, list[Span]] = field(default_factory=dict)
    expires: dict[str, float] = field(default_factory=dict)  # at the beginning of the week, by service
    renewed: dict[str, list[float]] = field(default_factory=dict)
    one_shot: dict[str, list[tuple[str, Span]]] = field(
        default_factory=dict
    )  # by host: container, time in which it runs
    failed_unit: dict[str, tuple[str, Span]] = field(default_factory=dict)  # by host
    failed_backup: dict[str, Span] = field(default_factory=dict)
    high_boot: set[str] = field(default_factory=set)
    nightly_load: dict[str, float] = field(default_factory=dict)  # by host: time of day
    downloads: dict[str, Span] = field(default_factory=dict)
    idle_gpus: set[tuple[str, int]] = field(default_factory=set)
    dead_host: tuple[str, Span] = ("", Span(0, 0))
    full_disk: tuple[str, Span] = ("", Span(0, 0))
    lost_gpu: tuple[str, int, Span] = ("", 0, Span(0, 0))
    oom_kill: tuple[str, str, float] = ("", "", 0.0)  # host, container, when
    exporter_restarts: list[Span] = field(default_factory=list)
    dead_exporter: Span = Span(0, 0)
    dead_upstream: Span = Span(0, 0)
    lost_scrapes: set[int] = field(default_factory=set)  # minutes
    pause: Span = Span(0, 0)

    @property
    def exporter_gaps(self) -> list[Span]:
        return sorted([*self.exporter_restarts, self.dead_exporter], key=lambda span: span.begin)

    def has_gpus(self, host: str) -> bool:
        return host.startswith("gpu-")


def write_configuration(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in which everything but `probe` is as shipped."""
    hosts: dict[str, Any] = {}
    services: dict[str, Any] = {}
    for number in range(1, HOSTS + 1):
        gpu = number <= GPU_HOSTS
        name = f"gpu-{number:02}" if gpu else f"web-{number - GPU_HOSTS:02}"
        hosts[name] = {"address": f"10.0.0.{number}", "group": "gpu" if gpu else "web"}
        if gpu:
            hosts[name]["collect"] = {"gpu": "30s"}
        if number in (HOSTS - 1, HOSTS):
            hosts[name]["collect"] = {"supervisor": {"every": "30s"}}
        services |= {f"{name}-{kind}": {"host": name, "probe": each} for kind, each in _probes(name, gpu).items()}
    collect = {"system": "30s", "docker": "30s", "systemd": {"every": "30s", "units": list(UNITS)}}
    ssh = {"user": "defib", "key_file": "/etc/hostname", "known_hosts": "/etc/hostname"}
    defaults = {"host": {"ssh": ssh, "collect": collect}, **({"probe": dict(probe)} if probe else {})}
    return {"defaults": defaults, "hosts": hosts, "services": services}


def _probes(host: str, gpu: bool) -> dict[str, dict[str, Any]]:
    url = "http://{host.address}:8000/v1"
    model = {"every": "5m", "timeout": "60s", "openai": {"url": url, "model": "qwen3-32b"}}
    return {
        "gateway": {"http": {"url": "https://{host.address}/health"}},
        "api": {"http": {"url": "http://{host.address}:8080/health"}},
        "worker": {"container": {"name": f"{host}-worker"}},
        "cache": {"tcp": {"address": "{host.address}:6379"}},
        "app": model if gpu else {"http": {"url": "http://{host.address}:8081/"}},
    }


def plan(folder: Path, seed: int, probe: Mapping[str, Any] | None = None) -> Week:
    """Return a week; the same seed gives the same one."""
    randomness = random.Random(seed)
    week = Week(inventory_of(folder, write_configuration(probe or {})).inventory)
    _plan_gaps(week, randomness)
    _plan_faults(week, randomness)
    _plan_normal_life(week, randomness)
    return week


def _plan_gaps(week: Week, randomness: random.Random) -> None:
    """The exporter restarts twice, Prometheus loses five scrapes and pauses once."""
    for day in (1, 4):
        begin = day * DAY + 11 * HOUR + randomness.uniform(0, HOUR)
        week.exporter_restarts.append(Span(begin, begin + 30.0))
    week.lost_scrapes = {int(day * 1440 + randomness.randrange(1440)) for day in (0, 2, 3, 5, 6)}
    begin = 3 * DAY + 6 * HOUR + randomness.uniform(0, HOUR)
    week.pause = Span(begin, begin + 100.0)


def _plan_faults(week: Week, randomness: random.Random) -> None:
    """Each at its own time, on hosts and services of its own."""
    hosts = sorted(week.inventory.hosts)
    gpus = [name for name in hosts if week.has_gpus(name)]
    web = [name for name in hosts if not week.has_gpus(name)]
    randomness.shuffle(gpus)
    randomness.shuffle(web)
    dead, full, oom, backup, certificate = web[:5]
    lost = gpus[0]
    _plan_dead_host(week, dead, 1 * DAY + 15 * HOUR + randomness.uniform(0, HOUR))
    begin = 2 * DAY + 9 * HOUR + randomness.uniform(0, HOUR)  # 80 % are used, and it fills up
    week.full_disk = full, Span(begin, begin + 90 * MINUTE)
    _add(week, "full disk", Span(begin, begin + 90 * MINUTE), ["HostDiskFull"], {"host": full, "mountpoint": "/"})
    begin = 2 * DAY + 14 * HOUR + randomness.uniform(0, HOUR)
    gpu = randomness.randrange(GPUS)
    week.lost_gpu = lost, gpu, Span(begin, begin + 3 * HOUR)
    _add(
        week, "lost GPU", Span(begin, begin + 3 * HOUR), ["GPUMissing", "GPUUnhealthy"], {"host": lost},
        ["GPUErrors", "HostCollectFailing"],
    )  # fmt: skip
    begin = 3 * DAY + 13 * HOUR + randomness.uniform(0, HOUR)
    week.oom_kill = oom, f"{oom}-worker", begin
    _add(week, "OOM-killed container", Span(begin, begin + 15 * MINUTE), ["HostOOMKill"], {"host": oom})
    begin = 4 * DAY + 3 * HOUR + 10 * MINUTE
    week.failed_backup[backup] = Span(begin, begin + DAY - 10 * MINUTE)
    _add(
        week,
        "failed backup",
        week.failed_backup[backup],
        ["HostUnitFailed"],
        {"host": backup, "unit": "backup.service"},
    )
    begin = 5 * DAY + 10 * HOUR + randomness.uniform(0, HOUR)
    gateway = f"{certificate}-gateway"
    span = Span(begin, begin + 2 * HOUR)
    week.expires[gateway], week.renewed[gateway] = span.begin, [span.end]
    labels = {"service": gateway}
    _add(week, "expired certificate", span, ["CertificateExpired"], labels, ["ServiceDown"])
    # It was not renewed, about which people are notified before.
    before = Span(0.0, span.begin)
    week.effects.append(Effect("expired certificate", frozenset({"CertificateExpiring"}), labels, before))
    begin = 6 * DAY + 10 * HOUR + randomness.uniform(0, HOUR)
    week.dead_exporter = Span(begin, begin + 12 * MINUTE)
    _add(week, "dead exporter", week.dead_exporter, ["ExporterDown"], {})
    begin = 1 * DAY + 10 * HOUR
    week.dead_upstream = Span(begin, begin + 30 * MINUTE)
    _add(week, "dead model API", week.dead_upstream, ["GatewayUpstreamFailing"], {"provider": "nvidia"})
    _plan_outages(week, randomness, {dead, full, oom, backup, certificate, lost})


def _add(
    week: Week, name: str, span: Span, alerts: Sequence[str], labels: Mapping[str, str], causes: Sequence[str] = (),
    *, slow: float = 0.0, after: float = 10 * MINUTE,
) -> None:  # fmt: skip
    """Add a fault. It may also cause the alerts `causes`, until `after` its end. `slow` is added to the time allowed."""
    within = min(WITHIN[alert] for alert in alerts) + slow
    week.faults.append(Fault(name, span, frozenset(alerts), labels, within))
    week.effects.append(Effect(name, frozenset([*alerts, *causes]), labels, Span(span.begin, span.end + after)))


def _plan_dead_host(week: Week, host: str, begin: float) -> None:
    span = Span(begin, begin + 40 * MINUTE)
    week.dead_host = host, span
    causes = ["ServiceDown", "HostRebooted", "HostContainerDown", "HostUnitFailed", "HostShellFailing"]
    # The exporter connects less often to a host that has been down for long.
    _add(week, "dead host", span, ["HostDown"], {"host": host}, causes, after=25 * MINUTE)


def _plan_outages(week: Week, randomness: random.Random, avoided: set[str]) -> None:
    """One service each; in every other one, its container exits, otherwise the service hangs."""
    services = [name for name, each in sorted(week.inventory.services.items()) if each.host not in avoided]
    randomness.shuffle(services)
    for number, takes in enumerate(OUTAGES):
        # A service that is probed every five minutes cannot be seen to fail for three.
        name = next(each for each in services if week.inventory.services[each].probe.every * 3 <= takes)
        services.remove(name)
        span = Span(0.0, 0.0)
        while not span.end or any(span.overlaps(gap, 20 * MINUTE) for gap in [*week.exporter_gaps, week.pause]):
            begin = randomness.uniform(HOUR, WEEK - 4 * HOUR)
            span = Span(begin, begin + takes)
        week.down[name] = [span]
        service = week.inventory.services[name]
        is_slow = service.probe.every > MINUTE
        slow = service.probe.every + service.probe.timeout * service.probe.fail_after if is_slow else 0.0
        fault = f"outage of {takes / MINUTE:.0f} min"
        _add(week, fault, span, ["ServiceDown"], {"service": name}, ["ServiceErrorBudgetBurn"], slow=slow)
        of_logs = frozenset({"HTTPErrorRatio", "LogErrors"})
        week.effects.append(
            Effect(fault, of_logs, {"host": service.host or ""}, Span(span.begin, span.end + 10 * MINUTE))
        )
        if number % 2 == 0 or name.endswith("-worker"):
            week.exited[name] = [span]
            labels = {"host": service.host, "container": name}
            week.effects.append(Effect(fault, frozenset({"HostContainerDown"}), labels, span))


def _plan_normal_life(week: Week, randomness: random.Random) -> None:
    hosts = sorted(week.inventory.hosts)
    for name in week.inventory.services:
        begins = sorted(randomness.uniform(0, WEEK - HOUR) for _ in range(REDEPLOYS))
        week.redeploys[name] = [Span(begin, begin + REDEPLOY_TAKES) for begin in begins]
        if name.endswith("-gateway") and name not in week.expires:
            left = randomness.uniform(RENEWED_AT, LIFETIME)
            week.expires[name] = left
            week.renewed[name] = [left - RENEWED_AT]
    for day in range(7):
        for number in range(ONE_SHOT_A_DAY):
            begin = day * DAY + randomness.uniform(0, DAY - HOUR)
            span = Span(begin, begin + randomness.uniform(MINUTE, 30 * MINUTE))
            week.one_shot.setdefault(randomness.choice(hosts), []).append((f"job-{day}-{number}", span))
    quiet = [name for name in hosts if name not in (week.dead_host[0], week.full_disk[0])]
    for name in randomness.sample(quiet, HOSTS // 20):
        begin = 5 * DAY + randomness.uniform(0, DAY / 2)
        week.failed_unit[name] = "fwupd-refresh.service", Span(begin, begin + DAY)
    week.high_boot = set(randomness.sample(hosts, HOSTS // 10))
    week.nightly_load = {name: randomness.uniform(HOUR, 4 * HOUR) for name in randomness.sample(hosts, HOSTS // 5)}
    gpus = [name for name in hosts if week.has_gpus(name)]
    for name in gpus:
        begin = randomness.uniform(0, WEEK - 2 * DAY)
        week.downloads[name] = Span(begin, begin + 25 * MINUTE)
    cards = [(name, index) for name in gpus for index in range(GPUS)]
    week.idle_gpus = set(randomness.sample(cards, round(len(cards) * IDLE_GPUS)))
