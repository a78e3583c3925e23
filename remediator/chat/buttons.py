"""Pressed buttons: check who pressed, carry the operation out once, and respond in time.

The modules of a chat service parse its events into a `ButtonPress`, and turn a `ToastText` into its response.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast, get_args
from zoneinfo import ZoneInfo

import structlog

from fleet.inventory.model import Inventory
from fleet.inventory.notify import ButtonAction, Person
from remediator.metrics import RemediatorMetrics
from remediator.notifications import rendering
from remediator.operations import (
    ConflictError,
    GateClosedError,
    NotFoundError,
    OperationError,
    Operations,
    UnavailableError,
)
from remediator.record import button_presses, queries
from remediator.record.audit import AuditLog
from remediator.record.database import Database, StorageError
from remediator.record.queries import Subject
from runtime.access.audit import AuditEntry
from runtime.access.roles import Identity, Role

MAX_AGE = 600.0  # seconds by which a press may be older or newer than our clock
SILENCE_FOR = 2 * 3600.0
MAX_ID = 2**53
ToastType = Literal["success", "info", "warning", "error"]
log = structlog.get_logger()


@dataclass(frozen=True)
class Toast:
    """The message that is shown to the person who pressed; `key` names its text, `values` fill it in."""

    type: ToastType
    key: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToastText:
    """A toast in the language of the inventory."""

    type: ToastType
    text: str


@dataclass(frozen=True)
class ButtonPress:
    """A pressed button, from a channel whose sender was verified; `at` is a Unix time, None if the event has none."""

    event_id: str
    open_id: str
    at: float | None
    value: Mapping[str, Any]


class ButtonHandler:
    """Carries pressed buttons out. Each is recorded before its operation starts."""

    def __init__(
        self, operations: Operations, database: Database, metrics: RemediatorMetrics, audit_log: AuditLog
    ) -> None:
        self._operations, self._database, self._metrics, self._audit_log = operations, database, metrics, audit_log
        self._running: set[asyncio.Task[Toast]] = set()

    async def handle(self, channel: str, press: ButtonPress, within: float) -> ToastText:
        """Return what to show to the person after at most `within` seconds; the operation continues if it lasts."""
        inventory = self._database.inventory
        task = asyncio.create_task(self._handle(channel, press, inventory))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        toast = Toast("info", "underway")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                toast = await asyncio.shield(task)
        action = press.value.get("answer")
        self._metrics.presses.labels(action if action in get_args(ButtonAction) else "unknown", toast.key).inc()
        texts = (await asyncio.to_thread(rendering.shipped_templates, inventory.notify.language)).words["toasts"]
        return ToastText(toast.type, texts[toast.key].format(*toast.values))

    async def drain(self) -> None:
        """Wait for the operations in progress."""
        if self._running:
            await asyncio.wait(self._running)

    async def _handle(self, channel: str, press: ButtonPress, inventory: Inventory) -> Toast:
        person = inventory.notify.person(press.open_id)
        name = person[0] if person is not None else ""
        toast = self._check(press, person[1] if person is not None else None)
        try:
            if not await self._database.write_with_priority(
                button_presses.add,
                event_id=press.event_id,
                channel=channel,
                open_id=press.open_id,
                who=name,
                button=str(press.value.get("answer", ""))[:40],
                ids=_parse_ids(press),
            ):
                toast = Toast("info", "again")
            else:
                by = Identity(name or "(unknown)", _role_of(person), "chat", press.open_id)
                if toast is not None and toast.key == "not_allowed":
                    button = str(press.value["answer"])
                    await self._audit_log.write(AuditEntry.of(by, button, outcome="refused", detail="not allowed"))
                toast = toast or await self._carry_out(press, by, inventory)
                await self._database.write_with_priority(button_presses.set_outcome, press.event_id, toast.key)
        except StorageError as error:
            log.error("button_press_not_stored", error=str(error))  # noqa: TRY400 - no traceback needed
            toast = Toast("error", "failed")
        except Exception:  # a press is where a task begins
            log.exception("button_press_failed", channel=channel, event_id=press.event_id)
            toast = Toast("error", "failed")
        log.info(
            "button_pressed", channel=channel, answer=press.value.get("answer"), open_id=press.open_id,
            who=name or None, outcome=toast.key,
        )  # fmt: skip
        return toast

    def _check(self, press: ButtonPress, person: Person | None) -> Toast | None:
        """Return the toast for a press that is too old or has no time, is unknown or is not allowed."""
        clock = self._database.clock
        if press.at is None or abs(clock.unix(clock.now()) - press.at) > MAX_AGE:
            return Toast("error", "stale")
        if press.value.get("answer") not in get_args(ButtonAction):
            return Toast("error", "not_understood")
        if person is None or not person.may_press(press.value["answer"]):
            return Toast("error", "not_allowed", (press.open_id,))
        return None

    async def _carry_out(self, press: ButtonPress, by: Identity, inventory: Inventory) -> Toast:
        """Run the operation of a button and return its toast."""
        action, ids = cast("ButtonAction", press.value["answer"]), _parse_ids(press)
        if not await self._database.read(button_presses.ids_match_record, ids):
            return Toast("warning", "over")
        try:
            return await self._run_operation(action, ids, by, inventory)
        except GateClosedError as error:
            reasons = (await asyncio.to_thread(rendering.shipped_templates, inventory.notify.language)).words["reasons"]
            return Toast("warning", "held", (reasons.get(error.code, error.code),))
        except OperationError as error:
            return _toast_of_error(error)

    async def _run_operation(
        self, action: ButtonAction, ids: Mapping[str, int], by: Identity, inventory: Inventory
    ) -> Toast:
        subject: Subject = "incident" if "incident" in ids else "alert"
        if action == "acknowledge":
            return await self._acknowledge(subject, ids, by)
        if action == "silence":
            comment = "silenced with a button on a card"
            ends = await self._operations.silence(subject, ids.get(subject, 0), SILENCE_FOR, by, comment)
            until = datetime.fromtimestamp(ends, ZoneInfo(inventory.notify.timezone))
            return Toast("success", "silenced", (until.strftime("%H:%M"),))
        if action == "approve":
            await self._operations.approve(ids.get("action", 0), by)
            return Toast("success", "approved")
        if action == "automation":
            switch = await self._operations.switch_automation(
                enabled=False, by=by, reason="switched off with a button on a card"
            )
            return Toast("success", "automation_off", (switch.by,))
        if action == "storm":
            return await self._continue_in_storm(ids, by, inventory)
        return await self._restart(ids, by, inventory)

    async def _acknowledge(self, subject: Subject, ids: Mapping[str, int], by: Identity) -> Toast:
        if "notification" in ids:
            await self._operations.acknowledge_message(ids["notification"], by)
            return Toast("success", "acknowledged", (by.label,))
        acknowledged = await self._operations.acknowledge(subject, ids.get(subject, 0), by)
        return Toast("success" if acknowledged.by == by.label else "info", "acknowledged", (acknowledged.by,))

    async def _continue_in_storm(self, ids: Mapping[str, int], by: Identity, inventory: Inventory) -> Toast:
        service = await self._database.read(queries.find_open_service, ids.get("incident", 0))
        if service is None or inventory.find_subject(service) is None:
            return Toast("warning", "over")
        _, ends = await self._operations.continue_in_storm(service, by, "continued with a button on a card")
        until = datetime.fromtimestamp(self._database.clock.unix(ends), ZoneInfo(inventory.notify.timezone))
        return Toast("success", "storm", (until.strftime("%H:%M"),))

    async def _restart(self, ids: Mapping[str, int], by: Identity, inventory: Inventory) -> Toast:
        service = await self._database.read(queries.find_open_service, ids.get("incident", 0))
        if service is None or service not in inventory.services:
            return Toast("warning", "over")
        await self._operations.start_action(service, "restart", (), by)
        return Toast("success", "begun")


def _role_of(person: tuple[str, Person] | None) -> Role:
    if person is None:
        return Role.VIEWER
    return Role(person[1].role or ("admin" if person[1].may_press("automation") else "operator"))


def _toast_of_error(error: OperationError) -> Toast:
    if error.code in ("over", "not_queued"):
        return Toast("warning", error.code)
    if error.code == "unknown_action":
        return Toast("warning", "not_queued")
    if error.code == "not_silenced":
        return Toast("error", "not_silenced", (str(error),))
    if isinstance(error, NotFoundError):
        return Toast("error", "not_understood")
    if isinstance(error, UnavailableError) and error.code != "stopping":
        return Toast("error", "failed")
    return Toast("warning" if isinstance(error, ConflictError) else "error", "held", (str(error),))


def _parse_ids(press: ButtonPress) -> dict[str, int]:
    """Return the ids that a button carries, and `since`, by which `ids_match_record` recognizes them."""
    names = ("incident", "alert", "action", "notice", "notification", "since")
    values = ((name, press.value.get(name)) for name in names)
    # Cards that were sent before 0.2 call it `notice`.
    return {
        "notification" if name == "notice" else name: number
        for name, number in values
        if isinstance(number, int) and abs(number) < MAX_ID
    }
