"""The doctor's check of the servers that list targets."""

import time
from collections.abc import Sequence

from defib.doctor.findings import Finding
from defib.output import format_count
from fleet.inventory.loading import LoadedInventory
from fleet.sources import fetch_targets
from runtime.errors import DefibError

SUBJECT = "services_from"


async def check_sources(loaded: LoadedInventory) -> Sequence[Finding]:
    """Check that each server in `services_from` answers with a list of targets."""
    findings = []
    for name, answer in loaded.answers.items():
        endpoint = loaded.inventory.services_from[name].http
        if endpoint is None:
            continue
        try:
            count = sum(len(group["targets"]) for group in await fetch_targets(endpoint))
        except DefibError as error:
            fix = "start the server, or correct its address; the programs keep their last answers"
            findings.append(Finding(SUBJECT, name, "fail", str(error), fix))
            continue
        age = f", stored {time.time() - answer.stat().st_mtime:.0f} s ago" if answer.exists() else ""
        findings.append(Finding(SUBJECT, name, "pass", f"{format_count(count, 'target')}{age}"))
    return findings
