"""A pressed button: who may press it, taken once, carried out, answered in time.

Reference: https://open.feishu.cn/document/feishu-cards/card-callback-communication
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast, get_args
from zoneinfo import ZoneInfo

import structlog
from sqlalchemy import Connection, or_, select, update
from sqlalchemy.dialects.sqlite import insert

from fleet.inventory.model import Inventory
from fleet.inventory.notify import ButtonAction
from remediator.clients.peers import Alertmanager, PeerError
from remediator.engine.engine import Engine
from remediator.execution.controls.context import UnknownVerb
from remediator.incidents import actions, intake, lifecycle
from remediator.incidents.actions import Claim
from remediator.metrics import Metrics
from remediator.notifications import rendering
from remediator.policy import Decision
from remediator.record import switches
from remediator.record.database import Database, StorageError
from remediator.record.schema import alerts, notices, presses
from remediator.record.schema import incidents as incident_rows

ANSWER_WITHIN = 2.0  # seconds; Feishu waits for three
FRESH_FOR = 600.0  # seconds that a press may be old, or lie ahead of our clock
SILENCE_FOR = 2 * 3600.0
BIGGEST = 2**53
MICROSECONDS, MILLISECONDS = 1e14, 1e11  # Unix times above these are in those units
Kind = Literal["success", "info", "warning", "error"]
log = structlog.get_logger()


@dataclass(frozen=True)
class Toast:
    """What the presser is shown; `key` names the words."""

    kind: Kind
    key: str
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Press:
    """A button as it was pressed, in a channel whose sender was verified; `at` is Unix time."""

    event_id: str
    open_id: str
    at: float | None
    value: Mapping[str, Any]


class NotAPress(ValueError):  # noqa: N818 - it is an answer as much as an error
    """What arrived is no press of a button of ours."""


def read(event: Any, app_id: str, verification_token: str | None) -> Press:
    """The press in an event `card.action.trigger`. Raises NotAPress."""
    if not isinstance(event, dict):
        raise NotAPress("it is no event")
    header, body = _map(event, "header"), _map(event, "event")
    if header.get("event_type") != "card.action.trigger":
        raise NotAPress("it is no card.action.trigger")
    if header.get("app_id") != app_id:
        raise NotAPress("it is for another app")
    if verification_token is not None and header.get("token") != verification_token:
        raise NotAPress("its verification token is another")
    event_id, open_id = header.get("event_id"), _map(body, "operator").get("open_id")
    if not isinstance(event_id, str) or not event_id or not isinstance(open_id, str):
        raise NotAPress("it names no event or no person")
    return Press(event_id[:200], open_id[:200], _unix(header.get("create_time")), _map(_map(body, "action"), "value"))


def _map(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _unix(text: Any) -> float | None:
    try:
        at = float(text)
    except (TypeError, ValueError):
        return None
    return at / 1e6 if at > MICROSECONDS else at / 1e3 if at > MILLISECONDS else at


class Presses:
    """Takes presses; what they ask for is on the record before it is done."""

    def __init__(self, engine: Engine, database: Database, metrics: Metrics) -> None:
        self._engine, self._database, self._metrics = engine, database, metrics
        self._running: set[asyncio.Task[Toast]] = set()

    async def take(self, channel: str, press: Press, within: float = ANSWER_WITHIN) -> dict[str, Any]:
        """The answer to a press, as Feishu wants it, in time; what takes longer goes on."""
        inventory = self._engine.inventory
        answer = press.value.get("answer")
        task = asyncio.create_task(self._taken(channel, press, inventory))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        toast = Toast("info", "underway")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                toast = await asyncio.shield(task)
        known = answer if answer in get_args(ButtonAction) else "unknown"
        self._metrics.presses.labels(known, toast.key).inc()
        words = (await asyncio.to_thread(rendering.ours, inventory)).words["toasts"]
        return {"toast": {"type": toast.kind, "content": words[toast.key].format(*toast.said)}}

    async def drain(self) -> None:
        """Wait for the presses that are being carried out."""
        if self._running:
            await asyncio.wait(self._running)

    async def _taken(self, channel: str, press: Press, inventory: Inventory) -> Toast:
        person = inventory.notify.person(press.open_id)
        who = person[0] if person is not None else ""
        toast = self._refused(press, person[1].may if person is not None else [])
        try:
            if not await self._database.run_first(_begin, channel, press, who, self._database.clock.now()):
                toast = Toast("info", "again")
            else:
                toast = toast or await self._carried_out(
                    press, cast("ButtonAction", press.value["answer"]), who, inventory
                )
                await self._database.run_first(_end, press.event_id, toast.key)
        except StorageError as error:
            log.error("a press cannot be taken", error=str(error))  # noqa: TRY400 - it is its own explanation
            toast = Toast("error", "failed")
        except Exception:  # a press is where a task begins
            log.exception("a press broke", channel=channel, event=press.event_id)
            toast = Toast("error", "failed")
        log.info(
            "pressed", channel=channel, answer=press.value.get("answer"), open_id=press.open_id, who=who or None,
            outcome=toast.key,
        )  # fmt: skip
        return toast

    def _refused(self, press: Press, may: list[ButtonAction]) -> Toast | None:
        clock = self._database.clock
        if press.at is not None and abs(clock.unix(clock.now()) - press.at) > FRESH_FOR:
            return Toast("error", "stale")
        if press.value.get("answer") not in get_args(ButtonAction):
            return Toast("error", "not_understood")
        if press.value["answer"] not in may:
            return Toast("error", "not_allowed", (press.open_id,))
        return None

    async def _carried_out(self, press: Press, answer: ButtonAction, who: str, inventory: Inventory) -> Toast:
        about = _about(press)
        if not await self._database.run_first(_is_the_same, about):
            return Toast("warning", "over")
        if answer == "acknowledge":
            return await self._acknowledge(about, who)
        if answer == "silence":
            return await self._silence(about, who, inventory)
        if answer == "approve":
            return await self._approve(about, who)
        if answer == "automation":
            return await self._stop_automation(who, inventory)
        return await self._restart(about, who, inventory)

    async def _acknowledge(self, about: Mapping[str, int], who: str) -> Toast:
        now = self._database.clock.now()
        if "notice" in about:
            return await self._acknowledge_all(about["notice"], who)
        if "incident" in about:
            row = await self._database.run_first(lifecycle.acknowledge, about["incident"], who, now)
            ended = row is not None and row.state != "open"
        else:
            row = await self._database.run_first(intake.acknowledge, about.get("alert", 0), who, now)
            ended = row is not None and row.status != "firing"
        self._engine.wake(())
        if row is None:
            return Toast("error", "not_understood")
        if ended and row.acknowledged_by is None:
            return Toast("warning", "over")
        return Toast("success" if row.acknowledged_by == who else "info", "acknowledged", (row.acknowledged_by,))

    async def _acknowledge_all(self, notice: int, who: str) -> Toast:
        """Everything that one card of many tells."""
        now = self._database.clock.now()
        found = await self._database.run_first(acknowledge_told, notice, who, now)
        self._engine.wake(())
        return Toast("success", "acknowledged", (who,)) if found else Toast("warning", "over")

    async def _silence(self, about: Mapping[str, int], who: str, inventory: Inventory) -> Toast:
        labels = await self._database.run_first(_labels_of, about)
        endpoint = inventory.remediator.alertmanager_url
        if labels is None:
            return Toast("warning", "over")
        if endpoint is None:
            return Toast("error", "not_silenced", ("remediator.alertmanager_url",))
        clock = self._database.clock
        begins = clock.unix(clock.now())
        ends = begins + SILENCE_FOR
        alertmanager = Alertmanager(endpoint)
        try:
            silence = await alertmanager.silence(labels, begins, ends, who, "pressed on a card")
        except PeerError as error:
            return Toast("error", "not_silenced", (str(error),))
        finally:
            await alertmanager.close()
        await self._database.run_first(_silenced, about, who, silence, clock.now())
        await self._acknowledge(about, who)
        self._engine.wake()
        until = datetime.fromtimestamp(ends, ZoneInfo(inventory.notify.timezone))
        return Toast("success", "silenced", (until.strftime("%H:%M"),))

    async def _approve(self, about: Mapping[str, int], who: str) -> Toast:
        outcome = await self._database.run_first(
            actions.approve, about.get("action", 0), who, self._database.clock.now()
        )
        self._engine.wake()
        return Toast("success", "approved") if outcome == "approved" else Toast("warning", "not_queued")

    async def _stop_automation(self, who: str, inventory: Inventory) -> Toast:
        now = self._database.clock.now()

        def switch(connection: Connection) -> switches.Automation:
            return switches.switch_automation(
                connection, inventory.notify, enabled=False, by=who, reason="pressed on a card", now=now
            )

        switched = await self._database.run_first(switch)
        self._engine.wake()
        return Toast("success", "automation_off", (switched.by,))

    async def _restart(self, about: Mapping[str, int], who: str, inventory: Inventory) -> Toast:
        row = await self._database.run_first(_incident, about.get("incident", 0))
        service = inventory.services.get(row.service) if row is not None else None
        if row is None or row.state != "open" or service is None:
            return Toast("warning", "over")
        try:
            claimed = await self._engine.act_for_person(service, "restart", (), who)
        except UnknownVerb as error:
            return Toast("error", "held", (str(error),))
        if isinstance(claimed, Claim):
            return Toast("success", "begun")
        held = claimed.reason or "" if isinstance(claimed, Decision) else claimed
        reasons = (await asyncio.to_thread(rendering.ours, inventory)).words["reasons"]
        return Toast("warning", "held", (reasons.get(held, held),))


def _about(press: Press) -> dict[str, int]:
    """What the button was about: numbers of the record."""
    known = ((name, press.value.get(name)) for name in ("incident", "alert", "action", "notice", "since"))
    return {name: number for name, number in known if isinstance(number, int) and abs(number) < BIGGEST}


def _begin(connection: Connection, channel: str, press: Press, who: str, now: float) -> bool:
    """Keep a press before anything is done; False where it was taken before."""
    row = {
        "event_id": press.event_id, "at": now, "channel": channel, "open_id": press.open_id, "who": who,
        "answer": str(press.value.get("answer", ""))[:40],
        "about": _about(press),
    }  # fmt: skip
    return bool(connection.execute(insert(presses).values(**row).on_conflict_do_nothing()).rowcount)


def _end(connection: Connection, event_id: str, outcome: str) -> None:
    connection.execute(update(presses).where(presses.c.event_id == event_id).values(outcome=outcome))


def _incident(connection: Connection, number: int) -> Any:
    return connection.execute(select(incident_rows).where(incident_rows.c.id == number)).first()


def acknowledge_told(connection: Connection, notice: int, by: str, now: float) -> int:
    """Acknowledge all that the message of a notice tells and that lasts; how many there were."""
    message = select(notices.c.message_id).where(notices.c.id == notice).scalar_subquery()
    together = or_(notices.c.id == notice, notices.c.told_in == notice, notices.c.message_id == message)
    rows = connection.execute(
        select(
            notices.c.kind, notices.c.incident_id, notices.c.alert_id, alerts.c.incident_id.label("alert_s_incident")
        )
        .join(alerts, notices.c.alert_id == alerts.c.id, isouter=True)
        .where(together)
    ).all()
    # An alert's incident may be another than it was told with.
    of_incidents = {row.alert_s_incident if row.kind == "alert" else row.incident_id for row in rows} - {None}
    of_alerts = {row.alert_id for row in rows if row.kind == "alert" and row.alert_s_incident is None}
    found = [lifecycle.acknowledge(connection, each, by, now) for each in sorted(of_incidents)]
    taken = sum(1 for row in found if row is not None and row.state == "open")
    strangers = [intake.acknowledge(connection, each, by, now) for each in sorted(of_alerts)]
    return taken + sum(1 for row in strangers if row is not None and row.status == "firing")


def _is_the_same(connection: Connection, about: Mapping[str, int]) -> bool:
    """Whether a button's numbers are still of what it was made for: those of a lost record begin anew."""
    of = {"incident": incident_rows.c.opened_at, "alert": alerts.c.first_seen, "notice": notices.c.created_at}
    for name, began in of.items():
        if name in about:
            at = connection.scalar(select(began).where(began.table.c.id == about[name]))
            return at is not None and int(at) == about.get("since")
    return True


def _labels_of(connection: Connection, about: Mapping[str, int]) -> Mapping[str, str] | None:
    """What is to be silenced: all alerts of an incident's service, or one alert; None where it is over."""
    if "incident" in about:
        row = _incident(connection, about["incident"])
        return {"service": row.service} if row is not None and row.state == "open" else None
    alert = connection.execute(select(alerts).where(alerts.c.id == about.get("alert", 0))).first()
    return dict(alert.labels) if alert is not None and alert.status == "firing" else None


def _silenced(connection: Connection, about: Mapping[str, int], who: str, silence: str, now: float) -> None:
    if "incident" in about:
        lifecycle.note(connection, about["incident"], now, "silenced", by=who, silence=silence)
