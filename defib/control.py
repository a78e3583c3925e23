"""`defib control`: start, stop and restart a service by hand, through the remediator or directly on its host."""

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from defib.lookup import find_service
from defib.output import print_json, print_text
from defib.remediator_client import Connect, RemediatorClient, checking_answers
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import SudoOptions
from fleet.inventory.problems import ConfigurationError
from fleet.json_client import ClientError
from fleet.shells import CompletedCommand
from fleet.shells.pool import Shells
from remediator.execution.controls import CONTROLS, find_options
from remediator.execution.controls.runner import ControlRunner, Verb
from runtime.errors import DefibError
from runtime.redaction import Redactor

POLL_EVERY = 1.0  # seconds
SUCCEEDED, FAILED, UNKNOWN = 0, 1, 2
STOPPED = "automation leaves it stopped, without notifications, until it is started and has been up for `hold`"


Load = Callable[[], LoadedInventory]


async def control_directly(
    load: Load, load_all: Load, name: str, verb: Verb, component: str = "", *, as_json: bool
) -> int:
    """Run a control on the host without the remediator, without locks or record. Raises DefibError.

    `load_all` resolves all references that can be resolved: the output may contain the secrets of probes, too.
    """
    loaded = load()
    inventory = loaded.inventory
    service = find_service(inventory, name)
    if service.control is None:
        raise DefibError(f"the service {name!r} has no control: set services.{name}.control")
    sections = loaded.connection_sections(service.host, control=True)
    loaded.require_resolved(f"services.{name}.control", *sections)
    options = find_options(service, component)
    where = f"on {service.host}" if service.host else "from here"
    print_text(f"running {verb} {where} without the remediator: no locks, no record", sys.stderr)
    shells = Shells(inventory.hosts, control=True)
    try:
        host = inventory.host_of(service)
        shell = shells.get(service.host) if host is not None else None
        runner = ControlRunner(shell, host.sudo if host is not None else SudoOptions(), service.control.timeout)
        completed = await CONTROLS[service.control.kind].run(verb, options, runner)
    finally:
        await shells.close()
    redact = Redactor(await asyncio.to_thread(_find_secrets, load_all, loaded))
    output, errors, why = map(redact, (completed.stdout, completed.stderr, completed.why))
    completed = replace(completed, stdout=output, stderr=errors, why=why)
    if as_json:
        result = {"exit_status": completed.status, "why": completed.why, "output": completed.output}
        print_json({"service": name, "verb": verb, **result})
        return UNKNOWN if completed.status is None else completed.status
    return _print_completed(completed)


def _find_secrets(load_all: Load, loaded: LoadedInventory) -> frozenset[str]:
    """Return the secrets that this user can read. An error in a probe must not keep a control's output back."""
    try:
        return load_all().secrets | loaded.secrets
    except ConfigurationError:
        print_text("warning: secrets of probes are not masked, since a probe has an error: see defib check", sys.stderr)
        return loaded.secrets


def _print_completed(completed: CompletedCommand) -> int:
    if completed.output:
        print_text(completed.output)
    if completed.status is None:
        print_text(f"the outcome is unknown: {completed.why}", sys.stderr)
        return UNKNOWN
    return completed.status


async def control_through_remediator(
    connect: Connect, name: str, verb: Verb, component: str, body: Mapping[str, Any], *, as_json: bool
) -> int:
    """Run a control through the remediator, with its locks and record. Raises DefibError.

    `body` has the gates to `overrule` and the `reason`.
    """
    async with connect(hint="; --direct works without the remediator") as remediator:
        part = f"components/{quote(component, safe='')}/" if component else ""
        path = f"/api/v1/services/{{name}}/{part}{verb}"
        if verb in ("status", "logs"):
            answer = await remediator.request_named("service", name, "GET", path, timeout=300.0)
            if as_json:
                print_json(answer)
                return UNKNOWN if answer["exit_status"] is None else int(answer["exit_status"])
            return _print_completed(CompletedCommand(answer["exit_status"], answer["output"], "", answer["why"]))
        # The remediator first looks at the host, which may be slow.
        started = await remediator.request_named("service", name, "POST", path, timeout=60.0, body=body)
        action = await _wait_for_command(remediator, started["action"])
    if action is None:
        return UNKNOWN
    if as_json:
        print_json(action)
    else:
        _print_action(action)
    status = {"succeeded": SUCCEEDED, "failed": FAILED}.get(action["command"], UNKNOWN)
    if verb == "stop" and status == SUCCEEDED:
        print_text(STOPPED, sys.stderr)
    return status


async def _wait_for_command(remediator: RemediatorClient, number: int) -> dict[str, Any] | None:
    """Wait until the command of an action has ended; return the action, or None if the remediator does not answer.

    The verification that follows is not waited for.
    """
    started = time.monotonic()
    while True:
        try:
            answer = await remediator.request("GET", f"/api/v1/actions?before={number + 1}")
            with checking_answers():
                action: dict[str, Any] = {each["id"]: each for each in answer["actions"]}[number]
                is_ended = action["command"] is not None or action["state"] != "running"
        except ClientError as error:
            print_text(f"action {number} was started; its outcome is unknown: {error}", sys.stderr)
            return None
        if is_ended:
            return action
        await asyncio.sleep(POLL_EVERY if time.monotonic() - started > POLL_EVERY else POLL_EVERY / 5)


def _print_action(action: dict[str, Any]) -> None:
    component = f" component {action['component']}" if action["component"] else ""
    print_text(f"{action['kind']}{component} of {action['service']}: {action['command']}")
    if action["output"]:
        print_text(action["output"])
    if action["why"]:
        print_text(action["why"], sys.stderr)
