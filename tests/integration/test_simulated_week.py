"""The simulated week, and whether it simulates what Defib does."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from exporter.scheduler import collector_scheduler
from tests.simulated_week import gateway, hosts, logs, programs, services
from tests.simulated_week.evaluation import Episode, Evaluation, Rule, list_scraped, read_rules, select_needed
from tests.simulated_week.events import MINUTES, Week, plan
from tests.simulated_week.hosts import SimulatedHost
from tests.simulated_week.notifications import list_notifications
from tests.simulated_week.run import ABSENT, run_week
from tests.simulated_week.scrapes import EXPORTER_LABELS, Scrapes
from tests.simulated_week.store import as_labels, running_prometheus

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
GIB = 2.0**30


@pytest.fixture(name="week")
def week_of_seed_1(tmp_path: Path) -> Week:
    return plan(tmp_path / "configuration", seed=1)


@pytest.mark.long
@pytest.mark.needs("prometheus")
@pytest.mark.timeout(2400)
def test_a_week_has_few_needless_notifications_and_every_fault_is_notified_in_time(tmp_path: Path) -> None:
    report = run_week(tmp_path, seed=1)
    shown = "\n".join(report.lines())
    assert report.is_good, shown
    assert len(report.faults) == 20, shown
    # What is normal reaches the rules: they wait long enough.
    for alert, minutes in (
        ("HostLoadHigh", 25),
        ("GPUIdleHeld", 500),
        ("HostContainerDown", 1),
        ("HTTPErrorRatio", 3),
        ("GatewayQueueLong", 3),
    ):
        active, pending = report.nearly[alert]
        assert minutes <= active < pending, shown


def list_documented_labels() -> Mapping[str, set[str]]:
    """Return the labels of each metric of collectors, beside those of its host or GPU."""
    rows = re.findall(r"^\| `((?:host|gpu)_\w+)(?:\{([\w, ]+)\})?`", DOCS.read_text(), re.MULTILINE)
    return {name: set(filter(None, labels.split(", "))) for name, labels in rows}


def test_hosts_publish_what_the_exporter_does(week: Week) -> None:
    published = {family.name for family in collector_scheduler.FAMILIES}
    documented = list_documented_labels()
    for host in week.inventory.hosts:
        for name, _, labels in (
            *SimulatedHost(week, host, seed=1).list_metrics(),
            *logs.list_counters(week, host, seed=1),
        ):
            is_of_gpu = name.startswith("gpu_") and name != "gpu_count"
            assert name in published
            assert set(labels) == documented[name] | ({"gpu"} if is_of_gpu else set()), name


def list_published(week: Week) -> Iterator[str]:
    """Yield the names of all series, with those of a few services for all of them."""
    scrapes = Scrapes(week)
    series = [programs.list_series(week, scrapes), gateway.list_series(week, scrapes, 1)]
    for host in week.inventory.hosts:
        series.append(hosts.list_series(week, host, scrapes, 1, lambda name: False))
        yield from (name for name, _, _ in SimulatedHost(week, host, seed=1).list_metrics())
        yield from (name for name, _, _ in logs.list_counters(week, host, seed=1))
    (expired,) = (fault.labels["service"] for fault in week.faults if fault.name == "expired certificate")
    series.extend(
        services.list_series(week, service, scrapes, 1, None, lambda name: True)
        for service in week.inventory.services.values()
        if service.id == expired or service.host == "gpu-01"
    )
    yield from (dict(labels)["__name__"] for each in series for labels, _ in each)


def test_what_rules_use_is_published_or_absent_for_a_reason(week: Week) -> None:
    used = list_scraped(rule for step in select_needed(read_rules()) for rule in step)
    assert used - set(list_published(week)) == ABSENT.keys()


def of_alert(name: str) -> Iterator[list[Rule]]:
    """Yield the rules of an alert, after those that it needs."""
    yield from select_needed([rule for rule in read_rules() if not rule.is_alert or rule.name == name])


@pytest.mark.needs("prometheus")
def test_an_alert_that_uses_its_own_past_fires_and_ends_as_documented(week: Week, tmp_path: Path) -> None:
    """A disk fires after five minutes above 80 %, and ends at 78 %."""
    scrapes = Scrapes(week)
    used = [0.5] * 100 + [0.81] * 20 + [0.79] * 20 + [0.77] * (MINUTES - 140)
    labels = {"host": "h", "mountpoint": "/", "device": "/dev/a", "fstype": "ext4", **EXPORTER_LABELS}
    with running_prometheus(tmp_path) as store:
        store.add(as_labels("host_filesystem_size_bytes", labels), scrapes.times, [100 * GIB] * MINUTES)
        left = [100 * GIB * (1 - each) for each in used]
        store.add(as_labels("host_filesystem_available_bytes", labels), scrapes.times, left)
        store.flush()
        evaluation = Evaluation(store, scrapes)
        *recorded, alerts = of_alert("HostDiskFull")
        for rule in (rule for step in recorded for rule in step):
            evaluation.record(rule)
        episodes = [episode for rule in alerts for episode in evaluation.list_episodes(rule)]
    (warning,) = episodes
    assert (warning.labels["severity"], warning.begin, warning.end) == ("warning", 105, 140)


@pytest.mark.needs("prometheus")
def test_a_recorded_series_can_use_its_own_past(week: Week, tmp_path: Path) -> None:
    """When a host last answered is kept while it does not."""
    scrapes = Scrapes(week)
    (rule,) = (rule for rule in read_rules() if rule.name == "host:last_up_timestamp_seconds:max")
    host = {"host": "h", "group": "g"}
    with running_prometheus(tmp_path) as store:
        up = [1.0] * 50 + [0.0] * 50 + [1.0] * (MINUTES - 100)
        store.add(as_labels("host_up", {**host, **EXPORTER_LABELS}), scrapes.times, up)
        store.add(as_labels("host:up:max", host), scrapes.times, up)
        store.flush()
        Evaluation(store, scrapes).record(rule)
        asked = [scrapes.times[minute] for minute in (49, 75, 99, 100)]
        found = [
            float(value)
            for at in asked
            for _, points in store.query_range(rule.name, at, at, 60)
            for _, value in points
        ]
    assert found == [asked[0], asked[0], asked[0], asked[3]]


def alert(name: str, begin: int, end: int, **labels: str) -> Episode:
    return Episode({"alertname": name, **labels}, begin, end)


@pytest.mark.parametrize(
    ("episodes", "sent"),
    [
        pytest.param(
            [
                alert("HostDown", 10, 40, severity="critical", host="h"),
                alert("HostUnitFailed", 5, 30, severity="warning", host="h", unit="a"),
                alert("HostUnitFailed", 12, 50, severity="warning", host="h", unit="b"),
                alert("HostUnitFailed", 12, 50, severity="warning", host="other", unit="b"),
                alert("HostUnitFailed", 12, 30, severity="warning", host="h", unit="c"),
            ],
            [(5, "a"), (10, ""), (12, "b"), (40, "b")],
            id="what is muted is sent when it no longer is",
        ),
        pytest.param(
            [
                alert("ServiceDown", 10, 20, severity="critical", service="gpu-01-api", host="gpu-01"),
                alert("ServiceDown", 20, 22, severity="warning", service="gpu-01-api", host="gpu-01"),
                alert("ServiceDown", 30, 40, severity="critical", service="gpu-01-api", host="gpu-01"),
            ],
            [(10, ""), (30, "")],
            id="an incident that is open has its card",
        ),
        pytest.param(
            [
                alert("HostUnitFailed", 5, 20, severity="warning", host="h", unit="a"),
                alert("ExporterDown", 15, 25, severity="critical"),
                alert("HostUnitFailed", 27, 60, severity="warning", host="h", unit="a"),
                alert("HostUnitFailed", 80, 90, severity="warning", host="h", unit="a"),
            ],
            [(5, "a"), (15, ""), (80, "a")],
            id="the end of an alert is held while the exporter is down",
        ),
        pytest.param([alert("Watchdog", 0, 100, severity="info")], [], id="the Watchdog is no notification"),
    ],
)
def test_what_people_are_sent(week: Week, episodes: list[Episode], sent: list[tuple[int, str]]) -> None:
    found = list_notifications(episodes, week.inventory)
    assert [(each.minute, each.labels.get("unit", "")) for each in found] == sent
