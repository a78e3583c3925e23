"""What an operator approves: a step, and what it runs on a service's target."""

import hashlib
import json
from typing import Any

from fleet.inventory.model import RemediationStep, Service


def describe_request(service: Service, step: RemediationStep) -> dict[str, Any]:
    """Return a step as it is stored with its request, and a digest of the service's control, without secrets.

    An approval is valid as long as this is the same.
    """
    control = service.control.model_dump(mode="json") if service.control is not None else None
    text = json.dumps([service.host, control], sort_keys=True, default=str)
    return {**step.model_dump(mode="json"), "control": hashlib.sha256(text.encode()).hexdigest()[:32]}
