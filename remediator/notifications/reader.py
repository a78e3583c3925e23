"""What there is to tell of a trouble when a message about it is sent, by the record as it is then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from sqlalchemy import Row, select

from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory, Service
from fleet.inventory.notify import ButtonAction, Language, NotificationKind, Person
from remediator.notifications.outbox import Batch, Notice
from remediator.policy.attempts import max_attempts, next_step
from remediator.record import maintenance
from remediator.record.automation import read_switch
from remediator.record.schema import actions, alerts, incidents, timeline
from remediator.record.situations import began_at, read_past
from remediator.record.transaction import Transaction

State = NotificationKind | Literal["acting", "watched", "test"]
ATTEMPTS_SHOWN = 5
_IS_OVER = ("restarted", "watched", "recovered", "unobserved")
LINK_LIMIT = 2000  # characters
OUTPUT_SHOWN = 600  # characters of a command's end


@dataclass(frozen=True)
class Attempt:
    """One action of an incident; `took` is from its beginning to the first successful probe."""

    kind: str
    state: str
    why: str
    by: str
    at: datetime
    took: float | None


@dataclass(frozen=True)
class Story:
    """What a template may say; texts are as they came, and are escaped where they are put into a card.

    Durations are in seconds, times in the fleet's time zone; what is not known is None, or empty.
    """

    state: State
    severity: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    service: Service | None
    since: datetime
    lasted: float | None  # None while it lasts
    open_for: float
    on_call: Sequence[Person]
    facts: Mapping[str, Any]  # what the notice itself says: probe, why, who, output, seconds, action, kind, …
    attempts: Sequence[Attempt] = ()
    earlier_attempts: int = 0
    attempt: tuple[int, int] | None = None  # (used, allowed) of the step that is tried, or was last
    decision: tuple[str, str, str] = ("", "", "")  # (verb, reason, detail), as it was then
    until: datetime | None = None  # when what holds a restart back ends
    held: tuple[str, str] | None = None  # (maintenance or automation-off, why), where people hold Defib back
    quiet: bool = False  # nobody is to be called
    recovered_by: str = ""
    acknowledged: tuple[str, datetime] | None = None
    firing: Sequence[str] = ()
    incident: int | None = None
    links: Mapping[str, str] = field(default_factory=dict)  # by name: grafana, runbook, logs, console, silence
    answers: Mapping[ButtonAction, Mapping[str, Any]] = field(default_factory=dict)  # what each button would ask for

    @property
    def host(self) -> str:
        return self.service.host if self.service is not None else self.labels.get("host", "")

    @property
    def over(self) -> bool:
        """Whether what its alerts said of a service is not so any more."""
        return self.state in _IS_OVER

    @property
    def alertname(self) -> str:
        return self.labels.get("alertname", "")

    @property
    def name(self) -> str:
        """What it is about, for a title; news of Defib itself is about nothing else."""
        if self.state.startswith(("watchdog", "automation", "test")):
            return ""
        if self.state in ("alert", "alert_over") or (self.service is None and self.alertname):
            about = self.service.title if self.service else self.labels.get("service", "") or self.host
            return " · ".join(part for part in (self.alertname, about) if part)
        return self.service.title if self.service else self.labels.get("service", "")


def read(tx: Transaction, batch: Batch) -> list[Story]:
    """The stories of a batch's notices, as they stand now."""
    zone = ZoneInfo(tx.inventory.notify.timezone)
    reader = _Reader(tx, zone)
    return [reader.story(notice) for notice in batch.notices]


