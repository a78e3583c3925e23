"""`defib token`, `defib session` and `defib audit`: who has access, and what was done with it."""

import sys
from datetime import tzinfo
from typing import Any
from urllib.parse import quote

from defib.output import format_time, print_json, print_lines, print_text
from defib.remediator_client import Connect, UnknownEntryError

MAX_PAGE = 1000  # entries in a response of the API


async def list_tokens(connect: Connect, *, as_json: bool) -> int:
    """Print the API tokens."""
    async with connect() as remediator:
        answer = await remediator.request("GET", "/api/v1/tokens")
    if as_json:
        print_json(answer)
        return 0
    zone = remediator.zone
    for each in answer["tokens"]:
        used = format_time(each["last_used_at"], zone) if each["last_used_at"] else "never"
        created = f"created {format_time(each['created_at'], zone)} by {each['created_by']}"
        print_lines([f"{each['name']:<20} {each['role']:<8} {created}, last used {used}{_format_expiry(each, zone)}"])
    if not answer["tokens"]:
        print_text("no API tokens")
    return 0


def _format_expiry(token: dict[str, Any], zone: tzinfo | None) -> str:
    if not token["expires_at"]:
        return ""
    return f", {'expired' if token['expired'] else 'expires'} {format_time(token['expires_at'], zone)}"


async def create_token(connect: Connect, name: str, role: str, expires_in: str | None, *, as_json: bool) -> int:
    """Create an API token and print it, once."""
    async with connect() as remediator:
        body = {"name": name, "role": role, "expires_in": expires_in}
        answer = await remediator.request("POST", "/api/v1/tokens", body=body)
    if as_json:
        print_json(answer)
        return 0
    print_text(answer["token"])
    expires = f" until {format_time(answer['expires_at'], remediator.zone)}" if answer["expires_at"] else ""
    print_text(f"{name} has the role {role}{expires}. The token is not stored and cannot be shown again.", sys.stderr)
    return 0


async def revoke_token(connect: Connect, name: str, *, as_json: bool) -> int:
    """Revoke an API token."""
    async with connect() as remediator:
        try:
            answer = await remediator.request("DELETE", f"/api/v1/tokens/{quote(name, safe='')}")
        except UnknownEntryError:
            tokens = (await remediator.request("GET", "/api/v1/tokens"))["tokens"]
            names = ", ".join(each["name"] for each in tokens) or "none"
            raise UnknownEntryError(f"there is no API token {name!r} (there are: {names})") from None
    if as_json:
        print_json(answer)
    else:
        print_text(f"the API token {name} is revoked")
    return 0


async def list_sessions(connect: Connect, *, as_json: bool) -> int:
    """Print the sessions of people who signed in with a browser."""
    async with connect() as remediator:
        answer = await remediator.request("GET", "/api/v1/sessions")
    if as_json:
        print_json(answer)
        return 0
    zone = remediator.zone
    for each in answer["sessions"]:
        times = f"since {format_time(each['created_at'], zone)}, last used {format_time(each['last_used_at'], zone)}"
        print_lines([f"{each['id']}  {each['user']} ({each['method']}) at {each['address']}, {times}"])
    if not answer["sessions"]:
        print_text("no sessions")
    return 0


async def end_session(connect: Connect, number: str, *, as_json: bool) -> int:
    """End a session."""
    async with connect() as remediator:
        answer = await remediator.request("DELETE", f"/api/v1/sessions/{quote(number, safe='')}")
    if as_json:
        print_json(answer)
    else:
        print_text(f"the session {number} is ended")
    return 0


async def show_audit(connect: Connect, limit: int, *, as_json: bool) -> int:
    """Print the newest entries of the audit log, the newest last."""
    entries: list[dict[str, Any]] = []
    async with connect() as remediator:
        while len(entries) < limit:
            before = f"&before={entries[-1]['id']}" if entries else ""
            size = min(MAX_PAGE, limit - len(entries))
            page = (await remediator.request("GET", f"/api/v1/audit?limit={size}{before}"))["audit"]
            entries += page
            if len(page) < size:
                break
    if as_json:
        print_json({"audit": entries})
        return 0
    print_lines([_format_entry(each, remediator.zone) for each in reversed(entries)] or ["no entries"])
    return 0


def _format_entry(entry: dict[str, Any], zone: tzinfo | None) -> str:
    who = f"{entry['name']} by {entry['means']}" + (f" from {entry['address']}" if entry["address"] else "")
    what = " ".join(filter(None, [entry["event"], entry["target"]]))
    action = f" (action {entry['action_id']}: {entry['action_state'] or 'deleted'})" if entry["action_id"] else ""
    detail = f": {entry['detail']}" if entry["detail"] else ""
    times = f" [{entry['count']} times]" if entry["count"] > 1 else ""
    return f"{format_time(entry['at'], zone)}  {who}: {what}: {entry['outcome']}{action}{detail}{times}"
