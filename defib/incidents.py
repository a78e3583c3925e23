"""`defib incidents`, `list incidents`, `note`, `acknowledge`, `silence`, `approve` and `reset`."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any
from urllib.parse import urlencode

from defib.output import (
    format_age,
    format_table,
    format_time,
    parenthesized,
    print_json,
    print_lines,
    print_text,
    terminal_width,
)
from defib.remediator_client import Connect, RemediatorClient, UnknownEntryError

EVIDENCE_LINES = 12  # of each piece of evidence
LISTED = 5  # IDs in an error message
TABLE_HEAD = ("ID", "STATE", "SINCE", "LASTED", "SERVICE", "WHAT")
WHAT = TABLE_HEAD.index("WHAT")


async def show_incidents(connect: Connect, number: int | None, *, as_json: bool) -> int:
    """Print the newest incidents, or one incident with its timeline, actions and evidence."""
    async with connect() as remediator:
        if number is None:
            answer = await remediator.request("GET", "/api/v1/incidents")
        else:
            try:
                answer = await remediator.request("GET", f"/api/v1/incidents/{number}")
            except UnknownEntryError:
                raise await _unknown_incident(remediator, number) from None
    if as_json:
        print_json(answer)
    elif number is not None:
        print_lines(_format_incident(answer, remediator.zone))
    else:
        _print_incidents(answer["incidents"], remediator.zone)
    return 0


async def list_incidents(connect: Connect, state: str, service: str, limit: int, *, as_json: bool) -> int:
    """Print the newest incidents, first those that are open; `state` is open, closed or all."""
    incidents: list[dict[str, Any]] = []
    async with connect() as remediator:
        for each in ("open", "closed") if state == "all" else (state,):
            incidents += await _read_incidents(remediator, {"state": each, "service": service}, limit - len(incidents))
    if as_json:
        print_json({"incidents": incidents})
    else:
        _print_incidents(incidents, remediator.zone)
    return 0


async def _read_incidents(remediator: RemediatorClient, wanted: Mapping[str, str], limit: int) -> list[dict[str, Any]]:
    incidents: list[dict[str, Any]] = []
    while len(incidents) < limit:
        before = {"before": incidents[-1]["id"]} if incidents else {}
        page = (await remediator.request("GET", f"/api/v1/incidents?{urlencode({**wanted, **before})}"))["incidents"]
        incidents += page
        if not page:
            break
    return incidents[:limit]


def _print_incidents(incidents: Sequence[Mapping[str, Any]], zone: tzinfo | None) -> None:
    if not incidents:
        print_text("no incidents")
        return
    now = datetime.now(UTC).isoformat()
    print_text(
        format_table([TABLE_HEAD, *(table_row(each, now, zone) for each in incidents)], terminal_width(), cut=WHAT)
    )


def table_row(incident: Mapping[str, Any], now: str, zone: tzinfo | None) -> list[str]:
    """Return an incident as a row of a table with `TABLE_HEAD`."""
    started = incident["down_at"] or incident["opened_at"]
    lasted = format_age(started, incident["closed_at"] or now)
    return [
        str(incident["id"]), incident["state"], format_time(started, zone), lasted, incident["service"],
        "; ".join(_describe(incident)),
    ]  # fmt: skip


def _describe(incident: Mapping[str, Any]) -> Iterator[str]:
    """Yield who has seen to an incident or ended it, what holds Defib back, and what was seen."""
    if incident["closed_at"]:
        if incident["recovered_by"]:
            yield f"recovered by {incident['recovered_by']}"
        return
    if incident["acknowledged_by"]:
        yield f"acknowledged by {incident['acknowledged_by']}"
    if incident["verb"]:
        decision = " ".join(filter(None, [incident["verb"], incident["reason"]]))
        yield decision + parenthesized(incident["detail"] or "")
    if incident["probe"]:
        yield incident["probe"]


async def acknowledge(connect: Connect, number: int, *, as_json: bool) -> int:
    """Acknowledge an incident."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("POST", f"/api/v1/incidents/{number}/acknowledge", body={})
        except UnknownEntryError:
            raise await _unknown_incident(remediator, number) from None
    if as_json:
        print_json(answer)
    else:
        print_text(f"incident {number} is acknowledged by {answer['acknowledged_by']}")
    return 0


async def add_note(connect: Connect, number: int, text: str, *, as_json: bool) -> int:
    """Add a note to the timeline of an incident."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("POST", f"/api/v1/incidents/{number}/notes", body={"text": text})
        except UnknownEntryError:
            raise await _unknown_incident(remediator, number) from None
    if as_json:
        print_json(answer)
    else:
        print_text(f"the note was added to incident {number}")
    return 0


async def silence_incident(connect: Connect, number: int, body: Mapping[str, Any], *, as_json: bool) -> int:
    """Silence the alerts of an incident's service; `body` has `for` and `comment`."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("POST", f"/api/v1/incidents/{number}/silence", timeout=60.0, body=body)
        except UnknownEntryError:
            raise await _unknown_incident(remediator, number) from None
    return _print_silence(answer, f"incident {number}", remediator.zone, as_json=as_json)


