"""Reports: their numbers, computed by hand; their texts and cards; when they are sent."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import insert, select

from defib import report as command
from defib.output import print_text, wrap
from fleet.inventory.model import Inventory
from fleet.inventory.report_times import Reports
from remediator.clients.prometheus import Series
from remediator.engine.scheduled_reports import SEND_WITHIN, send_due_reports
from remediator.notifications.messages import render_card
from remediator.notifications.rendering import Templates
from remediator.notifications.report_texts import describe_report
from remediator.notifications.samples import sample_notification
from remediator.record.schema import actions, incidents, maintenance, notifications, timeline
from remediator.record.transaction import Transaction
from remediator.reports.availability import Availability, availability_queries, read_availability
from remediator.reports.building import LISTED, Span, build_report
from remediator.reports.description import describe, summarize
from remediator.reports.measurements import PARTS, Measurements
from remediator.reports.past import Past, PastIncident, read_past
from remediator.reports.report import Certificate, Counts, Disk, GpuUse, Report
from remediator.reports.reporter import Reporter
from tests.support import ClockedHarness, inventory_of, load_problems, write

HOUR, DAY = 3600.0, 86400.0
END = datetime(2026, 11, 30, 9, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()
START = END - 7 * DAY
SPAN = Span(START, END)
BERLIN = ZoneInfo("Europe/Berlin")
LANGUAGES = {"en": Templates("en"), "zh": Templates("zh")}


def configuration_of(*services: str, **more: Any) -> dict[str, Any]:
    """Return services by name, or as `NAME@TEAM`."""
    written = {}
    for each in services:
        name, _, team = each.partition("@")
        written[name] = {"host": "h", "team": team, "probe": {"tcp": {"address": "127.0.0.1:1"}}}
    return {"hosts": {"h": {"address": "h", "group": "racks", "shell": "local"}}, "services": written, **more}


def with_reports(**reports: Any) -> dict[str, Any]:
    channels = {name: {"feishu": {"webhook": f"http://{name}/"}} for name in ("ops", "leads")}
    return {"notify": {"language": "en", "channels": channels, "reports": {"channels": ["ops"], **reports}}}


class Record(ClockedHarness):
    def __init__(self, folder: Path, written: Mapping[str, Any]) -> None:
        super().__init__(folder, inventory_of(folder / "config", written).inventory, at=END)

    async def add(self, service: str, began: float, ended: float | None, **values: Any) -> int:
        """Add an incident; `began` and `ended` are hours after the beginning of the span."""
        closed = None if ended is None else START + ended * HOUR
        state = values.pop("state", "open" if ended is None else "recovered")
        watched, persons = values.pop("watched", 0.0), values.pop("person_needed", ())
        row = {
            "service": service, "state": state, "opened_at": START + began * HOUR, "down_at": START + began * HOUR,
            "closed_at": closed, "labels": {"alertname": "ServiceDown", "team": "old"},
            "recovered_by": "self" if state == "recovered" else None, **values,
        }  # fmt: skip

        def store(tx: Transaction) -> int:
            incident = int(tx.execute(insert(incidents).values(**row)).lastrowid)
            events: list[tuple[float, str, dict[str, Any]]] = [(row["opened_at"], "incident_opened", {})]
            events += [(START + at * HOUR, "person_needed", {}) for at in persons]
            if closed is not None:
                events.append((closed, "incident_closed", {"watched": watched} if watched else {}))
            for at, event, detail in events:
                tx.execute(insert(timeline).values(incident_id=incident, at=at, event=event, detail=detail))
            return incident

        return await self.database.write(store)

    async def act(
        self, service: str, at: float, state: str = "succeeded", kind: str = "restart", by: str = "alert"
    ) -> None:
        row = {
            "service": service, "host": "h", "kind": kind, "requested_by": by, "asked_by": "ServiceDown", "overruled": [],
            "state": state, "counts": 1, "claimed_at": START + at * HOUR,
        }  # fmt: skip
        await self.database.write(lambda tx: tx.execute(insert(actions).values(**row)))

    async def maintain(self, scope: str, name: str, begun: float, until: float, ended: float | None = None) -> None:
        row = {
            "scope": scope, "name": name, "reason": "disks", "asked_by": "ann", "begun_at": START + begun * HOUR,
            "until": START + until * HOUR, "ended_at": None if ended is None else START + ended * HOUR,
        }  # fmt: skip
        await self.database.write(lambda tx: tx.execute(insert(maintenance).values(**row)))

    async def report(self, measured: Measurements = Measurements(), span: Span = SPAN) -> Report:  # noqa: B008 - frozen
        past = await read_past(self.database, span.start, span.end)
        return build_report(self.inventory, span, past, measured)

    async def notified(self) -> list[tuple[str, str]]:
        def read(tx: Transaction) -> list[tuple[str, str]]:
            return [(row.channel, row.key) for row in tx.execute(select(notifications).order_by(notifications.c.id))]

        return await self.database.read(read)


@pytest.fixture
async def record(tmp_path: Path) -> AsyncIterator[Record]:
    new = await asyncio.to_thread(Record, tmp_path, configuration_of("web@docs", "db@docs", "mail"))
    yield new
    await asyncio.to_thread(new.database.close)


def of(report: Report, service: str) -> Any:
    (found,) = (each for each in report.services if each.id == service)
    return found


async def test_nothing_happened(record: Record) -> None:
    report = await record.report()
    assert report.total.counts == Counts()
    assert (report.total.services, report.total.observed, report.total.availability) == (3, 0, None)
    assert {each.team: each.services for each in report.teams} == {"docs": 2, "": 1}
    assert {each.counts for each in map(freeze, report.services)} == {None}
    texts = "\n".join(command._format(texts_of(report), "{0}"))
    assert "\nAvailability  unknown (services: 3)\nIncidents     0\n\nTeams\n" in texts
    assert "Recovered" not in texts


def freeze(service: Any) -> Any:
    return replace(service, counts=None if service.counts == Counts() else service.counts)


async def test_incidents_and_restarts_by_service_and_team(record: Record) -> None:
    await record.add("web", 10, 11, recovered_by="defib", watched=0.5 * HOUR)  # down for half an hour
    await record.add("web", 20, 22, recovered_by="person", person_needed=(21, 21.5))  # two hours
    await record.add("db", 30, 34, recovered_by="defib", watched=HOUR)  # three hours
    await record.add("mail", 40, None, person_needed=(41,))
    for state in ("failed", "succeeded", "cancelled", "queued"):
        await record.act("web", 20.5, state)
    await record.act("web", 21, by="person")
    await record.act("db", 30.5, "unknown", kind="recreate")
    await record.act("db", 31, kind="stop", by="person")
    report = await record.report()
    counts = report.total.counts
    assert (counts.incidents, counts.began, counts.open, counts.unobserved) == (4, 4, 1, 0)
    assert counts.recovered_by == {"defib": 2, "person": 1}
    assert counts.recovery_median == pytest.approx(2 * HOUR)
    assert counts.recovery_longest == pytest.approx(3 * HOUR)
    assert (counts.restarts, counts.restarts_helped) == (4, 2)
    assert (counts.automatic_restarts, counts.automatic_restarts_helped) == (3, 1)
    assert counts.person_needed == 2
    teams = {each.team: each.counts for each in report.teams}
    assert teams["docs"].incidents == 3
    assert teams["docs"].recovery_median == pytest.approx(2 * HOUR)
    assert (teams[""].incidents, teams[""].open, teams[""].recovery_median) == (1, 1, None)
    assert of(report, "web").counts.recovery_median == pytest.approx(1.25 * HOUR)
    assert (of(report, "web").counts.person_needed, of(report, "db").counts.person_needed) == (1, 0)


@pytest.mark.parametrize(
    ("began", "ended", "expected"),  # hours; incidents, begun, open, recovered
    [
        (-5.0, -1.0, (0, 0, 0, 0)),  # over before the span
        (-5.0, 1.0, (1, 0, 0, 1)),  # open at its beginning
        (-5.0, None, (1, 0, 1, 0)),  # for the whole span
        (1.0, 168.0, (1, 1, 0, 1)),  # until its end
        (1.0, 169.0, (1, 1, 1, 0)),  # beyond its end
        (169.0, 170.0, (0, 0, 0, 0)),  # after it
    ],
)
async def test_an_incident_at_the_boundaries(
    record: Record, began: float, ended: float | None, expected: tuple[int, ...]
) -> None:
    await record.add("web", began, ended)
    record.now = END + 10 * HOUR
    counts = (await record.report()).total.counts
    assert (counts.incidents, counts.began, counts.open, sum(counts.recovered_by.values())) == expected
    if expected[3]:  # the time to recover is the whole one
        assert counts.recovery_median == pytest.approx(((ended or 0.0) - began) * HOUR)


async def test_what_was_not_an_outage_is_not_counted_as_one(record: Record) -> None:
    await record.add("web", 1, 100, labels=None, down_at=None)  # only other alerts, such as of a certificate
    await record.add("web", 101, 102, quiet=1)  # an operator had stopped it
    await record.add("HostDiskFull@h", 110, 111)  # which has a runbook
    await record.act("HostDiskFull@h", 110, kind="runbook prune-images")
    report = await record.report()
    assert (report.total.counts, report.alerts_only, report.stopped) == (Counts(), 2, 1)
    assert describe(report)["total"]["alerts_only"] == 2
    assert "HostDiskFull@h" not in {each.id for each in report.services}
    (line,) = (text for label, text in texts_of(report).headline if label == "Not counted")
    assert line == "2 without an outage, only with alerts, 1 of services that somebody stopped"


async def test_a_service_that_was_removed(record: Record) -> None:
    await record.add("gone", 5, 6, state="unobserved")
    await record.act("gone", 5.5, "failed")
    report = await record.report(Measurements({"gone": Availability(0.5, DAY), "web": Availability(1.0, DAY)}))
    gone = of(report, "gone")
    assert (gone.removed, gone.team, gone.availability, gone.down) == (True, "old", 0.5, DAY / 2)
    assert gone.counts == Counts(incidents=1, began=1, unobserved=1, restarts=1, automatic_restarts=1)
    # The availability is that of the services of the inventory; a team may have none of them.
    assert (report.total.services, report.total.observed, report.total.availability) == (3, 1, 1.0)
    (old,) = (each for each in report.teams if each.team == "old")
    assert (old.services, old.availability, old.counts.incidents) == (0, None, 1)
    texts = "\n".join(command._format(texts_of(report), "{0}"))
    assert re.search(r"old +0 +– +1 ", texts)
    assert "gone (removed)" in texts


async def test_maintenance_of_a_service_its_host_and_its_group(tmp_path: Path) -> None:
    windows = [{"service": "web", "days": ["tue"], "from": "23:00", "to": "01:00"}]
    written = configuration_of("web", "db", remediation={"maintenance": windows})
    record = await asyncio.to_thread(Record, tmp_path, written)
    await record.maintain("service", "web", -2, 3)  # three hours of it are in the span
    await record.maintain("host", "h", 2, 10, ended=4)  # two hours, of which one is in that of the service, too
    await record.maintain("group", "racks", 160, 200)  # eight hours
    await record.maintain("host", "other", 0, 100)
    report = await record.report(Measurements({"web": Availability(0.99, 7 * DAY)}))
    assert of(report, "db").maintenance == pytest.approx(10 * HOUR)
    assert of(report, "web").maintenance == pytest.approx((4 + 2 + 8) * HOUR)  # with the window of two hours
    # It counts as any other time for the availability, as in the console.
    assert of(report, "web").down == pytest.approx(0.07 * DAY)
    await asyncio.to_thread(record.database.close)


def series(value: float, **labels: str) -> Series:
    return Series(labels, [(END, value)])


def test_availability_of_a_service_that_has_moved_and_of_a_team() -> None:
    ratios = [series(1.0, service="web", host="a"), series(0.5, service="web", host="b"), series(0.8, service="db")]
    ratios += [series(float("nan"), service="bad"), series(7.0, service="bad")]
    observed = [
        series(3 * DAY, service="web", host="a"),
        series(DAY, service="web", host="b"),
        series(DAY, service="db"),
    ]
    found = read_availability(ratios, observed)
    assert found == {"web": Availability(0.875, 4 * DAY), "db": Availability(0.8, DAY)}
    inventory = inventory_with("web@docs", "db@docs", "young@docs")
    (docs,) = build_report(inventory, SPAN, Past(), Measurements(found)).teams
    assert (docs.services, docs.observed) == (3, 2)
    assert docs.availability == pytest.approx((0.875 * 4 + 0.8) / 5)  # by the time in which each was observed


def test_the_time_down_of_a_service_that_was_observed_shortly_is_unknown() -> None:
    """Right after the start, the steps in which the observed time is measured are longer than it."""
    found = read_availability([series(0.25, service="web"), series(1.0, service="db")], [])
    report = build_report(inventory_with("web", "db"), SPAN, Past(), Measurements(found))
    assert report.total.availability == 0.625
    assert {each.id: (each.availability, each.down) for each in report.services} == {
        "web": (0.25, None),
        "db": (1.0, None),
    }
    assert [(each["id"], each["down_seconds"]) for each in summarize(report)["worst"]] == [("web", None)]


def inventory_with(*services: str) -> Inventory:
    with tempfile.TemporaryDirectory() as folder:
        return inventory_of(Path(folder), configuration_of(*services)).inventory


def test_many_services_over_a_long_time_are_read_from_the_recorded_hours() -> None:
    assert availability_queries(DAY, 10_000)[0] == "avg_over_time(service:up:max[86400s])"
    assert availability_queries(90 * DAY, 300)[0] == "avg_over_time(service:up:max[7776000s])"
    assert availability_queries(30 * DAY, 10_000)[0] == "avg_over_time(service:availability:hour[2592000s])"


def report_with(**more: Any) -> Report:
    counts = Counts(3, 2, 1, {"defib": 1, "self": 1}, 0, 1, 41.0, 300.0, 4, 3, 3, 2)
    incidents_ = [PastIncident("web", "", END - 9 * HOUR, END - 8 * HOUR, "recovered", "defib", False, True, False)]
    built = build_report(
        inventory_with("web", "mail"), SPAN, Past(incidents_), Measurements({"web": Availability(0.98765, 7 * DAY)})
    )
    return replace(built, total=replace(built.total, counts=counts), **more)


def texts_of(report: Report, language: Any = "en") -> Any:
    return describe_report(LANGUAGES[language].words, describe(report), ZoneInfo("Asia/Shanghai"))


FULL: dict[str, Any] = {
    "gpu_count": 8, "gpu_utilization": 0.414,
    "gpus": [GpuUse("gpu-01", "vllm", 4, 672.0, 160 * 2.0**30, 0.75), GpuUse("gpu-01", "host", 1, 0.5, 2.0**29, None)],
    "certificates": [Certificate("web", "web", END + 5 * DAY), Certificate("mail", "mail", END - 1)],
    "disks": [
        Disk("gpu-01", "/data", 0.93, 20 * 2.0**30, 3 * DAY, ["HostDiskFull"], "critical"),
        Disk("gpu-02", "/", None, None, None, ["HostInodesFull"], "warning"),
    ],
    "missing": {"availability": "cannot query Prometheus: HTTP 503", "gpus": "x"},
}  # fmt: skip
TEXT = """\
Report  2026-11-23 09:00 to 2026-11-30 09:00 (7 d 0 h)

