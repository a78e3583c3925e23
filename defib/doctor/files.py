"""The doctor's checks of files: who else can read or change configuration, secrets and keys."""

from collections.abc import Sequence

from defib.doctor.findings import Finding
from defib.output import format_count
from defib.permissions import Exposure, find_exposures
from fleet.inventory.loading import LoadedInventory


def check_files(loaded: LoadedInventory) -> Sequence[Finding]:
    """Return a finding for each file with wrong permissions, or one that all are right."""
    if exposed := find_exposures(loaded):
        return [finding_of("files", f"permissions of {each.path}", each) for each in exposed]
    count = format_count(len(loaded.files) + len(loaded.secret_files), "file")
    return [Finding("files", "permissions", "pass", f"{count} of configuration and secrets")]


def finding_of(subject: str, check: str, exposure: Exposure) -> Finding:
    """Return a failure if every user can make use of it, else a warning."""
    return Finding(subject, check, "fail" if exposure.severe else "warn", exposure.detail, exposure.fix)
