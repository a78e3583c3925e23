"""The content of notifications: what templates and channels show, by the record at the time of sending."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, get_args
from zoneinfo import ZoneInfo

from sqlalchemy import Row, select

from fleet.inventory.agents import AGENT_STUCK
from fleet.inventory.model import HostAlert, Remediable, Service, is_host_alert
from fleet.inventory.notify import ButtonAction, Language, NotificationKind, Person
from remediator.notifications.bursts import Digest, read_digest
from remediator.notifications.links import build_links, is_reference
from remediator.notifications.outbox import Batch, QueuedNotification
from remediator.policy.attempts import max_attempts, next_step, next_try_at
from remediator.record import maintenance
from remediator.record.automation import read_switch
from remediator.record.notifications import severity_rank
from remediator.record.schema import actions, alerts, incidents, timeline
from remediator.record.situations import outage_began_at, read_action_history, read_counted_restarts
from remediator.record.transaction import Transaction

# Cards that are updated also show these: a restart is running, the service seems to be up again.
NotificationState = NotificationKind | Literal["acting", "watched", "test"]
ATTEMPTS_SHOWN = 5
OUTPUT_SHOWN = 600  # characters of the end of a command's output
_UP = ("restarted", "watched", "recovered", "unobserved")
_ENDED = ("recovered", "alert_over", "unobserved")


@dataclass(frozen=True)
class Attempt:
    """An action of an incident; `took` is the time from its start to the first successful probe."""

    kind: str
    state: str
    why: str
    by: str
    at: datetime
    took: float | None
    component: str = ""  # that was restarted; empty: the whole service
    reached: bool = True  # False: no command was run


@dataclass(frozen=True)
class Restart:
    """A restart that counts: for how many seconds the service was up after it, if it was; and whether it still is."""

    at: datetime
    up_for: float | None = None
    is_up: bool = False


@dataclass(frozen=True)
class Notification:
    """What a template can show. Texts are not escaped; the channel does that.

    Durations are in seconds, times in `notify.timezone`; what is unknown is None or empty.
    """

    state: NotificationState
    severity: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    service: Service | None
    since: datetime
    duration: float | None  # None while the problem lasts
    open_for: float
    on_call: Sequence[Person]
    details: Mapping[str, Any]  # of this notification: probe, why, who, output, seconds, action, kind, …
    attempts: Sequence[Attempt] = ()
    earlier_attempts: int = 0
    attempt: tuple[int, int] | None = None  # (used, allowed) of the present or last step
    decision: tuple[str, str, str] = ("", "", "")  # (verb, reason, detail) at that time
    until: datetime | None = None  # when `held` ends, if it is known
    held: tuple[str, str] | None = None  # (maintenance or automation-off, why)
    quiet: bool = False  # nobody is mentioned
    digest: Digest | None = None  # of the burst whose digest this begins
    restarts: Sequence[Restart] = ()  # that did not help, where a person is needed because of them
    next_try: datetime | None = None  # when the back-off ends
    watched: float | None = None  # for how many seconds it was up before the incident was closed
    recovered_by: str = ""
    acknowledged: tuple[str, datetime] | None = None
    firing: Sequence[str] = ()
    incident: int | None = None
    is_foreign: bool = False  # an alert of no service or host in the inventory
    is_of_host_alert: bool = False  # the incident is of a host's alert with runbooks
    is_of_stuck_agent: bool = False  # the incident is of an agent that is alive
    is_of_woken_agent: bool = False  # the incident is of an agent that is down, and is woken first
    links: Mapping[str, str] = field(default_factory=dict)  # by name: grafana, runbook, logs, console, silence
    buttons: Mapping[ButtonAction, Mapping[str, Any]] = field(default_factory=dict)  # the ids that each one sends

    @property
    def host(self) -> str:
        return self.service.host if self.service is not None else self.labels.get("host", "")

    @property
    def is_up(self) -> bool:
        """Whether the service is, or seems to be, up again."""
        return self.state in _UP

    @property
    def down_for(self) -> float | None:
        """For how long the service was down; None while it is."""
        return None if self.duration is None else max(0.0, self.duration - (self.watched or 0.0))

    @property
    def was_tried(self) -> bool:
        """Whether a command was run."""
        return any(each.reached for each in self.attempts)

    @property
    def failed_restarts(self) -> tuple[str, int] | None:
        """What a title says of the restarts because of which a person is needed: (failed, number)."""
        if not self.restarts:
            return None
        if any(each.up_for is not None or each.is_up for each in self.restarts):
            return "repeated", len(self.restarts)
        return ("failed_once" if len(self.restarts) == 1 else "failed"), len(self.restarts)

    @property
    def has_ended(self) -> bool:
        """Whether the incident is closed or the alert is resolved."""
        return self.state in _ENDED

    @property
    def alertname(self) -> str:
        return self.labels.get("alertname", "")

    @property
    def name(self) -> str:
        """The service or alert, for a title; empty for notifications about Defib itself."""
        if self.state.startswith(("watchdog", "automation", "test", "report")):
            return ""
        if self.state in ("alert", "alert_over") or (self.service is None and self.alertname):
            subject = self.service.title if self.service else self.labels.get("service", "") or self.host
            return " · ".join(part for part in (self.alertname, subject) if part)
        return self.service.title if self.service else self.labels.get("service", "")

    # Former names, which users' templates may contain.

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.details

    @property
    def lasted(self) -> float | None:
        return self.duration

    @property
    def over(self) -> bool:
        return self.is_up

    @property
    def answers(self) -> Mapping[ButtonAction, Mapping[str, Any]]:
        return self.buttons


def read_notifications(tx: Transaction, batch: Batch) -> list[Notification]:
    """Return the content of a batch's notifications, as the record is now; in a summary, the most important first."""
    reader = _Reader(tx, ZoneInfo(tx.inventory.notify.timezone))
    notifications = [reader.read(queued) for queued in batch.notifications]
    if batch.form == "summary":
        notifications.sort(key=_importance)
    if batch.burst is not None and not batch.burst.foreign and batch.form == "summary":
        digest = read_digest(tx, batch.channel, batch.burst)
        notifications[0] = replace(notifications[0], digest=digest if digest.total else None)
    return notifications