class _Reader:
    def __init__(self, tx: Transaction, zone: ZoneInfo) -> None:
        self._tx, self._zone = tx, zone
        self._inventory, self._now = tx.inventory, tx.now

    def story(self, notice: Notice) -> Story:
        incident, alert = self._row(incidents, notice.incident_id), self._row(alerts, notice.alert_id)
        # A further alert of an incident is its own story; so is one of no service of ours.
        of_alert = notice.kind in ("alert", "alert_over") or (incident is None and alert is not None)
        if of_alert or incident is None:
            return self._of_alert(notice, alert if of_alert else None)
        return self._of_incident(notice, incident)

    def _row(self, table: Any, number: int | None) -> Row[Any] | None:
        return None if number is None else self._tx.execute(select(table).where(table.c.id == number)).first()

    def _at(self, at: float) -> datetime:
        return datetime.fromtimestamp(self._tx.clock.unix(at), self._zone)

    def _common(self, notice: Notice) -> dict[str, Any]:
        labels = dict(notice.content.get("labels", {}))
        service = self._inventory.services.get(str(notice.content.get("service") or labels.get("service", "")))
        facts = dict(notice.content)
        for name in ("since", "until"):
            if isinstance(facts.get(name), float):
                facts[name] = self._at(facts[name])
        hold = self._hold(service, labels)
        return {
            "severity": notice.severity,
            "labels": labels,
            "annotations": in_language(notice.content.get("annotations", {}), self._inventory.notify.language),
            "service": service,
            "on_call": self._inventory.notify.on_call(labels, notice.kind),
            "facts": facts,
            "held": (hold.reason, hold.why) if hold is not None else None,
            "until": self._at(self._now + hold.remaining) if hold is not None and hold.remaining is not None else None,
            "quiet": _is_quiet(hold, notice.kind),
        }

    def _hold(self, service: Service | None, labels: Mapping[str, str]) -> maintenance.OperatorHold | None:
        """What people hold Defib back with from a service, or from a host."""
        host = self._inventory.hosts.get(service.host if service is not None else labels.get("host", ""))
        if service is None and host is None:
            return None
        name = service.id if service is not None else ""
        return maintenance.find_hold(self._tx, name, service, host)

    def _of_alert(self, notice: Notice, alert: Row[Any] | None) -> Story:
        common = self._common(notice)
        since = alert.first_seen if alert is not None else notice.content.get("since", notice.created_at)
        over = alert is not None and alert.status == "resolved"
        state: State = notice.kind
        if notice.card and notice.kind == "alert" and over:
            state = "alert_over"
        ended = notice.content.get("closed_at", alert.last_seen if over and alert is not None else None)
        began = notice.content.get("opened_at", since)
        urls = links(self._inventory, common["service"], common["labels"], common["annotations"], notice.incident_id)
        # What is acknowledged for an alert is its incident, or itself where it has none.
        of = (self._row(incidents, alert.incident_id) or alert) if alert is not None else None
        return Story(
            state=state, **common, since=self._at(began), lasted=None if ended is None else ended - began,
            open_for=max(0.0, self._now - began), incident=notice.incident_id,
            acknowledged=self._acknowledged(of), links=urls,
            answers=self._answers_to_alert(alert, of) if state != "alert_over" else {},
        )  # fmt: skip

    def _answers_to_alert(self, alert: Row[Any] | None, of: Row[Any] | None) -> dict[ButtonAction, Mapping[str, Any]]:
        if alert is None or of is None:
            return {}
        about: dict[str, Any] = {"alert": alert.id, "since": int(alert.first_seen)}
        answers: dict[ButtonAction, Mapping[str, Any]] = {}
        if of.acknowledged_at is None:
            answers["acknowledge"] = about if of is alert else {"incident": of.id, "since": int(of.opened_at)}
        if self._inventory.remediator.alertmanager_url is not None:
            answers["silence"] = about
        return answers

    def _of_incident(self, notice: Notice, row: Row[Any]) -> Story:
        common = self._common(notice)
        service = common["service"] or self._inventory.services.get(row.service)
        done = self._tx.execute(
            select(actions)
            .where(actions.c.incident_id == row.id, actions.c.kind != "reset", actions.c.state != "cancelled")
            .order_by(actions.c.id)
        ).all()
        state = _state_of(row, done) if notice.card else notice.kind
        tried = [each for each in done if each.state != "queued"]
        facts = dict(common["facts"])
        if row.probe and state not in _IS_OVER:
            facts["probe"] = row.probe
        if notice.card:
            facts |= self._of_last(state, done)
        ended, began = row.closed_at, began_at(row)
        return Story(
            state=state, **{**common, "service": service, "facts": facts},
            since=self._at(began), lasted=None if ended is None else ended - began,
            open_for=max(0.0, self._now - began),
            attempts=[self._attempt(each) for each in tried[-ATTEMPTS_SHOWN:]],
            earlier_attempts=max(0, len(tried) - ATTEMPTS_SHOWN),
            attempt=self._counted(notice, service, row.id, tried),
            decision=self._decision(notice, row),
            recovered_by=row.recovered_by or "", acknowledged=self._acknowledged(row),
            firing=self._firing(row.id), incident=row.id,
            links=links(self._inventory, service, common["labels"], common["annotations"], row.id),
            answers=self._answers_to_incident(row, service, done),
        )  # fmt: skip

    def _decision(self, notice: Notice, row: Row[Any]) -> tuple[str, str, str]:
        """What was decided: a card that is kept true shows how it is now, a notice how it was when it was made.

        One that is made when the outage has just begun shows the first decision about it.
        """
        if notice.card:
            return row.verb or "", row.reason or "", row.detail or ""
        of = (timeline.c.incident_id == row.id) & (timeline.c.at >= began_at(row))
        made = self._tx.execute(
            select(timeline.c.at, timeline.c.detail).where(of, timeline.c.event == "decision").order_by(timeline.c.id)
        ).all()
        then = [each for each in made if each.at <= notice.created_at][-1:] or made[:1]
        return next(
            ((each.detail["verb"], each.detail.get("reason") or "", each.detail.get("detail") or "") for each in then),
            ("", "", ""),
        )

    def _of_last(self, state: State, done: Sequence[Row[Any]]) -> dict[str, Any]:
        """What a card that is kept true says of the last action."""
        if not done:
            return {}
        last = done[-1]
        if state == "approval":
            return {"action": last.id, "kind": last.kind}
        if state in ("down", "person_needed") and last.state in ("failed", "unknown"):
            return {"why": last.why or "", "output": (last.output or "")[-OUTPUT_SHOWN:]}
        if last.up_at is not None and state in ("restarted", "watched", "recovered"):
            return {"seconds": last.up_at - last.claimed_at}
        return {}

    def _attempt(self, row: Row[Any]) -> Attempt:
        took = None if row.up_at is None else max(0.0, row.up_at - row.claimed_at)
        by = row.asked_by if row.requested_by == "person" else row.approved_by or ""
        return Attempt(row.kind, row.state, row.why or "", by, self._at(row.claimed_at), took)

    def _counted(
        self, notice: Notice, service: Service | None, incident: int, tried: Sequence[Row[Any]]
    ) -> tuple[int, int] | None:
        if "attempt" in notice.content:
            return int(notice.content["attempt"]), int(notice.content["attempts"])
        own = [each for each in tried if each.counts]
        if service is None or not own:
            return None
        rules = self._inventory.remediation.for_service(service)
        past = read_past(self._tx, service.id, incident, rules.window)
        step = next((step for step in rules.steps if step.kind == own[-1].kind), next_step(service, rules, past))
        return None if step is None else (past.attempts.get(step.kind, 0), max_attempts(step, rules))

    def _acknowledged(self, row: Row[Any] | None) -> tuple[str, datetime] | None:
        if row is None or row.acknowledged_at is None:
            return None
        return row.acknowledged_by, self._at(row.acknowledged_at)

    def _firing(self, incident: int) -> list[str]:
        names = self._tx.scalars(
            select(alerts.c.name).where(alerts.c.incident_id == incident, alerts.c.status == "firing").distinct()
        )
        return sorted(names)

    def _answers_to_incident(
        self, row: Row[Any], service: Service | None, done: Sequence[Row[Any]]
    ) -> dict[ButtonAction, Mapping[str, Any]]:
        if row.state != "open":
            return {}
        about: dict[str, Any] = {"incident": row.id, "since": int(row.opened_at)}
        answers: dict[ButtonAction, Mapping[str, Any]] = {}
        if row.acknowledged_at is None:
            answers["acknowledge"] = about
        if self._inventory.remediator.alertmanager_url is not None:
            answers["silence"] = about
        queued = next((each for each in done if each.state == "queued" and each.approved_at is None), None)
        if queued is not None:
            answers["approve"] = {**about, "action": queued.id}
        running = any(each.state == "running" for each in done)
        if service is not None and service.control is not None and "restart" in service.control.options.verbs:
            if not running:
                answers["restart"] = about
            if read_switch(self._tx).enabled:
                answers["automation"] = about
        return answers