Availability             98.76 % (services: 1; not observed: 1)
Incidents                3: 1 had begun before, 1 still open
Recovered                2: 1 by Defib, 1 without a restart
Time to recover          median 41 s, longest 5 min 0 s
Restarts                 3 of 4 helped; automatic: 2 of 3
A person was needed      1 incident
GPUs                     8, 41 % utilized on average
Not known: availability  cannot query Prometheus: HTTP 503
Not known: GPU use       x

Teams
  TEAM    SERVICES  AVAILABILITY  INCIDENTS  RECOVERY   RESTARTS  PERSON
  (none)  2         98.76 %       1          1 h 0 min  0         0

Services, those that were down longest first
  SERVICE  AVAILABILITY  DOWN FOR   INCIDENTS  RECOVERY   RESTARTS  PERSON  MAINTENANCE
  web      98.76 %       2 h 4 min  1          1 h 0 min  0         0       –
  mail     –             –          0          –          0         0       –

GPU use by container
  CONTAINER                HOST    GPUS  GPU HOURS  MEMORY     UTILIZATION
  vllm                     gpu-01  4     672.0      160.0 GiB  75 %
  (outside of containers)  gpu-01  1     0.5        0.5 GiB    –

Certificates that expire soon
  SERVICE  EXPIRES           IN
  web      2026-12-05 09:00  5 d 0 h
  mail     2026-11-30 08:59  expired

