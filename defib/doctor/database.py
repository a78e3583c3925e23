"""The doctor's checks of the remediator's database and its disk."""

import os
import shutil
from pathlib import Path

from defib.doctor.findings import Finding
from fleet.inventory.model import Inventory
from remediator.record.backup import check
from runtime.database_files import BackupError, DatabaseBusyError

FREE_BYTES, FREE_SHARE = 2**30, 0.1  # of the disk; less than both is a failure


def check_database(inventory: Inventory) -> list[Finding]:
    """Check the database's folder, permissions, free space and integrity."""
    path = Path(inventory.remediator.database.removeprefix("sqlite:///"))
    try:
        return _check_path(path)
    except OSError as error:
        detail = f"{error.filename or path}: {error.strerror}"
        return [Finding("database", "writable", "warn", detail, "run this as the remediator's user")]


def _check_path(path: Path) -> list[Finding]:
    folder = path.parent
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        fix = f"install -d -o defib -m 700 {folder}, or set remediator.database"
        detail = f"{folder} does not exist; the remediator creates it if it can"
        return [Finding("database", "folder", "warn", detail, fix)]
    writable = os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    detail = "" if writable else f"{path} is not writable by the current user"
    fix = "run this as the remediator's user, or chown it"
    disk = shutil.disk_usage(folder)
    low = disk.free < min(FREE_BYTES, FREE_SHARE * disk.total)
    free = f"{disk.free / 2**30:.1f} GiB free in {folder}"
    findings = [
        Finding("database", "writable", "pass" if writable else "warn", detail, fix),
        Finding("disk", "free space", "fail" if low else "pass", free, "free some space"),
    ]
    if path.is_file() and os.access(path, os.R_OK):
        findings.append(_check_integrity(path))
    return findings


def _check_integrity(path: Path) -> Finding:
    try:
        check(path)
    except DatabaseBusyError as error:
        return Finding("database", "integrity", "warn", str(error), "try again; find out which process locks it")
    except BackupError as error:
        fix = "stop the remediator and restore a backup: defib restore FILE"
        return Finding("database", "integrity", "fail", str(error), fix)
    return Finding("database", "integrity", "pass")
