"""Identity of alerts, their ends, and the evidence that an end needs; with a real record."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from remediator.clients.alerts import Alert, AlertList
from remediator.engine import reminders
from remediator.incidents import alert_limits, intake, reconciliation
from remediator.incidents.alert_starts import MAX_STARTS, add_received_copy, normalize_starts_at
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.record import arrivals, retention, situations
from remediator.record.events import StateChange, store_copied
from remediator.record.schema import alerts, timeline
from remediator.record.transaction import Transaction
from tests.integration import test_record
from tests.integration.test_record import DOWN, Record

record = test_record.record
WATCHDOG = Alert("w", "1", "", "firing", {"alertname": "Watchdog", "severity": "info"}, {})
RESOLVED_WATCHDOG = replace(WATCHDOG, status="resolved")


def at(second: float) -> str:
    return datetime.fromtimestamp(1_800_000_000 + second, UTC).isoformat()


def disk(status: Any = "firing", starts: float = 1, name: str = "HostDiskFull") -> Alert:
    labels = {"alertname": name, "host": "h", "severity": "critical"}
    return Alert(f"{name}-h", at(starts), "", status, labels, {})


def web(status: Any = "firing", starts: float = 1) -> Alert:
    labels = {"alertname": "ServiceDown", "service": "web", "severity": "critical"}
    return Alert("ServiceDown-web", at(starts), "", status, labels, {})


async def rows(record: Record) -> Sequence[Any]:
    return await record.database.read(lambda tx: tx.execute(select(alerts).order_by(alerts.c.id)).all())


async def firing(record: Record) -> list[str]:
    def names(tx: Transaction) -> list[str]:
        return list(tx.scalars(select(alerts.c.name).where(alerts.c.status == "firing").order_by(alerts.c.id)))

    return await record.database.write(names)


async def test_two_starts_of_a_fingerprint_are_one_alert_until_both_are_resolved(record: Record) -> None:
    await record.deliver(disk(starts=1))
    await record.deliver(disk(starts=20))
    await record.deliver(disk("resolved", starts=1))
    assert await firing(record) == ["HostDiskFull"]
    assert await record.notified() == ["alert"]
    await record.deliver(disk("resolved", starts=20))
    assert (await firing(record), await record.notified()) == ([], ["alert", "alert_over"])


async def test_starts_that_alertmanager_merged_are_resolved_with_the_earlier_one(record: Record) -> None:
    await record.deliver(disk(starts=20))
    await record.deliver(disk(starts=1))
    await record.deliver(disk("resolved", starts=1))
    assert (await firing(record), await record.notified()) == ([], ["alert", "alert_over"])
    await record.deliver(disk("firing", starts=300))  # another
    assert await record.notified() == ["alert", "alert_over", "alert"]
    await record.deliver(disk("firing", starts=1))  # a late copy of the first
    await record.deliver(disk("resolved", starts=300))
    assert await firing(record) == []


async def test_several_starts_for_a_service_are_one_incident_and_one_notification(record: Record) -> None:
    for starts in (20, 1, 40):
        await record.deliver(web(starts=starts))
    assert (await record.open(), await record.notified()) == ([(1, "web")], ["down"])


times = st.integers(0, 5).map(lambda second: normalize_starts_at(at(second)))


@given(st.lists(st.tuples(times, st.sampled_from(["firing", "resolved"]))))
def test_an_alert_fires_while_one_of_its_starts_does(copies: Sequence[tuple[str, Any]]) -> None:
    starts: dict[str, bool] = {}
    for start, status in copies:
        known, before = start in starts, [each for each, fires in starts.items() if fires]
        starts = add_received_copy(starts, start, status)
        assert starts[start] == (status == "firing")
        if status == "firing":
            assert any(starts.values())
        elif known:
            assert [each for each, fires in starts.items() if fires] == [each for each in before if each != start]


def test_starts_of_webhook_and_api_are_normalized_to_the_same() -> None:
    assert normalize_starts_at("2026-11-22T03:39:44.743142112Z") == normalize_starts_at("2026-11-22T03:39:44.743Z")
    assert normalize_starts_at("whenever") == "whenever"


async def test_a_copy_after_the_end_is_in_doubt_until_the_exporter_was_queried(record: Record) -> None:
    await record.deliver(web())
    await record.deliver(web("resolved"))
    assert await record.close(1)
    await record.deliver(web())
    assert await record.database.write(reconciliation.read_open_questions) == (False, ["web"])
    for down, expected in ((False, ["down", "recovered"]), (True, ["down", "recovered", "down"])):
        await record.database.write(reconciliation.settle_doubts, "web", down=down)
        assert await record.database.write(reconciliation.read_open_questions) == (False, [])
        assert await record.notified() == expected
        await record.deliver(web())


async def test_an_alert_that_fires_again_with_one_start_is_resolved_with_that_start(record: Record) -> None:
    await record.deliver(web(starts=1))
    await record.deliver(web(starts=20))
    for starts in (1, 20):
        await record.deliver(web("resolved", starts=starts))
    await record.deliver(web(starts=20))  # in doubt, because it had ended
    await record.database.write(reconciliation.settle_doubts, "web", down=True)
    assert await firing(record) == ["ServiceDown"]
    await record.deliver(web("resolved", starts=20))
    assert await firing(record) == []


async def test_a_copy_in_doubt_that_is_resolved_is_no_longer_in_doubt(record: Record) -> None:
    await record.deliver(web())
    await record.deliver(web("resolved"))
    await record.deliver(web())
    await record.deliver(web("resolved"))
    assert await record.database.write(reconciliation.read_open_questions) == (False, [])


async def test_without_alertmanager_exporter_down_is_resolved_if_it_is_not_repeated(record: Record) -> None:
    """Its resolved webhook was lost, and it holds the ends of others. A response of the exporter is no evidence."""
    await record.deliver(disk(name="ExporterDown"))
    await record.deliver(disk())
    await record.deliver(disk("resolved"))
    assert await firing(record) == ["ExporterDown", "HostDiskFull"]
    nothing: frozenset[str] = frozenset()
    for later, over in ((reconciliation.INHIBITING_EXPIRES - 100, 0), (200, 1)):
        record.now += later
        known = nothing, nothing, record.now - 300
        assert await record.database.write(reconciliation.resolve_recovered, *known) == over
    await record.database.write(reconciliation.release_held_ends, None)
    assert await firing(record) == []


async def test_a_late_copy_is_ignored_and_a_later_one_fires_again(record: Record) -> None:
    await record.deliver(disk())
    await record.deliver(disk("resolved"))
    await record.deliver(disk())
    assert await firing(record) == []
    record.now += intake.LATE_COPY
    await record.deliver(disk())
    assert await record.notified() == ["alert", "alert_over", "alert"]


def numbered(number: int, name: str = "Foreign", status: Any = "firing", **labels: str) -> Alert:
    labels = {"alertname": name, "severity": "info", **labels}
    return Alert(f"{name} {number} {labels}", "1", "", status, labels, {})


async def test_alerts_that_are_open_at_once_are_limited(record: Record) -> None:
    """Whoever has the webhook token can send any number of alerts."""
    foreign = [numbered(n) for n in range(alert_limits.MAX_FOREIGN + 5)]
    of_service = [numbered(n, "Slow", service="web", host="h") for n in range(alert_limits.MAX_OF_SUBJECT + 7)]

    async def refused(*alerts: Alert) -> int:
        return await record.database.write(intake.receive_alerts, alerts)

    assert [await refused(*foreign), await refused(*of_service)] == [5, 7]
    assert await refused(*foreign[:10]) == 0  # these are open already
    assert await add_listed(record, listing(foreign[-1])) == 0
    await record.deliver(WATCHDOG, replace(foreign[0], status="resolved"))
    record.now += arrivals.SPAN
    assert await record.database.write(reconciliation.release_held_ends, record.now) == 1
    assert await refused(*foreign[-2:]) == 1
    assert await refused(web(), numbered(1, "ExporterDown"), numbered(2, "HostDown", host="h")) == 0
    assert (await firing(record))[-3:] == ["ServiceDown", "ExporterDown", "HostDown"]


async def test_alerts_that_end_and_begin_cannot_fill_the_disk(record: Record) -> None:
    """Not of a service either, and not those that were never firing."""
    refused: dict[str, int] = {}
    for turn in range(3):
        for labels in ({}, {"service": "web", "host": "h"}):
            limit = alert_limits.MAX_OF_SUBJECT if labels else alert_limits.MAX_FOREIGN
            new = [numbered(n, f"New {turn}", **labels) for n in range(limit)]
            for status in ("firing", "resolved"):
                sent = [replace(each, status=status) for each in new]
                name = f"{status} {labels.get('service', 'foreign')} {turn}"
                refused[name] = await record.database.write(intake.receive_alerts, sent)
    assert {name for name, number in refused.items() if not number} == {
        "firing foreign 0",
        "resolved foreign 0",
        "firing web 0",
        "resolved web 0",
    }
    record.now += arrivals.SPAN
    assert (
        await record.database.write(intake.receive_alerts, [numbered(1, "Later"), numbered(2, "Ended", "resolved")])
        == 0
    )


async def test_texts_of_many_new_alerts_are_left_out(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_limits, "MAX_TEXT", 10_000)
    monkeypatch.setattr(alert_limits, "MAX_TEXT_OF_EACH", 0)
    await record.deliver(
        *(replace(numbered(n, long="x" * 3000), annotations={"summary": "y" * 3000}) for n in range(4))
    )
    stored = await rows(record)
    assert [len(each.annotations) for each in stored] == [1, 1, 0, 0]
    assert [set(each.labels) for each in stored] == 2 * [{"alertname", "severity", "long"}] + 2 * [
        {"alertname", "severity"}
    ]


async def test_alerts_with_too_much_text_are_refused(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_limits, "MAX_TEXT", 1000)
    monkeypatch.setattr(alert_limits, "MAX_TEXT_OF_EACH", 0)
    many = [replace(numbered(n), annotations={"summary": "y" * 300}) for n in range(100)]
    assert await record.database.write(intake.receive_alerts, many) > 20
    record.now += arrivals.SPAN
    assert await record.database.write(intake.receive_alerts, [numbered(200)]) == 0


async def test_important_labels_and_alerts_to_act_on_are_kept(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_limits, "MAX_TEXT", -1)
    monkeypatch.setattr(alert_limits, "MAX_TEXT_OF_EACH", 0)
    many = {f"a{number:02}": "x" for number in range(40)}
    await record.deliver(replace(web(), labels={**many, **web().labels}, annotations={"summary": "s"}))
    (stored,) = await rows(record)
    assert web().labels.items() <= stored.labels.items()
    assert (len(stored.labels), stored.annotations) == (alert_limits.SHORT_LABELS, {})
    assert await record.notified() == ["down"]


async def test_what_is_rolled_back_does_not_count(record: Record) -> None:
    def fail(tx: Transaction) -> None:
        intake.receive_alerts(
            tx, [numbered(n, "Slow", service="web", host="h") for n in range(alert_limits.MAX_OF_SUBJECT)]
        )
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await record.database.write(fail)
    assert await record.database.write(intake.receive_alerts, [numbered(1, "Slow", service="web", host="h")]) == 0


async def test_copies_with_other_starts_are_limited(record: Record) -> None:
    for number in range(3 * MAX_STARTS):
        await record.deliver(disk(starts=1000 + number))
    (stored,) = await rows(record)
    assert len(stored.starts) == MAX_STARTS
    for number in range(2 * MAX_STARTS, 3 * MAX_STARTS):
        await record.deliver(disk("resolved", starts=1000 + number))
    assert await firing(record) == []


async def test_events_of_one_incident_are_limited(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_EVENTS", 5)
    for number in range(20):
        await record.deliver(web(starts=number), web("resolved", starts=number))
    events = await record.database.read(lambda tx: tx.scalars(select(timeline.c.event)).all())
    assert len([each for each in events if each.startswith("alert_")]) <= 5


async def test_held_ends_are_released_in_parts(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciliation, "CHANGED_TOGETHER", 3)
    await record.deliver(WATCHDOG, *(numbered(number) for number in range(7)))
    await record.deliver(*(numbered(number, status="resolved") for number in range(7)))
    record.now += 60
    await record.deliver(WATCHDOG)
    released = [await record.database.write(reconciliation.release_held_ends, record.now) for _ in range(4)]
    assert released == [3, 3, 1, 0]


async def test_an_alert_whose_end_came_first_has_its_texts_when_it_fires(record: Record) -> None:
    alert = replace(numbered(1), annotations={"summary": "s"})
    await record.deliver(replace(alert, status="resolved"))
    record.now += intake.LATE_COPY
    await record.deliver(alert)
    (stored,) = await rows(record)
    assert (stored.annotations, stored.status) == ({"summary": "s"}, "firing")


async def test_old_alerts_of_no_incident_are_deleted_beyond_a_limit(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_ALERTS", 3)
    for number in range(6):
        record.now += 10
        await record.deliver(numbered(number, status="resolved"))
    await record.deliver(numbered(9))
    while await record.database.write(retention.delete_before, 0.0):
        pass
    stored = await rows(record)
    assert [each.fingerprint.split()[1] for each in stored] == ["3", "4", "5", "9"]


async def test_receivers_are_limited(record: Record) -> None:
    for number in range(intake.MAX_RECEIVERS + 20):
        record.now += 1
        await record.database.write(intake.receive_alerts, [WATCHDOG], f"receiver {number}")
    known = await record.database.read(intake.known_receivers)
    assert len(known) == intake.MAX_RECEIVERS
    assert "receiver 20" in known


def listing(*active: Alert, receiver: str = "our.hook", **more: Any) -> AlertList:
    fingerprints = frozenset(each.fingerprint for each in active)
    receivers = dict.fromkeys(fingerprints, frozenset({receiver}))
    return replace(AlertList(active, receivers, fingerprints, 1000.0, frozenset(), has_watchdog=True), **more)


async def add_listed(record: Record, listed: AlertList) -> int:
    record.now += 100
    return await record.database.write(reconciliation.add_listed, listed, record.now - 10)


async def test_listed_alerts_that_were_not_delivered_are_added_once(record: Record) -> None:
    await record.database.write(intake.receive_alerts, [WATCHDOG], "our.hook")
    assert await add_listed(record, listing(web(), WATCHDOG, receiver="mail")) == 0
    assert await add_listed(record, listing(web(), WATCHDOG)) == 1
    assert await add_listed(record, listing(web(), WATCHDOG)) == 0
    await record.deliver(web(starts=1.0004))  # the webhook arrives later, with more digits
    assert (await record.open(), await record.notified()) == ([(1, "web")], ["down"])
    await record.deliver(web("resolved", starts=1.0004))
    assert await firing(record) == []


async def test_an_end_is_held_until_prometheus_was_seen_to_work_after_it(record: Record) -> None:
    await record.deliver(WATCHDOG, disk())
    await record.deliver(disk("resolved"))
    assert (await firing(record), await record.notified()) == (["HostDiskFull"], ["alert"])

    async def release(sent_at: float | None) -> list[str]:
        await record.database.write(reconciliation.release_held_ends, sent_at)
        return await firing(record)

    assert await release(record.now - 5) == ["HostDiskFull"]
    record.now += 60
    await record.deliver(WATCHDOG)  # Alertmanager repeats it without Prometheus
    assert await release(None) == ["HostDiskFull"]
    assert await release(record.now) == []
    assert await record.notified() == ["alert", "alert_over"]
    await record.deliver(disk(starts=500))
    await record.deliver(disk("resolved", starts=500))
    record.now += 100
    await record.deliver(WATCHDOG)  # this long after the end, Alertmanager would have resolved it without Prometheus
    assert await release(None) == []


async def test_ends_are_held_while_the_exporter_is_down(record: Record) -> None:
    exporter = disk(name="ExporterDown")
    await record.deliver(disk(), exporter)
    await record.deliver(disk("resolved"))
    assert await firing(record) == ["HostDiskFull", "ExporterDown"]
    await record.deliver(replace(exporter, status="resolved"))
    await record.database.write(reconciliation.release_held_ends, None)
    assert await firing(record) == []


async def test_a_held_end_is_dropped_if_the_alert_is_still_active(record: Record) -> None:
    await record.deliver(WATCHDOG, disk())
    await record.deliver(disk("resolved"))
    assert await record.reconcile({"HostDiskFull-h"}) == 1
    assert await record.database.write(reconciliation.read_open_questions) == (False, [])
    assert (await firing(record), await record.notified()) == (["HostDiskFull"], ["alert"])


async def test_a_resolved_watchdog_is_notified_immediately(record: Record) -> None:
    async def check() -> bool:
        return await record.database.write(reminders.check_watchdog, 300.0, record.now - 1)

    await record.deliver(WATCHDOG)
    assert not await check()
    await record.deliver(RESOLVED_WATCHDOG)
    assert await check()
    assert not await check()
    await record.deliver(WATCHDOG)
    assert await check()
    assert await record.notified() == ["watchdog_missing", "watchdog_back"]


@pytest.mark.parametrize(
    ("hosts_up", "later", "left"),
    [(set(), 400.0, 1), ({"h"}, 400.0, 0), (set(), reconciliation.INHIBITING_EXPIRES + 1, 0)],
)
async def test_without_alertmanager_host_down_is_resolved(
    record: Record, hosts_up: set[str], later: float, left: int
) -> None:
    await record.deliver(disk(name="HostDown"))
    record.now += later
    await record.database.write(reconciliation.resolve_recovered, set(), hosts_up, record.now - 300)
    assert len(await firing(record)) == left


@pytest.mark.parametrize(
    ("host_up", "other_is_up", "held"),
    [(None, False, True), (False, False, True), (True, False, False), (None, True, False)],
)
async def test_host_down_does_not_hold_actions_if_the_host_answers(
    record: Record, host_up: bool | None, other_is_up: bool, held: bool
) -> None:
    await record.deliver(web(), disk(name="HostDown"))
    observed: Observation = replace(DOWN, host_up=host_up)
    situation = Situation(
        record.now, frozenset(), ActionHistory(), ActionsInProgress(), observed, other_is_up=other_is_up
    )
    known = await record.database.write(situations.add_recorded_facts, 1, "web", situation)
    assert (known.host_down, known.host_up_for) == (held, None)


@pytest.mark.parametrize("is_resolved", [True, False])
@pytest.mark.parametrize(
    ("changes", "was_down"),
    [
        ([], False),  # nothing but the alert says so
        ([("service", "web", "down")], False),
        ([("service", "web", "down"), ("service", "db", "up")], True),
        ([("host", "h", "up")], True),
        ([("container", "x", "down"), ("container", "y", "down")], False),
    ],
)
async def test_a_forged_host_down_does_not_give_services_time_to_boot(
    record: Record, changes: list[tuple[Any, str, str]], was_down: bool, is_resolved: bool
) -> None:
    copied = [StateChange(record.now - 400, "host", "h", "h", "up", "") for _ in range(2)]  # too long ago
    copied += [StateChange(record.now - 1, kind, "h", name, state, "") for kind, name, state in changes]
    await record.database.write(store_copied, copied, cursor="c", asked_at=record.now, gap=False)
    await record.deliver(web(), disk(name="HostDown"))
    record.now += 1
    if is_resolved:
        await record.deliver(disk(name="HostDown", status="resolved"))
    observed: Observation = replace(DOWN, host_up=True)
    situation = Situation(record.now, frozenset(), ActionHistory(), ActionsInProgress(), observed)
    record.now += 100
    known = await record.database.write(situations.add_recorded_facts, 1, "web", situation)
    assert (known.host_up_for is not None) is was_down


@pytest.mark.parametrize(("state", "was_down"), [("down", True), ("up", False)])
async def test_a_host_whose_return_has_not_been_copied_yet_gives_services_time_to_boot(
    record: Record, state: str, was_down: bool
) -> None:
    """It was down for an hour, and the exporter has just seen it again."""
    change = StateChange(record.now - 3600, "host", "h", "h", state, "")
    await record.database.write(store_copied, [change], cursor="c", asked_at=record.now, gap=False)
    await record.deliver(web(), disk(name="HostDown"))
    observed: Observation = replace(DOWN, host_up=True)
    situation = Situation(record.now, frozenset(), ActionHistory(), ActionsInProgress(), observed)
    known = await record.database.write(situations.add_recorded_facts, 1, "web", situation)
    assert (known.host_up_for is not None) is was_down