async def silence_alert(connect: Connect, number: int, body: Mapping[str, Any], *, as_json: bool) -> int:
    """Silence one alert; `body` has `for` and `comment`."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("POST", f"/api/v1/alerts/{number}/silence", timeout=60.0, body=body)
        except UnknownEntryError:
            alerts = (await remediator.request("GET", "/api/v1/alerts"))["alerts"]
            firing = [each["id"] for each in alerts if each["status"] == "firing"]
            raise UnknownEntryError(f"there is no alert {number}{_list_ids('firing', firing)}") from None
    return _print_silence(answer, f"alert {number}", remediator.zone, as_json=as_json)


def _print_silence(answer: Mapping[str, Any], subject: str, zone: tzinfo | None, *, as_json: bool) -> int:
    if as_json:
        print_json(answer)
    else:
        print_text(f"{subject} is silenced until {format_time(answer['until'], zone)}")
    return 0


async def approve(connect: Connect, action: int, *, as_json: bool) -> int:
    """Approve an action that waits for approval."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("POST", f"/api/v1/actions/{action}/approve")
        except UnknownEntryError:
            actions = (await remediator.request("GET", "/api/v1/actions"))["actions"]
            waiting = [each["id"] for each in actions if each["state"] == "queued"]
            raise UnknownEntryError(
                f"there is no action {action}{_list_ids('waiting for approval', waiting)}"
            ) from None
    if as_json:
        print_json(answer)
    else:
        print_text(f"action {action} is approved; it starts as soon as no gate holds it back")
    return 0


async def reset(connect: Connect, service: str, *, as_json: bool) -> int:
    """Reset the attempts of a service."""
    async with connect() as remediator:
        answer = await remediator.request_named("service", service, "POST", "/api/v1/services/{name}/reset")
    if as_json:
        print_json(answer)
    else:
        print_text(f"the attempts of {service} are reset")
    return 0


async def continue_in_storm(connect: Connect, service: str, reason: str, *, as_json: bool) -> int:
    """Let automation continue in the storm of a service's host group."""
    async with connect() as remediator:
        path = "/api/v1/services/{name}/continue-in-storm"
        answer = await remediator.request_named("service", service, "POST", path, body={"reason": reason})
    if as_json:
        print_json(answer)
    else:
        group = f"host group {answer['group']}" if answer["group"] else "services without a host group"
        print_text(f"{group}: automation continues in this storm until {format_time(answer['until'], remediator.zone)}")
    return 0


async def _unknown_incident(remediator: RemediatorClient, number: int) -> UnknownEntryError:
    incidents = (await remediator.request("GET", "/api/v1/incidents"))["incidents"]
    newest = [each["id"] for each in incidents[:LISTED]]
    return UnknownEntryError(f"there is no incident {number}{_list_ids('the newest', newest)}")


def _list_ids(label: str, ids: list[int]) -> str:
    return f" ({label}: {', '.join(map(str, ids)) or 'none'})"


def _format_line(incident: Mapping[str, Any], zone: tzinfo | None) -> str:
    decision = " ".join(str(incident[key]) for key in ("verb", "reason") if incident[key])
    if incident["acknowledged_by"]:
        decision += f", acknowledged by {incident['acknowledged_by']}"
    decision += parenthesized(incident["probe"])
    ended = f"until {format_time(incident['closed_at'], zone)}" if incident["closed_at"] else decision
    started = format_time(incident["down_at"] or incident["opened_at"], zone)
    return f"{incident['id']:>6}  {incident['state']:<10}  {started}  {incident['service']}  {ended}"


def _format_incident(incident: Mapping[str, Any], zone: tzinfo | None) -> list[str]:
    lines = [_format_line(incident, zone)]
    if incident["probe"]:
        lines.append(f"    last failed probe: {incident['probe']}")
    for event in incident["timeline"]:
        detail = ", ".join(f"{name} {value}" for name, value in event["detail"].items() if value not in (None, ""))
        lines.append(f"    {format_time(event['at'], zone)}  {event['event']:<13} {detail}".rstrip())
    for action in incident["actions"]:
        lines += _format_action(action)
    return lines


def _format_action(action: Mapping[str, Any]) -> list[str]:
    approved = f", approved by {action['approved_by']}" if action["approved_by"] else ""
    requested = f"requested by {action['asked_by']}{approved}"
    component = f" component {action['component']}" if action["component"] else ""
    lines = [f"  action {action['id']}: {action['kind']}{component}, {action['state']}, {requested}"]
    for name in ("before", "after"):
        facts = ", ".join(f"{key} {value}" for key, value in (action[name] or {}).items())
        lines += [f"    {name}: {facts}"] if facts else []
    for evidence in [*action["evidence"], {"name": "output", "text": action["output"] or ""}]:
        text = evidence["text"].strip().splitlines()
        # The end of logs, the beginning of sorted lists.
        shown = text[-EVIDENCE_LINES:] if evidence["name"] in ("logs", "output") else text[:EVIDENCE_LINES]
        lines += [f"    {evidence['name']}:", *(f"      {line}" for line in shown)]
    return lines
