"""`defib control`: a service's controls by hand, through the remediator or straight to the host."""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from defib.asking import Connect
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Sudo
from fleet.shells import Completed
from fleet.shells.pool import Shells
from remediator.clients.json_client import ClientError, JsonClient
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import ControlRunner, Verb
from runtime.errors import DefibError

ASK_EVERY = 1.0
DONE, FAILED, UNKNOWN = 0, 1, 2
STOPPED = "it stays stopped, and nobody is told, until it is started and has been up for `hold`"


async def direct(load: Callable[[], LoadedInventory], name: str, verb: Verb) -> int:
    """Go to the host ourselves; the remediator does not know. Raises DefibError."""
    inventory = load().inventory
    service = inventory.services.get(name)
    if service is None or service.control is None:
        raise DefibError(f"the inventory has no {'control for' if service else 'service'} {name!r}")
    print(f"going to {service.host or 'it'} itself: no locks, and not on the remediator's record", file=sys.stderr)
    shells = Shells(inventory.hosts, control=True)
    try:
        host = inventory.host_of(service)
        shell = shells.get(service.host) if host is not None else None
        runner = ControlRunner(shell, host.sudo if host is not None else Sudo(), service.control.timeout)
        done = await CONTROLS[service.control.kind].run(verb, service.control.options, runner)
    finally:
        await shells.close()
    return _print(done)


def _print(done: Completed) -> int:
    if done.output:
        print(done.output)
    if done.status is None:
        print(f"the outcome is unknown: {done.why}", file=sys.stderr)
        return UNKNOWN
    return done.status


async def through_remediator(connect: Connect, name: str, verb: Verb, overrule: Sequence[str] = ()) -> int:
    """Ask the remediator, whose locks and record then apply. Raises DefibError."""
    async with connect(hint=" (--direct goes without it)") as peer:
        if verb in ("status", "logs"):
            answer = await peer.request("GET", f"/api/v1/services/{quote(name, safe='')}/{verb}", timeout=300.0)
            return _print(Completed(answer["exit_status"], answer["output"], "", answer["why"]))
        # The host is looked at first, and may hang.
        begun = await peer.request(
            "POST", f"/api/v1/services/{quote(name, safe='')}/{verb}", 60.0, {"overrule": list(overrule)}
        )
        ended = await _follow(peer, begun["action"])
        if verb == "stop" and ended == DONE:
            print(STOPPED, file=sys.stderr)
        return ended


async def _follow(peer: JsonClient, action: int) -> int:
    """Wait until an action's command has ended; its verification goes on without us."""
    started = time.monotonic()
    while True:
        try:
            answer = await peer.request("GET", f"/api/v1/actions?before={action + 1}")
        except ClientError as error:
            print(f"action {action} was begun; what became of it is unknown: {error}", file=sys.stderr)
            return UNKNOWN
        found: dict[str, Any] = next(each for each in answer["actions"] if each["id"] == action)
        if found["command"] is not None or found["state"] != "running":
            break
        await asyncio.sleep(ASK_EVERY if time.monotonic() - started > ASK_EVERY else ASK_EVERY / 5)
    print(f"{found['kind']} of {found['service']}: {found['command']}")
    if found["output"]:
        print(found["output"])
    if found["why"]:
        print(found["why"], file=sys.stderr)
    return {"succeeded": DONE, "failed": FAILED}.get(found["command"], UNKNOWN)
