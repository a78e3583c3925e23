"""Which deliveries are one alert, when it is over, and what makes an end believed; on a real record."""

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
from remediator.incidents import intake, reconciliation
from remediator.incidents.alert_starts import add_copy, normalize
from remediator.policy.situation import Observation, Past, Present, Situation
from remediator.record import situations
from remediator.record.schema import alerts
from remediator.record.transaction import Transaction
from tests.integration import test_record
from tests.integration.test_record import DOWN, Record

record = test_record.record
WATCHDOG = Alert("w", "1", "", "firing", {"alertname": "Watchdog", "severity": "info"}, {})
WATCHDOG_OVER = replace(WATCHDOG, status="resolved")


def at(second: float) -> str:
    return datetime.fromtimestamp(1_800_000_000 + second, UTC).isoformat()


def disk(status: Any = "firing", starts: float = 1, name: str = "HostDiskFull") -> Alert:
    labels = {"alertname": name, "host": "h", "severity": "critical"}
    return Alert(f"{name}-h", at(starts), "", status, labels, {})


def web(status: Any = "firing", starts: float = 1) -> Alert:
    labels = {"alertname": "ServiceDown", "service": "web", "severity": "critical"}
    return Alert("ServiceDown-web", at(starts), "", status, labels, {})


async def firing(record: Record) -> list[str]:
    def names(tx: Transaction) -> list[str]:
        return list(tx.scalars(select(alerts.c.name).where(alerts.c.status == "firing").order_by(alerts.c.id)))

    return await record.database.write(names)


async def test_one_fingerprint_with_two_starts_is_one_alert_and_over_with_the_last(record: Record) -> None:
    await record.deliver(disk(starts=1))
    await record.deliver(disk(starts=20))
    await record.deliver(disk("resolved", starts=1))
    assert await firing(record) == ["HostDiskFull"]
    assert await record.told() == ["alert"]
    await record.deliver(disk("resolved", starts=20))
    assert (await firing(record), await record.told()) == ([], ["alert", "alert_over"])


async def test_what_alertmanager_merged_under_an_earlier_start_is_over_with_that(record: Record) -> None:
    await record.deliver(disk(starts=20))
    await record.deliver(disk(starts=1))
    await record.deliver(disk("resolved", starts=1))
    assert (await firing(record), await record.told()) == ([], ["alert", "alert_over"])
    await record.deliver(disk("firing", starts=300))  # another
    assert await record.told() == ["alert", "alert_over", "alert"]
    await record.deliver(disk("firing", starts=1))  # a late copy of the first
    await record.deliver(disk("resolved", starts=300))
    assert await firing(record) == []


async def test_two_starts_of_a_service_are_one_incident_told_once(record: Record) -> None:
    for starts in (20, 1, 40):
        await record.deliver(web(starts=starts))
    assert (await record.open(), await record.told()) == ([(1, "web")], ["down"])


moments = st.integers(0, 5).map(lambda second: normalize(at(second)))


@given(st.lists(st.tuples(moments, st.sampled_from(["firing", "resolved"]))))
def test_an_alert_fires_as_long_as_a_start_does(copies: Sequence[tuple[str, Any]]) -> None:
    starts: dict[str, bool] = {}
    for start, status in copies:
        known, before = start in starts, [each for each, fires in starts.items() if fires]
        starts = add_copy(starts, start, status)
        assert starts[start] == (status == "firing")
        if status == "firing":
            assert any(starts.values())
        elif known:
            assert [each for each, fires in starts.items() if fires] == [each for each in before if each != start]


def test_starts_of_the_webhook_and_of_the_api_are_the_same() -> None:
    assert normalize("2026-11-22T03:39:44.743142112Z") == normalize("2026-11-22T03:39:44.743Z")
    assert normalize("whenever") == "whenever"


async def test_a_copy_after_the_end_is_in_doubt_until_the_exporter_has_been_asked(record: Record) -> None:
    await record.deliver(web())
    await record.deliver(web("resolved"))
    assert await record.close(1)
    await record.deliver(web())
    assert await record.database.write(reconciliation.read_open_questions) == (False, ["web"])
    for down, told in ((False, ["down", "recovered"]), (True, ["down", "recovered", "down"])):
        await record.database.write(reconciliation.settle_doubts, "web", down=down)
        assert await record.database.write(reconciliation.read_open_questions) == (False, [])
        assert await record.told() == told
        await record.deliver(web())


async def test_a_copy_with_another_start_is_over_with_that_start(record: Record) -> None:
    await record.deliver(web(starts=1))
    await record.deliver(web(starts=20))
    for starts in (1, 20):
        await record.deliver(web("resolved", starts=starts))
    await record.deliver(web(starts=20))  # in doubt: it had ended
    await record.database.write(reconciliation.settle_doubts, "web", down=True)
    assert await firing(record) == ["ServiceDown"]
    await record.deliver(web("resolved", starts=20))
    assert await firing(record) == []


async def test_a_copy_in_doubt_that_ends_before_the_exporter_answers_is_over(record: Record) -> None:
    await record.deliver(web())
    await record.deliver(web("resolved"))
    await record.deliver(web())
    await record.deliver(web("resolved"))
    assert await record.database.write(reconciliation.read_open_questions) == (False, [])


