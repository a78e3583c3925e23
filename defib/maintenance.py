"""`defib maintenance` and `defib automation`: switches that stop automatic actions."""

from collections.abc import Iterator, Mapping
from datetime import datetime, tzinfo
from typing import Any

from defib.output import format_time, print_json, print_lines, print_text
from defib.remediator_client import Connect, UnknownEntryError
from runtime.errors import DefibError


async def list_maintenance(connect: Connect, *, as_json: bool) -> int:
    """Print all active maintenance."""
    async with connect() as remediator:
        answer = await remediator.request("GET", "/api/v1/maintenance")
    if as_json:
        print_json(answer)
        return 0
    for each in answer["maintenance"]:
        print_lines([f"{each['id']:>6}  {describe_maintenance(each, remediator.zone)}"])
    if not answer["maintenance"]:
        print_text("no maintenance")
    return 0


def describe_maintenance(maintenance: Mapping[str, Any], zone: tzinfo | None) -> str:
    """Return what is in maintenance, until when, by whom and why."""
    until = format_time(maintenance["until"], zone)
    subject = f"{maintenance['scope']} {maintenance['name']}"
    paused = ", probing is paused" if maintenance.get("pause_probing") else ""
    return f"{subject}, until {until}{paused}, by {maintenance['asked_by']}: {maintenance['reason']}"


async def begin_maintenance(
    connect: Connect, scope: str, name: str, options: Mapping[str, Any], *, as_json: bool
) -> int:
    """Begin maintenance of a service, host or group; `options` is the rest of the request's body."""
    async with connect() as remediator:
        body = {"scope": scope, "name": name, **options}
        if "until" in options:
            body["until"] = _parse_until(options["until"], remediator.zone)
        answer = await remediator.request_named(scope, name, "POST", "/api/v1/maintenance", body=body)
    if as_json:
        print_json(answer)
    else:
        until = format_time(answer["until"], remediator.zone)
        effect = "no automatic actions, and no probes" if "pause_probing" in options else "no automatic actions"
        print_text(f"maintenance {answer['id']} of {scope} {name} until {until}: {effect}")
    return 0


def _parse_until(text: str, zone: Any) -> str:
    """Return a time in RFC 3339; one without an offset is in `zone`. Raises DefibError."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        example = "2026-11-24 18:00:00 or 2026-11-24T18:00:00+08:00"
        raise DefibError(f"argument --until: {text!r} is not a time (write {example})") from error
    return (at if at.tzinfo is not None else at.replace(tzinfo=zone).astimezone(zone)).isoformat()


async def end_maintenance(connect: Connect, number: int, *, as_json: bool) -> int:
    """End a maintenance."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("DELETE", f"/api/v1/maintenance/{number}")
        except UnknownEntryError:
            active = (await remediator.request("GET", "/api/v1/maintenance"))["maintenance"]
            ids = ", ".join(str(each["id"]) for each in active) or "none"
            raise UnknownEntryError(f"there is no active maintenance {number} (active: {ids})") from None
    if as_json:
        print_json(answer)
    else:
        print_text(f"maintenance {number} is ended")
    return 0


async def automation(connect: Connect, switch: str | None, reason: str, *, as_json: bool) -> int:
    """Print whether automatic actions are on, or switch them `on` or `off`."""
    async with connect() as remediator:
        if switch is None:
            answer = await remediator.request("GET", "/api/v1/automation")
        else:
            body = {"enabled": switch == "on", "reason": reason}
            answer = await remediator.request("PUT", "/api/v1/automation", body=body)
    if as_json:
        print_json(answer)
        return 0
    print_lines(describe_automation(answer, remediator.zone))
    return 0


def describe_automation(automation: Mapping[str, Any], zone: tzinfo | None) -> Iterator[str]:
    """Yield lines about whether automation is on, and who switched it."""
    since = ""
    if automation["at"]:
        detail = f": {automation['reason']}" if automation["reason"] else ""
        since = f" since {format_time(automation['at'], zone)}, switched by {automation['by']}{detail}"
    yield f"automation is {'on' if automation['enabled'] else 'off'}{since}"
    if not automation["by_inventory"]:
        yield "the configuration has `remediation: {automatic: false}`, which the switch cannot override"
