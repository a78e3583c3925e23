"""The commands that ask the remediator: incidents, explain, acknowledge, approve, reset, automation, maintenance."""

import getpass
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import SecretStr

from defib.probe import printable
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import RemediatorSettings
from remediator.clients.json_client import ClientError, HttpStatusError, JsonClient
from runtime import tokens
from runtime.errors import DefibError
from runtime.tokens import ApiToken, TokenError

SHOWN = 12  # lines of each piece of evidence
Connect = Callable[..., AbstractAsyncContextManager[JsonClient]]
USE_OTHER = "run this as the remediator's user (such as `sudo -u defib defib …`), or name a file with --token-file"


@asynccontextmanager
async def remediator(
    load: Callable[[], LoadedInventory], token_file: Path | None, *, hint: str = ""
) -> AsyncIterator[JsonClient]:
    """The remediator of the configuration, asked in the name of who runs this. Raises DefibError."""
    settings = load().inventory.remediator
    endpoint = settings.url
    if token_file is not None:
        endpoint = endpoint.model_copy(update={"auth": None})
    token = None if endpoint.auth is not None else _token(settings, token_file)
    peer = JsonClient(endpoint, token, headers={"X-Defib-User": getpass.getuser()})
    try:
        yield peer
    except HttpStatusError as error:
        raise DefibError(f"the remediator at {endpoint.base} refused: {error}") from error
    except ClientError as error:
        raise DefibError(f"the remediator at {endpoint.base} did not answer: {error}{hint}") from error
    finally:
        await peer.close()


def _token(settings: RemediatorSettings, token_file: Path | None) -> SecretStr:
    """The API token: of the file named, else as the remediator itself finds it. Raises DefibError."""
    if token_file is not None:
        return tokens.read_token(token_file)
    try:
        return ApiToken("remediator.token", settings.token, settings.token_file).get()
    except TokenError as error:
        raise DefibError(f"{error}; {USE_OTHER}") from error


async def incidents(connect: Connect, number: int | None, *, as_json: bool) -> int:
    """Print the newest incidents, or all that is on record of one."""
    async with connect() as peer:
        told = await peer.request("GET", f"/api/v1/incidents{'' if number is None else f'/{number}'}")
    if as_json:
        print(json.dumps(told, ensure_ascii=False))
    elif number is not None:
        print(_incident(told))
    else:
        print("\n".join(map(_line, told["incidents"])) or "no incidents")
    return 0


def _line(incident: Mapping[str, Any]) -> str:
    decided = " ".join(str(incident[key]) for key in ("verb", "reason") if incident[key])
    if incident["acknowledged_by"]:
        decided += f", acknowledged by {incident['acknowledged_by']}"
    if incident["probe"]:
        decided += f" ({incident['probe']})"
    ended = f"to {_second(incident['closed_at'])}" if incident["closed_at"] else decided
    opened = _second(incident["down_at"] or incident["opened_at"])
    return f"{incident['id']:>6}  {incident['state']:<10}  {opened}  {incident['service']}  {ended}"


def _second(time: str | None) -> str:
    """RFC 3339 without fractions."""
    return "" if time is None else f"{time[:19]}Z"


def _incident(incident: Mapping[str, Any]) -> str:
    lines = [_line(incident)]
    if incident["probe"]:
        lines.append(f"    last failed probe: {incident['probe']}")
    for event in incident["timeline"]:
        detail = ", ".join(f"{name} {value}" for name, value in event["detail"].items() if value not in (None, ""))
        lines.append(f"    {_second(event['at'])}  {event['event']:<13} {detail}".rstrip())
    for action in incident["actions"]:
        asked = f"asked by {action['asked_by']}" + (
            f", approved by {action['approved_by']}" if action["approved_by"] else ""
        )
        lines.append(f"  action {action['id']}: {action['kind']}, {action['state']}, {asked}")
        for name in ("before", "after"):
            facts = ", ".join(f"{key} {value}" for key, value in (action[name] or {}).items())
            lines += [f"    {name}: {facts}"] if facts else []
        for kept in [*action["evidence"], {"name": "output", "text": action["output"] or ""}]:
            text = kept["text"].strip().splitlines()
            # The end of what goes on, the beginning of what was sorted.
            shown = text[-SHOWN:] if kept["name"] in ("logs", "output") else text[:SHOWN]
            lines += [f"    {kept['name']}:", *(f"      {line}" for line in shown)]
    return "\n".join(map(printable, lines))