def _importance(notification: Notification) -> tuple[bool, bool, int, bool]:
    """Return what notifications of one message are ordered by: what lasts, what is of the inventory, then severity."""
    return (
        notification.has_ended, notification.is_foreign, severity_rank(notification.severity),
        notification.is_up or notification.state == "alert",
    )  # fmt: skip


class _Reader:
    def __init__(self, tx: Transaction, zone: ZoneInfo) -> None:
        self._tx, self._zone = tx, zone
        self._inventory, self._now = tx.inventory, tx.now

    def read(self, queued: QueuedNotification) -> Notification:
        incident, alert = self._row(incidents, queued.incident_id), self._row(alerts, queued.alert_id)
        # Further alerts of an incident, and alerts without a service, are notified on their own.
        is_alert = queued.kind in ("alert", "alert_over") or (incident is None and alert is not None)
        if is_alert or incident is None:
            return self._read_alert(queued, alert if is_alert else None)
        return self._read_incident(queued, incident)

    def _row(self, table: Any, number: int | None) -> Row[Any] | None:
        return None if number is None else self._tx.execute(select(table).where(table.c.id == number)).first()

    def _local_time(self, at: float) -> datetime:
        return datetime.fromtimestamp(self._tx.clock.unix(at), self._zone)

    def _common(self, queued: QueuedNotification) -> dict[str, Any]:
        labels = dict(queued.content.get("labels", {}))
        service = self._inventory.services.get(str(queued.content.get("service") or labels.get("service", "")))
        details = dict(queued.content)
        for name in ("since", "until", "queue_ends"):
            if isinstance(details.get(name), float):
                details[name] = self._local_time(details[name])
        hold = self._find_hold(service, labels)
        ends = self._now + hold.remaining if hold is not None and hold.remaining is not None else None
        return {
            "severity": queued.severity,
            "labels": labels,
            "annotations": annotations_in_language(
                queued.content.get("annotations", {}), self._inventory.notify.language
            ),
            "service": service,
            "on_call": self._inventory.notify.on_call(labels, queued.kind, self._tx.clock.unix(self._now)),
            "details": details,
            "held": (hold.reason, hold.why) if hold is not None else None,
            "until": self._local_time(ends) if ends is not None else None,
            "quiet": _is_quiet(hold, queued.kind),
        }

    def _find_hold(self, service: Remediable | None, labels: Mapping[str, str]) -> maintenance.OperatorHold | None:
        """Return what operators hold automation of a service or host with."""
        service = service or self._inventory.find_subject_of_alert(labels.get("alertname", ""), labels)
        host = self._inventory.hosts.get(service.host if service is not None else labels.get("host", ""))
        if service is None and host is None:
            return None
        name = service.id if service is not None else ""
        return maintenance.find_operator_hold(self._tx, name, service, host)

    def _read_alert(self, queued: QueuedNotification, alert: Row[Any] | None) -> Notification:
        common = self._common(queued)
        since = alert.first_seen if alert is not None else queued.content.get("since", queued.created_at)
        is_resolved = alert is not None and alert.status == "resolved"
        state: NotificationState = queued.kind
        if queued.card and queued.kind == "alert" and is_resolved:
            state = "alert_over"
        ended = queued.content.get("closed_at", alert.last_seen if is_resolved and alert is not None else None)
        began = queued.content.get("opened_at", since)
        # An alert of an incident is acknowledged with it.
        acknowledgeable = (self._row(incidents, alert.incident_id) or alert) if alert is not None else None
        labels, annotations = common["labels"], common["annotations"]
        urls = build_links(self._inventory, common["service"], labels, annotations, queued.incident_id)
        if queued.kind == "report":  # it is about all services
            urls = {name: url for name, url in urls.items() if name == "console"}
        return Notification(
            state=state, **common, since=self._local_time(began), duration=None if ended is None else ended - began,
            open_for=max(0.0, self._now - began), incident=queued.incident_id, is_foreign=queued.is_foreign,
            acknowledged=self._acknowledgement(acknowledgeable),
            links=urls,
            buttons=self._alert_buttons(alert, acknowledgeable) if state != "alert_over" else {},
        )  # fmt: skip

    def _alert_buttons(
        self, alert: Row[Any] | None, acknowledgeable: Row[Any] | None
    ) -> dict[ButtonAction, Mapping[str, Any]]:
        if alert is None or acknowledgeable is None:
            return {}
        ids: dict[str, Any] = {"alert": alert.id, "since": int(alert.first_seen)}
        buttons: dict[ButtonAction, Mapping[str, Any]] = {}
        if acknowledgeable.acknowledged_at is None:
            is_alert = acknowledgeable is alert
            buttons["acknowledge"] = ids if is_alert else _ids_of_incident(acknowledgeable)
        if self._inventory.remediator.alertmanager_url is not None:
            buttons["silence"] = ids
        return buttons

    def _read_incident(self, queued: QueuedNotification, row: Row[Any]) -> Notification:
        common = self._common(queued)
        service = common["service"] or self._inventory.services.get(row.service)
        subject = service or self._inventory.find_subject(row.service)
        rows = self._tx.execute(
            select(actions)
            .where(actions.c.incident_id == row.id, actions.c.kind != "reset", actions.c.state != "cancelled")
            .order_by(actions.c.id)
        ).all()
        state = _state_of(row, rows) if queued.card else queued.kind
        started = [each for each in rows if each.state != "queued"]
        details = dict(common["details"])
        if row.probe and state not in _UP:
            details["probe"] = row.probe
        if queued.card:
            details |= _details_of_last_action(state, rows)
        if state == "approval":
            steps = (each.step or {} for each in rows if each.state == "queued")
            details["command"] = next((each.get("command", "") for each in steps), "")
        ended, began = row.closed_at, outage_began_at(row)
        restarts = self._restarts_in_vain(row, service) if state == "person_needed" else ()
        if restarts:  # they say more than the number of attempts
            details["why"] = started[-1].why or "" if started else ""
        agent = None if service is None else service.agent
        is_only_stuck = agent is not None and self._is_only_stuck(row.id)
        return Notification(
            state=state, restarts=restarts, next_try=self._next_try(row, subject, state), watched=self._watched(row),
            **{**common, "service": service, "details": details},
            since=self._local_time(began), duration=None if ended is None else ended - began,
            open_for=max(0.0, self._now - began),
            attempts=[self._attempt(each) for each in started[-ATTEMPTS_SHOWN:]],
            earlier_attempts=max(0, len(started) - ATTEMPTS_SHOWN),
            attempt=self._attempts_used(queued, subject, row.id, started),
            decision=self._decision(queued, row),
            recovered_by=row.recovered_by or "", acknowledged=self._acknowledgement(row),
            firing=self._firing_names(row.id), incident=row.id, is_of_host_alert=is_host_alert(row.service),
            is_of_stuck_agent=is_only_stuck,
            is_of_woken_agent=agent is not None and agent.wake is not None and not is_only_stuck,
            links=build_links(self._inventory, service, common["labels"], common["annotations"], row.id),
            buttons=self._incident_buttons(row, subject, rows),
        )  # fmt: skip

    def _restarts_in_vain(self, row: Row[Any], service: Service | None) -> list[Restart]:
        """Return the restarts that count, if the attempts are used up."""
        if service is None or row.person_needed_at is None:
            return []
        rules = self._inventory.remediation.for_service(service)
        if next_step(service, rules, read_action_history(self._tx, service.id, row.id, rules.window)) is not None:
            return []
        return [
            Restart(self._local_time(each.began), each.up_for, is_up=each.up_at is not None and each.down_at is None)
            for each in read_counted_restarts(self._tx, service.id, rules.window)
        ]

    def _next_try(self, row: Row[Any], service: Remediable | None, state: NotificationState) -> datetime | None:
        """Return when the back-off ends, if it is what holds the next attempt."""
        if service is None or row.state != "open" or state not in ("down", "could_not_restart", "person_needed"):
            return None
        if state == "down" and row.reason != "backing-off":
            return None
        rules = self._inventory.remediation.for_service(service)
        history = read_action_history(self._tx, service.id, row.id, rules.window)
        at = next_try_at(rules.backoff, history) if next_step(service, rules, history) is not None else None
        return None if at is None or at <= self._now else self._local_time(at)

    def _watched(self, row: Row[Any]) -> float | None:
        """Return for how many seconds the service was up before its incident was closed."""
        if row.state != "recovered":
            return None
        is_end = (timeline.c.incident_id == row.id) & (timeline.c.event == "incident_closed")
        detail = self._tx.scalar(select(timeline.c.detail).where(is_end)) or {}
        return detail.get("watched")

    def _decision(self, queued: QueuedNotification, row: Row[Any]) -> tuple[str, str, str]:
        """Return the present decision for a card, and otherwise the one at the time of the notification.

        A notification of a new outage shows the first decision about it.
        """
        if queued.card:
            return row.verb or "", row.reason or "", row.detail or ""
        in_outage = (timeline.c.incident_id == row.id) & (timeline.c.at >= outage_began_at(row))
        decisions = self._tx.execute(
            select(timeline.c.at, timeline.c.detail)
            .where(in_outage, timeline.c.event == "decision")
            .order_by(timeline.c.id)
        ).all()
        latest = [each for each in decisions if each.at <= queued.created_at][-1:] or decisions[:1]
        return next(
            (
                (each.detail["verb"], each.detail.get("reason") or "", each.detail.get("detail") or "")
                for each in latest
            ),
            ("", "", ""),
        )

    def _attempt(self, row: Row[Any]) -> Attempt:
        took = None if row.up_at is None else max(0.0, row.up_at - row.claimed_at)
        by = row.asked_by if row.requested_by == "person" else row.approved_by or ""
        at = self._local_time(row.claimed_at)
        reached = row.command != "failed" or row.exit_status is not None or row.counts == 1
        return Attempt(row.kind, row.state, row.why or "", by, at, took, row.component, reached)

    def _attempts_used(
        self, queued: QueuedNotification, service: Remediable | None, incident: int, started: Sequence[Row[Any]]
    ) -> tuple[int, int] | None:
        if "attempt" in queued.content:
            return int(queued.content["attempt"]), int(queued.content["attempts"])
        counted = [each for each in started if each.counts and not each.component]
        if service is None or not counted:
            return None
        rules = self._inventory.remediation.for_service(service)
        history = read_action_history(self._tx, service.id, incident, rules.window)
        step = next((step for step in rules.steps if step.kind == counted[-1].kind), next_step(service, rules, history))
        return None if step is None else (history.attempts.get(step.kind, 0), max_attempts(step, rules))

    def _acknowledgement(self, row: Row[Any] | None) -> tuple[str, datetime] | None:
        if row is None or row.acknowledged_at is None:
            return None
        return row.acknowledged_by, self._local_time(row.acknowledged_at)

    def _firing_names(self, incident: int) -> list[str]:
        is_firing = (alerts.c.incident_id == incident) & (alerts.c.status == "firing")
        return sorted(self._tx.scalars(select(alerts.c.name).where(is_firing).distinct()))

    def _is_only_stuck(self, incident: int) -> bool:
        """Whether the alerts of an agent's incident say that it is stuck, and none that it is down."""
        names = set(self._tx.scalars(select(alerts.c.name).where(alerts.c.incident_id == incident).distinct()))
        return AGENT_STUCK in names and not names.intersection(self._inventory.remediation.alerts)

    def _incident_buttons(
        self, row: Row[Any], service: Remediable | None, action_rows: Sequence[Row[Any]]
    ) -> dict[ButtonAction, Mapping[str, Any]]:
        if row.state != "open":
            return {}
        ids = _ids_of_incident(row)
        buttons: dict[ButtonAction, Mapping[str, Any]] = {}
        if row.acknowledged_at is None:
            buttons["acknowledge"] = ids
        if self._inventory.remediator.alertmanager_url is not None:
            buttons["silence"] = ids
        queued = next((each for each in action_rows if each.state == "queued" and each.approved_at is None), None)
        if queued is not None:
            buttons["approve"] = {**ids, "action": queued.id}
        if row.reason == "storm":
            buttons["storm"] = ids
        is_running = any(each.state == "running" for each in action_rows)
        can_restart = service is not None and service.control is not None and "restart" in service.control.options.verbs
        if can_restart and not is_running:
            buttons["restart"] = ids
        if (can_restart or isinstance(service, HostAlert)) and read_switch(self._tx).enabled:
            buttons["automation"] = ids
        return buttons


