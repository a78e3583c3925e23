"""`defib explain`: what the remediator does about a service, and which gates hold it back."""

from collections.abc import Iterator, Mapping
from datetime import tzinfo
from typing import Any, get_args

from defib.output import format_time, parenthesized, print_json, print_lines
from defib.remediator_client import Connect, RemediatorClient
from fleet.inventory.agents import AGENT_STUCK
from fleet.inventory.model import is_host_alert
from remediator.policy.situation import Refusal

HOST_GATES = "the gates stopped-by-hand, healing-itself and starting are open if the host does not answer"


async def explain(connect: Connect, service: str, *, as_json: bool, verbose: bool) -> int:
    """Print a summary and the gates that are closed, or all gates with `verbose`."""
    async with connect() as remediator:
        path = "/api/v1/services/{name}/explain"
        answer = await remediator.request_named("service", service, "GET", path, timeout=30.0)
    if as_json:
        print_json(answer)
    else:
        lines = _format(answer, _first_alert(remediator, service), remediator.zone, verbose=verbose)
        print_lines(lines)
    return 0


def _first_alert(remediator: RemediatorClient, service: str) -> str:
    """Return the name of the first alert that starts an action for a service."""
    inventory = remediator.inventory
    alerts = inventory.remediation.for_service(inventory.find_subject(service)).alerts
    return str(alerts[0]) if isinstance(alerts, list) and alerts else "its alert"


def _format(answer: Mapping[str, Any], alert: str, zone: tzinfo | None, *, verbose: bool) -> Iterator[str]:
    yield summarize(answer, alert, zone)
    up = _status(answer) == "up"
    for gate in answer["gates"]:
        if verbose or not (gate["open"] or (up and gate["gate"] == "already-up")):
            detail = f": {gate['detail']}" if gate["detail"] else ""
            yield f"  {'open  ' if gate['open'] else 'closed'}  {gate['gate']}{detail}{_until(gate, zone)}"
    if answer["attempts"] or verbose:
        used = ", ".join(f"{kind} {count}" for kind, count in answer["attempts"].items()) or "none"
        yield f"  attempts used: {used}; next step: {answer['next_step'] or 'none'}"
    if verbose:
        yield f"  {HOST_GATES}"
    if answer["caution"]:
        yield f"  {answer['caution']}"
    if answer["decided_again_in_seconds"] is not None:
        yield f"  next decision in {answer['decided_again_in_seconds']:.0f} s, or when something changes"


def summarize(answer: Mapping[str, Any], alert: str, zone: tzinfo | None) -> str:
    """Return one line: whether the service is up, and what the remediator does now, or would do if it went down.

    `alert` is the alert that would start an action.
    """
    service, status, decision = answer["service"], _status(answer), answer["decision"]
    head = f"the status of {service} is unknown" if status == "unknown" else f"{service} is {status}"
    if status == "down" and AGENT_STUCK in answer["firing"] and alert not in answer["firing"]:
        head = f"{service} is stuck"
    if is_host_alert(service):
        head = f"{service} fires" if answer["firing"] else f"{service} does not fire"
    if decision["verb"] == "act":
        component = f" component {answer['component']}" if answer.get("component") else ""
        return f"{head}; now: {answer['next_step']}{component}"
    reason = f"{decision['reason']}{parenthesized(decision['detail'])}"
    if decision["verb"] == "wait":
        gate: Mapping[str, Any] = next((each for each in answer["gates"] if each["gate"] == decision["reason"]), {})
        return f"{head}; waiting: {reason}{_until(gate, zone)}"
    if decision["verb"] == "refuse":
        return f"{head}; {_format_refusal(decision, ', '.join(answer['firing']))}"
    consequence = _consequence(answer, alert, zone)
    if is_host_alert(service):
        return f"{head}; next: {consequence}"
    if status == "down":
        return f"{head}, but no alert fires yet; next: {consequence}"
    return f"{head}; nothing to do. If it went down now: {consequence}"


def _format_refusal(decision: Mapping[str, Any], firing: str) -> str:
    if decision["reason"] == "already-up":
        return f"nothing to do, although {firing} still fires"
    if decision["reason"] == "not-an-alert-to-act-on":
        return f"no action: no alert in remediation.alerts fires (firing: {firing})"
    return f"no action: {decision['reason']}{parenthesized(decision['detail'])}"


def _status(answer: Mapping[str, Any]) -> str:
    if "up" not in answer:  # an earlier remediator
        closed = {gate["gate"] for gate in answer["gates"] if not gate["open"]}
        return "unknown" if "blind" in closed else "up" if "already-up" in closed else "down"
    return "unknown" if answer["up"] is None else "up" if answer["up"] else "down"


def _consequence(answer: Mapping[str, Any], alert: str, zone: tzinfo | None) -> str:
    """Return what would happen if the service were down, by the first gate that would be closed then."""
    closed = [gate for gate in answer["gates"] if not gate["open"] and gate["gate"] not in ("already-up", "blind")]
    if not closed:
        return f"{answer['next_step']} after {alert} fires"
    gate = closed[0]
    reason = f"{gate['gate']}{parenthesized(gate['detail'])}"
    if gate["gate"] in get_args(Refusal):
        return f"no action: {reason}"
    return f"{answer['next_step']} after {alert} fires, but held back by {reason}{_until(gate, zone)}"


def _until(gate: Mapping[str, Any], zone: tzinfo | None) -> str:
    return f" until {format_time(gate['until'], zone)}" if gate.get("until") else ""