Disks to watch
  FILESYSTEM  HOST    USED  FREE      FULL IN  ALERTS
  /data       gpu-01  93 %  20.0 GiB  3 d 0 h  HostDiskFull
  /           gpu-02  –     –         –        HostInodesFull

Recovery: median time from the beginning of an outage until the service was up.
Restarts: how many of them helped. Person: incidents in which a person was needed."""


def test_the_text_in_full() -> None:
    assert "\n".join(command._format(texts_of(report_with(**FULL)), "{0}")) == TEXT


HOSTILE = "\x1b[31m<b>&\n\u202e" + "long" * 60 + "数据库" * 40


@pytest.mark.parametrize("language", ["en", "zh"])
def test_hostile_names_stay_in_their_line_and_within_the_width(
    language: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_with(
        **{**FULL, "missing": {"disks": HOSTILE}, "certificates": [Certificate("web", HOSTILE, END + DAY)]},
        services=[replace(report_with().services[0], name=HOSTILE)],
    )
    report = replace(
        report,
        gpus=[replace(report.gpus[0], host=HOSTILE, container=HOSTILE)],
        disks=[replace(report.disks[0], mountpoint=HOSTILE, alerts=[HOSTILE])],
    )
    texts = texts_of(report, language)
    print_text("\n".join(command._format(texts, "{0}")))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "\\x1b[31m<b>&\\n" in printed
    assert [line for line in printed.splitlines() if columns_of(line) > 100] == []
    print_text(command._render_page(texts, "{0}", language))
    page = capsys.readouterr().out
    assert "<b>" not in page
    assert "\\x1b[31m&lt;b&gt;&amp;" in page
    assert re.search(r"(?:src|href|url)\s*[=(]|@import|<script", page) is None  # nothing from elsewhere
    assert page.count("<table>") == page.count("</table>") == 5


def columns_of(line: str) -> int:
    return sum(2 if "\u2e80" <= each <= "\uffef" else 1 for each in line)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a b", ["a b"]),
        ("aa bb cc", ["aa bb", "cc"]),
        ("aaaaaaa", ["aaaaa", "aa"]),
        ("数据库数据库", ["数据", "库数", "据库"]),
    ],
)
def test_long_texts_are_wrapped(text: str, lines: Sequence[str]) -> None:
    assert wrap(text, 5) == lines


def test_long_lists_are_cut() -> None:
    services = {f"s{number}": Availability(0.5, DAY) for number in range(LISTED["services"] + 7)}
    report = build_report(inventory_with(*services), SPAN, Past(), Measurements(services))
    assert (len(report.services), report.omitted) == (LISTED["services"], {"services": 7})
    assert len(describe(report)["services"]) == LISTED["services"]
    assert command._format(texts_of(report), "{0} more")
    assert "  987 more" in command._format(texts_of(report), "{0} more")


CARDS = {
    "en": """\