def _ids_of_incident(row: Row[Any]) -> dict[str, Any]:
    """Return what buttons of an incident send; `since` tells it from one of another record with the same id."""
    return {"incident": row.id, "since": int(row.opened_at)}


def _details_of_last_action(state: NotificationState, action_rows: Sequence[Row[Any]]) -> dict[str, Any]:
    """Return what a card shows of the last action."""
    if not action_rows:
        return {}
    last = action_rows[-1]
    if state == "approval":
        return {"action": last.id, "kind": last.kind}
    if state in ("down", "person_needed") and last.state in ("failed", "unknown"):
        return {"why": last.why or "", "output": (last.output or "")[-OUTPUT_SHOWN:]}
    if last.up_at is not None and state in ("restarted", "watched", "recovered"):
        return {"seconds": last.up_at - last.claimed_at}
    return {}


def _state_of(row: Row[Any], action_rows: Sequence[Row[Any]]) -> NotificationState:
    """Return the state that an incident's card shows."""
    if row.state != "open":
        return "recovered" if row.state == "recovered" else "unobserved"
    last = action_rows[-1] if action_rows else None
    if last is not None and last.state == "running" and last.kind != "stop" and not last.component:
        return "acting" if last.up_at is None else "restarted"
    if last is not None and last.state == "queued" and last.approved_at is None:
        return "approval"
    # No alert fires, or the service responds although one fires: it must stay up before the incident is closed.
    if row.verb == "nothing" or row.reason == "already-up":
        return "watched"
    return "person_needed" if row.person_needed_at is not None else "down"


def _is_quiet(hold: maintenance.OperatorHold | None, kind: NotificationKind) -> bool:
    """Whether nobody is mentioned: during maintenance, and while automation is off unless a person is needed."""
    if hold is None or hold.notify:
        return False
    return hold.reason == "maintenance" or kind != "person_needed"


def annotations_in_language(annotations: Mapping[str, str], language: Language) -> dict[str, str]:
    """Return the annotations in one language: `summary_zh` replaces `summary` if the language is Chinese.

    Receivers make links of annotations such as `runbook_url`, so those that must not become one are left out.
    """
    suffixes = {each: f"_{each}" for each in get_args(Language)}
    shown = {name: text for name, text in annotations.items() if not _is_url_name(name) or is_reference(text)}
    plain = {name: text for name, text in shown.items() if not name.endswith(tuple(suffixes.values()))}
    own = {name: text for name, text in shown.items() if name.endswith(suffixes[language])}
    return {**plain, **{name.removesuffix(suffixes[language]): text for name, text in own.items()}}


def _is_url_name(name: str) -> bool:
    return name.lower().endswith("url")
