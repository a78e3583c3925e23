"""Runs the week: writes its series, evaluates the rules, and reports."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.simulated_week import gateway, hosts, programs, services
from tests.simulated_week.evaluation import Evaluation, list_scraped, read_rules, select_needed
from tests.simulated_week.events import Week, plan
from tests.simulated_week.notifications import list_notifications
from tests.simulated_week.report import Report, make_report
from tests.simulated_week.scrapes import Scrapes
from tests.simulated_week.store import Labels, Store, running_prometheus, with_markers

# What rules use and nothing in this week publishes, with the reason.
ABSENT = {
    "service_probe_slow_seconds": "no service has a limit of its own",
    "service_objective_ratio": "no service has an objective of its own",
    "service_threshold": "no service has thresholds of its own",
    "service_probing_paused": "nobody pauses probing",
    "service_component_up": "no service has a status page",
    "host_threshold": "no host has thresholds of its own",
    "gpu_expected_count": "no host has a configured number of GPUs",
    "gpu_retired_pages": "GPUs since 2020 remap rows instead",
    "defib_service_source_success": "no services from servers",
    "defib_remediator_webhook_refusals_total": "no request was rejected",
    "defib_remediator_breaker_open": "no service is restarted automatically",
    **{
        f"agent_{name}": "no service is an agent"
        for name in (
            "idle", "last_progress_timestamp_seconds", "waiting_since_timestamp_seconds", "pending_tasks", "rounds_used",
            "rounds_limit", "rounds_warn_ratio", "llm_requests_total", "stuck_after_seconds", "confirm_after_seconds",
            "dependency_wait_seconds",
        )
    },
}  # fmt: skip


def list_all_series(
    week: Week, scrapes: Scrapes, seed: int, is_used: Callable[[str], bool]
) -> Iterator[tuple[Labels, list[float | None]]]:
    lost_at = hosts.find_host_lost(week, scrapes)
    yield from programs.list_series(week, scrapes)
    yield from gateway.list_series(week, scrapes, seed)
    for host in week.inventory.hosts:
        yield from hosts.list_series(week, host, scrapes, seed, is_used)
    for service in week.inventory.services.values():
        host_lost_at = lost_at if service.host == week.dead_host[0] else None
        yield from services.list_series(week, service, scrapes, seed, host_lost_at, is_used)


def write_series(store: Store, week: Week, scrapes: Scrapes, seed: int, used: frozenset[str]) -> None:
    written: set[str] = set()
    for labels, values in list_all_series(week, scrapes, seed, used.__contains__):
        name = dict(labels)["__name__"]
        if name in used:
            store.add(labels, *with_markers(scrapes.times, values, scrapes.is_running))
            written.add(name)
    store.flush()
    assert used - written == ABSENT.keys(), f"{used - written ^ ABSENT.keys()}: not published, or not absent"


def run_week(
    folder: Path, seed: int, probe: Mapping[str, Any] | None = None, progress: Callable[[str], None] = lambda text: None
) -> Report:
    """Simulate a week in `folder`. `probe` replaces defaults of probes."""
    week = plan(folder / "configuration", seed, probe)
    scrapes = Scrapes(week)
    steps = select_needed(read_rules())
    begun = time.monotonic()

    def show(text: str) -> None:
        progress(f"{time.monotonic() - begun:6.1f} s  {text}")

    with running_prometheus(folder) as store, ThreadPoolExecutor(2) as pool:
        write_series(store, week, scrapes, seed, list_scraped(rule for step in steps for rule in step))
        show(f"{store.samples / 1e6:.1f} million samples written")
        evaluation = Evaluation(store, scrapes)
        *recorded, alerts = steps
        for step in recorded:
            list(pool.map(evaluation.record, step))
            show(f"recorded: {', '.join(sorted({rule.name for rule in step}))}")
        episodes = [each for found in pool.map(evaluation.list_episodes, alerts) for each in found]
        show("all alerts evaluated")
    notifications = list_notifications(episodes, week.inventory)
    for each in notifications:
        labels = {
            name: value for name, value in each.labels.items() if name not in ("alertname", "provider", "category")
        }
        progress(
            f"day {each.minute // 1440 + 1} {each.minute // 60 % 24:02}:{each.minute % 60:02}  {each.alert} {labels}"
        )
    return make_report(week, notifications, evaluation.nearly)