async def test_without_alertmanager_exporter_down_ends_when_it_is_not_repeated(record: Record) -> None:
    """Its `resolved` was lost; the ends of other alerts wait for it. That the exporter answers us shows nothing."""
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


async def test_another_alert_fires_again_when_its_end_is_long_past(record: Record) -> None:
    await record.deliver(disk())
    await record.deliver(disk("resolved"))
    await record.deliver(disk())
    assert await firing(record) == []
    record.now += intake.LATE_COPY
    await record.deliver(disk())
    assert await record.told() == ["alert", "alert_over", "alert"]


def listing(*active: Alert, receiver: str = "our.hook", **more: Any) -> AlertList:
    fingerprints = frozenset(each.fingerprint for each in active)
    receivers = dict.fromkeys(fingerprints, frozenset({receiver}))
    return replace(AlertList(active, receivers, fingerprints, 1000.0, frozenset(), None), **more)


async def take(record: Record, known: AlertList) -> int:
    record.now += 100
    return await record.database.write(reconciliation.add_listed, known, record.now - 10)


async def test_what_alertmanager_lists_and_never_delivered_is_taken_in_once(record: Record) -> None:
    await record.database.write(intake.receive, [WATCHDOG], "our.hook")
    assert await take(record, listing(web(), WATCHDOG, receiver="mail")) == 0
    assert await take(record, listing(web(), WATCHDOG)) == 1
    assert await take(record, listing(web(), WATCHDOG)) == 0
    await record.deliver(web(starts=1.0004))  # its delivery comes late, and has more digits
    assert (await record.open(), await record.told()) == ([(1, "web")], ["down"])
    await record.deliver(web("resolved", starts=1.0004))
    assert await firing(record) == []


async def test_an_end_is_held_until_prometheus_was_there_after_it(record: Record) -> None:
    await record.deliver(WATCHDOG, disk())
    await record.deliver(disk("resolved"))
    assert (await firing(record), await record.told()) == (["HostDiskFull"], ["alert"])

    async def release(sent_at: float | None) -> list[str]:
        await record.database.write(reconciliation.release_held_ends, sent_at)
        return await firing(record)

    assert await release(record.now - 5) == ["HostDiskFull"]
    record.now += 60
    await record.deliver(WATCHDOG)  # Alertmanager repeats what it has
    assert await release(None) == ["HostDiskFull"]
    assert await release(record.now) == []
    assert await record.told() == ["alert", "alert_over"]
    await record.deliver(disk(starts=500))
    await record.deliver(disk("resolved", starts=500))
    record.now += 100
    await record.deliver(WATCHDOG)  # so long after the end it would be over, too, were Prometheus gone
    assert await release(None) == []


async def test_ends_are_held_while_the_exporter_is_down(record: Record) -> None:
    exporter = disk(name="ExporterDown")
    await record.deliver(disk(), exporter)
    await record.deliver(disk("resolved"))
    assert await firing(record) == ["HostDiskFull", "ExporterDown"]
    await record.deliver(replace(exporter, status="resolved"))
    await record.database.write(reconciliation.release_held_ends, None)
    assert await firing(record) == []


async def test_an_end_that_is_held_is_none_where_the_alert_fires_on(record: Record) -> None:
    await record.deliver(WATCHDOG, disk())
    await record.deliver(disk("resolved"))
    assert await record.reconcile({"HostDiskFull-h"}) == 1
    assert await record.database.write(reconciliation.read_open_questions) == (False, [])
    assert (await firing(record), await record.told()) == (["HostDiskFull"], ["alert"])


async def test_the_end_of_the_watchdog_is_told_immediately(record: Record) -> None:
    async def look() -> bool:
        return await record.database.write(reminders.check_watchdog, 300.0, record.now - 1)

    await record.deliver(WATCHDOG)
    assert not await look()
    await record.deliver(WATCHDOG_OVER)
    assert await look()
    assert not await look()
    await record.deliver(WATCHDOG)
    assert await look()
    assert await record.told() == ["watchdog_missing", "watchdog_back"]


@pytest.mark.parametrize(
    ("hosts_up", "later", "left"),
    [(set(), 400.0, 1), ({"h"}, 400.0, 0), (set(), reconciliation.INHIBITING_EXPIRES + 1, 0)],
)
async def test_host_down_does_not_last_for_ever_without_alertmanager(
    record: Record, hosts_up: set[str], later: float, left: int
) -> None:
    await record.deliver(disk(name="HostDown"))
    record.now += later
    await record.database.write(reconciliation.resolve_recovered, set(), hosts_up, record.now - 300)
    assert len(await firing(record)) == left


@pytest.mark.parametrize(("host_up", "held"), [(None, True), (False, True), (True, False)])
async def test_the_gate_of_a_host_is_open_when_its_shell_answers(
    record: Record, host_up: bool | None, held: bool
) -> None:
    await record.deliver(web(), disk(name="HostDown"))
    observed: Observation = replace(DOWN, host_up=host_up)
    situation = Situation(record.now, frozenset(), Past(), Present(), observed)
    known = await record.database.write(situations.complete, 1, "web", situation)
    assert known.host_down is held
