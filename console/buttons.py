"""The buttons of a service's page: from a submitted form to an operation, and why it was not done."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from console.forms import parse_number, parse_seconds
from fleet.inventory.model import Service
from remediator.execution.controls.runner import Verb
from remediator.http.views import read_record
from remediator.incidents import lifecycle
from remediator.operations import GateClosedError, NotFoundError, OperationError, Operations
from remediator.policy.situation import OVERRULABLE
from remediator.record.database import Database
from runtime.access.roles import Identity

VERBS: tuple[Verb, ...] = ("restart", "stop", "start")
BUTTONS = (*VERBS, "reset", "storm", "probe", "approve", "acknowledge", "silence", "maintenance")
NEEDS_REASON = ("stop", "silence", "maintenance")
REASON_LIMIT = 300  # characters


@dataclass(frozen=True)
class NotDone:
    """Why a button did nothing: the key of a text, or a message; and the gate that held it, which may be overruled."""

    button: str
    key: str = ""
    text: str = ""
    gate: str = ""
    overruled: tuple[str, ...] = ()  # gates that were overruled this time
    reason: str = ""
    component: str = ""  # that was to be restarted; empty: the whole service

    @property
    def can_overrule(self) -> bool:
        return self.gate in OVERRULABLE

    @property
    def path(self) -> str:
        """Where the button's form is sent, below the service's page."""
        return component_path(self.component) if self.component else self.button


def component_path(name: str) -> str:
    """Return where the form is sent that restarts a component, below the service's page."""
    return f"components/{quote(name, safe='')}/restart"


def not_done_because(button: str, error: Exception, form: Mapping[str, str], component: str = "") -> NotDone:
    """Return why an operation that a form asked for failed."""
    gate = error.code if isinstance(error, GateClosedError) else ""
    reason = form.get("reason", "").strip()[:REASON_LIMIT]
    return NotDone(button, "", str(error), gate, tuple(sorted(parse_gates(form))), reason, component)


class ServiceButtons:
    def __init__(self, operations: Operations, database: Database) -> None:
        self._operations, self._database = operations, database

    async def press(
        self, button: str, service: Service, form: Mapping[str, str], by: Identity, component: str = ""
    ) -> NotDone | None:
        """Do what a button says; returns why it was not done. Raises ApiError where the record cannot be read.

        `component` is the one that is restarted, empty for the whole service.
        """
        reason = form.get("reason", "").strip()[:REASON_LIMIT]
        if button in NEEDS_REASON and not reason:
            return NotDone(button, key="reason_missing")
        try:
            if component:
                await self._operations.restart_component(service.id, component, parse_gates(form), by, reason)
                return None
            return await self._do(button, service, form, reason, by)
        except (OperationError, ValueError) as error:
            if isinstance(error, NotFoundError) and not component:
                return NotDone(button, key="gone")
            return not_done_because(button, error, form, component)

    async def _do(
        self, button: str, service: Service, form: Mapping[str, str], reason: str, by: Identity
    ) -> NotDone | None:
        operations = self._operations
        verb = next((each for each in VERBS if each == button), None)
        if verb is not None:
            await operations.start_action(service.id, verb, parse_gates(form), by, reason)
        elif button == "probe":
            await operations.probe_now(service.id, by)
        elif button == "reset":
            await operations.reset_attempts(service.id, by)
        elif button == "storm":
            await operations.continue_in_storm(service.id, by, reason)
        elif button == "maintenance":
            seconds = parse_seconds(form.get("for", ""))
            await operations.begin_maintenance(
                "service", service.id, seconds=seconds, reason=reason, by=by, pause_probing="pause_probing" in form
            )
        elif button == "approve":
            await operations.approve(parse_number(form.get("action", "")), by)
        else:
            return await self._act_on_incident(button, service, form, reason, by)
        return None

    async def _act_on_incident(
        self, button: str, service: Service, form: Mapping[str, str], reason: str, by: Identity
    ) -> NotDone | None:
        """Acknowledge or silence the open incident of a service."""
        incident = await read_record(self._database, lifecycle.find_open, service.id)
        if incident is None:
            return NotDone(button, key="no_incident")
        if button == "silence":
            await self._operations.silence("incident", incident, parse_seconds(form.get("for", "")), by, reason)
        else:
            await self._operations.acknowledge("incident", incident, by)
        return None


def parse_gates(form: Mapping[str, str]) -> set[str]:
    """Return the gates that a form overrules."""
    return {*form.get("overrule", "").split(",")} & OVERRULABLE