async def explain(connect: Connect, service: str, *, as_json: bool) -> int:
    """Print every gate of a service's next action."""
    async with connect() as peer:
        told = await peer.request("GET", f"/api/v1/services/{quote(service, safe='')}/explain", timeout=30.0)
    print(json.dumps(told, ensure_ascii=False) if as_json else printable(_explained(told)))
    return 0


def _explained(told: Mapping[str, Any]) -> str:
    decision = told["decision"]
    words = " ".join(str(decision[key]) for key in ("verb", "reason") if decision[key])
    lines = [f"{told['service']}: {words}{_because(decision['detail'])}"]
    if not told["firing"]:
        lines.append("  no alert fires for it; this is how the gates would stand if its alert fired now")
    for gate in told["gates"]:
        until = f" (until {_second(gate['until'])})" if gate["until"] else ""
        mark = "passed" if gate["open"] else "SHUT  "
        lines.append(f"  {mark} {gate['gate']}{_because(gate['detail'])}{until}")
    used = ", ".join(f"{kind} {count}" for kind, count in told["attempts"].items()) or "none"
    lines.append(f"  attempts used: {used}; next step: {told['next_step'] or 'none is left'}")
    lines.append(
        "  stopped-by-hand, healing-itself and starting are asked of the host, and pass where it does not answer"
    )
    if told["caution"]:
        lines.append(f"  {told['caution']}")
    if told["decided_again_in_seconds"] is not None:
        lines.append(f"  decided again in {told['decided_again_in_seconds']:.0f} s, or when something changes")
    return "\n".join(lines)


def _because(detail: str) -> str:
    return f": {detail}" if detail else ""


async def acknowledge(connect: Connect, number: int) -> int:
    async with connect() as peer:
        told = await peer.request("POST", f"/api/v1/incidents/{number}/acknowledge", body={})
    print(printable(f"incident {number} is acknowledged by {told['acknowledged_by']}"))
    return 0


async def approve(connect: Connect, action: int) -> int:
    async with connect() as peer:
        await peer.request("POST", f"/api/v1/actions/{action}/approve")
    print(f"action {action} is approved: it begins once nothing else speaks against it")
    return 0


async def reset(connect: Connect, service: str) -> int:
    async with connect() as peer:
        await peer.request("POST", f"/api/v1/services/{quote(service, safe='')}/reset")
    print(f"{service} has all its attempts again")
    return 0


async def automation(connect: Connect, switch: str | None, reason: str) -> int:
    """Print whether it acts by itself, or switch that."""
    async with connect() as peer:
        if switch is None:
            told = await peer.request("GET", "/api/v1/automation")
        else:
            told = await peer.request("PUT", "/api/v1/automation", body={"enabled": switch == "on", "reason": reason})
    since = f" since {_second(told['at'])}, by {told['by']}{_because(told['reason'])}" if told["at"] else ""
    print(f"automation is {'on' if told['enabled'] else 'off'}{since}")
    if not told["by_inventory"]:
        print("the inventory says `remediation: {automatic: false}`, whatever the switch says")
    return 0


async def maintenances(connect: Connect) -> int:
    async with connect() as peer:
        told = await peer.request("GET", "/api/v1/maintenance")
    for each in told["maintenance"]:
        until = _second(each["until"])
        said = f"{each['scope']} {each['name']}, until {until}, by {each['asked_by']}: {each['reason']}"
        print(f"{each['id']:>6}  {printable(said)}")
    if not told["maintenance"]:
        print("no maintenance")
    return 0


async def begin_maintenance(connect: Connect, scope: str, name: str, asked: Mapping[str, Any]) -> int:
    async with connect() as peer:
        body = {"scope": scope, "name": name, **asked}
        told = await peer.request("POST", "/api/v1/maintenance", body=body)
    print(f"maintenance {told['id']} of {scope} {name} until {_second(told['until'])}: nothing is restarted there")
    return 0


async def end_maintenance(connect: Connect, number: int) -> int:
    async with connect() as peer:
        await peer.request("DELETE", f"/api/v1/maintenance/{number}")
    print(f"maintenance {number} is over")
    return 0