Daily report: 98.76 %, 3 incidents
Period: 11-23 09:00 – 11-30 09:00
Availability: 98.76 % (services: 1; not observed: 1)
Incidents: 3: 1 had begun before, 1 still open
Recovered: 2: 1 by Defib, 1 without a restart
Time to recover: median 41 s, longest 5 min 0 s
Restarts: 3 of 4 helped; automatic: 2 of 3
A person was needed: 1 incident
GPUs: 8, 41 % utilized on average
Longest down:
▪ web: 98.76 %, down for 2 h 4 min, 1 incident
Certificates that expire soon:
▪ web: expires in 5 d 0 h
▪ mail: expired
Disks to watch:
▪ gpu-01 /data: 93 % full, full in 3 d 0 h, HostDiskFull
▪ gpu-02 /: HostInodesFull
Not known: availability: cannot query Prometheus: HTTP 503
Not known: GPU use: x""",
    "zh": """\
日报：98.76 %，3 个故障单
时间段: 11-23 09:00 – 11-30 09:00
可用率: 98.76 %（1 个服务，另有 1 个未被观测）
故障单: 3：1 个此前已开始，1 个未恢复
已恢复: 2：1 个由 Defib，1 个自行恢复
恢复用时: 中位数 41 秒，最长 5 分 0 秒
重启: 4 次中 3 次有效；其中自动：3 次中 2 次
需要人工处理: 1 个故障单
GPU: 8 块，平均利用率 41 %
故障时间最长:
▪ web：98.76 %，故障 2 小时 4 分，1 个故障单
即将到期的证书:
▪ web：5 天 0 小时后到期
▪ mail：已过期
需要关注的磁盘:
▪ gpu-01 /data：已用 93 %，预计 3 天 0 小时后写满，HostDiskFull
▪ gpu-02 /：HostInodesFull
未知：可用率: 无法查询 Prometheus：“HTTP 503”
未知：GPU 使用: “x”""",
}


@pytest.mark.parametrize("language", CARDS)
def test_the_card_in_full(language: Any) -> None:
    zone = ZoneInfo("Asia/Shanghai")
    times = [datetime.fromtimestamp(at, zone) for at in (START, END)]
    sample = sample_notification("report", Inventory(), None, times[0])
    details = {"report": {"name": "daily", **summarize(report_with(**FULL))}, "until": times[1]}
    card = render_card([replace(sample, details=details)], "one", LANGUAGES[language])
    assert "\n".join([card.title, *(line.plain for line in card.lines)]) == CARDS[language]
    assert (card.colour, card.mentions) == ("blue", ())


# When reports are sent.


def local(at: float, zone: ZoneInfo = BERLIN) -> str:
    return f"{datetime.fromtimestamp(at, zone):%m-%d %H:%M}"


@pytest.mark.parametrize(
    ("times", "at", "start", "end"),
    [
        ({"daily": "09:00"}, "2026-11-30 08:59", "11-28 09:00", "11-29 09:00"),
        ({"daily": "09:00"}, "2026-11-30 09:00", "11-29 09:00", "11-30 09:00"),
        ({"weekly": "Mon 09:00"}, "2026-11-30 08:59", "11-16 09:00", "11-23 09:00"),
        ({"weekly": "mon 09:00"}, "2026-11-30 09:00", "11-23 09:00", "11-30 09:00"),
        ({"weekly": "sun 23:30"}, "2026-12-05 00:00", "11-22 23:30", "11-29 23:30"),
        # Clocks are changed at night: the day is 23 or 25 hours long, and 02:30 does not exist, or twice.
        ({"daily": "09:00"}, "2026-03-29 09:00", "03-28 09:00", "03-29 09:00"),
        ({"daily": "02:30"}, "2026-03-29 03:29", "03-27 02:30", "03-28 02:30"),
        ({"daily": "02:30"}, "2026-03-29 03:30", "03-28 02:30", "03-29 03:30"),
        ({"daily": "02:30"}, "2026-10-25 02:45", "10-24 02:30", "10-25 02:30"),
        ({"weekly": "mon 09:00"}, "2026-10-26 10:00", "10-19 09:00", "10-26 09:00"),
    ],
)
def test_when_a_report_is_due(times: dict[str, str], at: str, start: str, end: str) -> None:
    reports = Reports.model_validate({**times, "channels": ["ops"]})
    (due,) = reports.find_due(datetime.fromisoformat(at).replace(tzinfo=BERLIN).timestamp(), BERLIN)
    assert (local(due.start), local(due.end)) == (start, end)


@pytest.mark.parametrize(
    ("reports", "problem"),
    [
        ("{channels: [ops]}", "needs a time: daily: '09:00', weekly: 'mon 09:00', or both"),
        ("{daily: '09:00'}", "notify.reports.channels: is missing"),
        ("{daily: '09:00', channels: []}", "notify.reports.channels: must not be empty"),
        ("{daily: '09:00', channels: [op]}", "notify.reports.channels[0]: there is no channel 'op'; did you mean ops?"),
        ("{daily: 10:00, channels: [ops]}", "notify.reports.daily: 600 is not a time of day; write '02:30', in quotes"),
        ("{weekly: monday 9:00, channels: [ops]}", "'monday 9:00' is not a day and a time; write 'mon 09:00'"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, reports: str, problem: str) -> None:
    text = f"notify:\n  channels: {{ops: {{feishu: {{webhook: 'http://f/'}}}}}}\n  reports: {reports}\n"
    (found,) = load_problems(write(tmp_path, a=text))
    assert problem in found


class Scheduled(Record):
    """A record with scheduled reports; `send` is what its program does every few seconds."""

    def __init__(self, folder: Path, **reports: Any) -> None:
        self.folder, self.woken = folder, 0
        super().__init__(folder, {**configuration_of("web"), **with_reports(**reports)})
        self.reporter = Reporter(self.database)

    async def configure(self, **reports: Any) -> None:
        loaded = await asyncio.to_thread(inventory_of, self.folder / "config", with_reports(**reports))
        self.inventory = loaded.inventory

    async def send(self, at: str = "") -> list[tuple[str, str]]:
        """Return the notifications after a round at a local time."""
        if at:
            self.now = datetime.fromisoformat(at).replace(tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()
        await send_due_reports(self.database, self.reporter, self.wake)
        return await self.notified()

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
async def scheduled(tmp_path: Path) -> AsyncIterator[Scheduled]:
    new = await asyncio.to_thread(Scheduled, tmp_path, daily="09:00", channels=["ops", "leads"])
    yield new
    await asyncio.to_thread(new.database.close)


async def test_a_report_is_sent_once_to_each_channel(scheduled: Scheduled) -> None:
    assert await scheduled.send("2026-11-30 09:05") == []  # it was configured after 09:00
    assert await scheduled.send("2026-12-01 08:59") == []
    sent = [("ops", "report daily 2026-12-01"), ("leads", "report daily 2026-12-01")]
    assert await scheduled.send("2026-12-01 09:00") == sent
    assert await scheduled.send() == sent
    scheduled.reporter = Reporter(scheduled.database)  # as after a restart
    assert await scheduled.send("2026-12-01 09:01") == sent
    assert scheduled.woken == 1
    assert len(await scheduled.send("2026-12-02 09:00")) == 4


async def test_a_report_that_was_missed_is_sent_later_but_not_too_late(scheduled: Scheduled) -> None:
    await scheduled.send("2026-11-30 09:05")
    assert len(await scheduled.send("2026-12-01 20:59")) == 2
    assert SEND_WITHIN == 12 * HOUR
    assert len(await scheduled.send("2026-12-02 21:01")) == 2
    assert len(await scheduled.send("2026-12-03 08:59")) == 2
    assert len(await scheduled.send("2026-12-03 09:00")) == 4


async def test_after_its_time_was_changed_the_next_report_is_the_first(scheduled: Scheduled) -> None:
    await scheduled.send("2026-11-30 09:00")
    await scheduled.configure(daily="08:00", weekly="tue 08:00")
    assert await scheduled.send("2026-11-30 10:00") == []
    assert [key for _, key in await scheduled.send("2026-12-01 08:00")] == [
        "report daily 2026-12-01",
        "report weekly 2026-12-01",
    ]


async def test_clocks_that_are_set_back_send_nothing_again(scheduled: Scheduled) -> None:
    await scheduled.send("2026-11-30 10:00")
    assert len(await scheduled.send("2026-12-01 09:00")) == 2
    assert len(await scheduled.send("2026-11-30 23:00")) == 2
    assert len(await scheduled.send("2026-12-01 09:30")) == 2


async def test_a_report_without_prometheus_has_the_rest(scheduled: Scheduled) -> None:
    await scheduled.add("web", 20, 21)
    report = await scheduled.reporter.report(START, END)
    assert set(report.missing) == set(PARTS)
    assert set(report.missing.values()) == {"remediator.prometheus_url is not set"}
    assert report.total.counts.incidents == 1
