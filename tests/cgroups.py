"""Control groups of the tests' own daemons."""

import time
from pathlib import Path


def remove(cgroup: Path) -> None:
    """Remove a control group and those below, once the processes that were killed in them are gone."""
    ends = time.monotonic() + 10
    while any(path.read_text() for path in cgroup.rglob("cgroup.procs")) and time.monotonic() < ends:
        time.sleep(0.02)
    for path in sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()
    cgroup.rmdir()
