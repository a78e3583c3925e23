"""What an operator approves: a step, and what it runs on a service's target or on a host."""

import hashlib
import json
from typing import Any

from fleet.inventory.model import Remediable, RemediationStep, RunbookStep


def describe_request(service: Remediable, step: RemediationStep) -> dict[str, Any]:
    """Return a step as it is stored with its request, and a digest of what it runs, without secrets.

    An approval is valid as long as this is the same.
    """
    if isinstance(step, RunbookStep):
        return {
            "runbook": step.name,
            "command": step.runbook.command,
            "digest": _digest([service.host, step.runbook.run]),
        }
    control = service.control.model_dump(mode="json") if service.control is not None else None
    return {**step.model_dump(mode="json"), "control": _digest([service.host, control])}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
