"""When the remediator pings, and when the watcher outside misses a ping."""

from dataclasses import replace

import pytest

from defib.deadman.watch import Watch, check_deadline, list_due, receive_ping, record_notified
from remediator.engine.dead_man import Pipeline, find_problem

WORKS = Pipeline(watchdog_age=20.0, channels=("ops", "mail"), outcomes={"ops": "sent", "mail": "sent"})


@pytest.mark.parametrize(
    ("pipeline", "problem"),
    [
        (WORKS, ""),
        (replace(WORKS, unreadable={"exporter": "ConnectError"}), "exporter: ConnectError"),
        (replace(WORKS, watchdog_age=None), "Watchdog: none was received"),
        (replace(WORKS, watchdog_age=301.0), "Watchdog: none was received for 301 s"),
        (replace(WORKS, watchdog_resolved=True), "Watchdog: Alertmanager reported it as resolved, or does not have it"),
        (replace(WORKS, channels=()), "channels: none is configured"),
        (replace(WORKS, outcomes={}), ""),  # nothing was sent yet
        (replace(WORKS, outcomes={"ops": "retry", "mail": "sent"}), ""),
        (replace(WORKS, outcomes={"ops": "retry", "mail": "resend"}), ""),
        (replace(WORKS, outcomes={"ops": "retry"}), ""),
        (
            replace(WORKS, outcomes={"ops": "retry", "mail": "reject"}),
            "channels: the last message failed on each of ops, mail",
        ),
    ],
)
def test_a_ping_is_sent_while_a_failure_would_reach_somebody(pipeline: Pipeline, problem: str) -> None:
    assert find_problem(pipeline, 300.0) == problem


def test_without_the_check_of_the_watchdog_none_is_required() -> None:
    assert find_problem(replace(WORKS, watchdog_age=None), 0.0) == ""


@pytest.mark.parametrize(
    ("watch", "now", "started", "missing_since"),
    [
        (Watch(0.0), 299.0, 0.0, None),
        (Watch(0.0), 300.0, 0.0, 0.0),  # none has ever arrived
        (Watch(0.0, 1000.0), 1299.0, 0.0, None),
        (Watch(0.0, 1000.0), 1300.0, 0.0, 1000.0),
        (Watch(0.0, 1000.0), 9000.0, 8950.0, None),  # it did not run meanwhile: a ping may arrive now
        (Watch(0.0, 1000.0), 9040.0, 8950.0, 1000.0),
        (Watch(0.0, 5000.0), 1200.0, 0.0, None),  # the system time was set back
    ],
)
def test_a_ping_is_missing_after_its_deadline(
    watch: Watch, now: float, started: float, missing_since: float | None
) -> None:
    assert check_deadline(watch, now, 300.0, started).missing_since == missing_since


def test_each_channel_is_notified_once_of_both() -> None:
    channels = ["ops", "mail"]
    watch = check_deadline(Watch(0.0, 1000.0), 1300.0, 300.0, 0.0)
    assert list_due(watch, channels) == channels
    watch = record_notified(watch, "ops", missing=True)
    assert check_deadline(watch, 2000.0, 300.0, 0.0) == watch
    assert list_due(watch, channels) == ["mail"]
    watch = receive_ping(watch, 2100.0)
    assert (watch.is_missing, watch.returned_at) == (False, 2100.0)
    assert list_due(watch, channels) == ["ops"]  # the other one has not been notified of what is over
    watch = record_notified(watch, "ops", missing=False)
    assert list_due(receive_ping(watch, 2160.0), channels) == []
    assert check_deadline(watch, 2400.0, 300.0, 0.0).missing_since == 2100.0