def _state_of(row: Row[Any], done: Sequence[Row[Any]]) -> State:
    """What an incident's card shows it to be."""
    if row.state != "open":
        return "recovered" if row.state == "recovered" else "unobserved"
    last = done[-1] if done else None
    if last is not None and last.state == "running" and last.kind != "stop":
        return "acting" if last.up_at is None else "restarted"
    if last is not None and last.state == "queued" and last.approved_at is None:
        return "approval"
    # Its alerts are over, or it answers though they are not: what is left is to see it stay so.
    if row.verb == "nothing" or row.reason == "already-up":
        return "watched"
    return "person_needed" if row.person_needed_at is not None else "down"


def _is_quiet(hold: maintenance.OperatorHold | None, kind: NotificationKind) -> bool:
    """Whether nobody is to be called: in maintenance, and while automation is off unless a person is needed."""
    if hold is None or hold.notify:
        return False
    return hold.reason == "maintenance" or kind != "person_needed"


def links(
    inventory: Inventory,
    service: Service | None,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    incident: int | None,
) -> dict[str, str]:
    """Addresses for people's browsers, by name; those that the inventory gives no base for are left out."""
    own, remediator = inventory.notify.links, inventory.remediator
    grafana = _base(own.grafana, remediator.grafana_url)
    alertmanager = _base(own.alertmanager, remediator.alertmanager_url)
    ours = _base(own.remediator, remediator.url if "url" in remediator.model_fields_set else None)
    host = service.host if service is not None else labels.get("host", "")
    found: dict[str, str] = {}
    if grafana and (service is not None or host):
        board, name, value = ("service", "service", service.id) if service is not None else ("hosts", "host", host)
        found["grafana"] = f"{grafana}/d/defib-{board}?{urlencode({f'var-{name}': value})}"
    runbook = service.runbook if service is not None else ""
    runbook = runbook or annotations.get("runbook_url", "")
    if own.docs and runbook.startswith("docs/"):  # as our own rules name their pages
        runbook = own.docs.rstrip("/") + runbook.removeprefix("docs")
    if runbook.startswith(("http://", "https://")):
        found["runbook"] = runbook
    if ours and service is not None and service.control is not None and "logs" in service.control.options.verbs:
        found["logs"] = f"{ours}/api/v1/services/{quote(service.id, safe='')}/logs"
    if ours:
        found["console"] = f"{ours}/{f'incidents/{incident}' if incident is not None else ''}"
    if alertmanager:
        matchers = quote(_matchers(service, labels), safe="")
        found["silence"] = f"{alertmanager}/#/silences/new?filter={matchers}"
    return {name: url for name, url in found.items() if len(url) <= LINK_LIMIT and url.isprintable()}


def in_language(annotations: Mapping[str, str], language: Language) -> dict[str, str]:
    """The annotations in one language: what `summary_zh` says is the summary where Chinese is read."""
    endings = {each: f"_{each}" for each in get_args(Language)}
    plain = {name: text for name, text in annotations.items() if not name.endswith(tuple(endings.values()))}
    own = {name: text for name, text in annotations.items() if name.endswith(endings[language])}
    return {**plain, **{name.removesuffix(endings[language]): text for name, text in own.items()}}


def _base(own: str | None, endpoint: Endpoint | None) -> str:
    """Where people reach a program: as the inventory says of links, else where we reach it."""
    return own.rstrip("/") if own else endpoint.base if endpoint is not None else ""


def _matchers(service: Service | None, labels: Mapping[str, str]) -> str:
    wanted = {"service": service.id} if service is not None else labels
    quoted = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name, value in wanted.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(quoted.items())) + "}"
