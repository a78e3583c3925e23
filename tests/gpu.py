"""An nvidia-smi of the tests' own: it answers from a table, as the real one does."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CARD = {
    "index": "0", "uuid": "GPU-1", "name": "NVIDIA A100-SXM4-80GB", "driver_version": "550.54.15",
    "pci.bus_id": "00000000:07:00.0", "utilization.gpu": "93", "utilization.memory": "41", "memory.total": "81920",
    "memory.used": "70000", "memory.reserved": "600", "memory.free": "11320", "temperature.gpu": "66",
    "temperature.memory": "[N/A]", "power.draw": "388.12", "power.limit": "400.00", "clocks.current.sm": "1410",
    "clocks.current.memory": "1593", "fan.speed": "[N/A]", "pstate": "P0", "clocks_event_reasons.sw_power_cap": "Active",
    "clocks_event_reasons.hw_slowdown": "Not Active", "clocks_event_reasons_counters.sw_power_cap": "1500000",
    "ecc.errors.corrected.volatile.total": "3", "ecc.errors.uncorrected.volatile.total": "0",
    "remapped_rows.correctable": "1", "remapped_rows.pending": "No", "remapped_rows.failure": "0",
    "retired_pages.pending": "[N/A]", "gpu_recovery_action": "None", "mig.mode.current": "Disabled",
}  # fmt: skip

_PROGRAM = """#!{python}
import json, sys
cards, apps, before, status = json.loads({table!r})
asked = sys.argv[1]
if asked == "--help-query-gpu":
    for name in cards[0]:
        print('"%s"' % name, "A field.", "", sep="\\n")
elif asked.startswith("--query-gpu="):
    fields = asked.partition("=")[2].split(",")
    for name in fields:
        if cards and name not in cards[0]:
            print('Field "%s" is not a valid field to query.\\n' % name)
            sys.exit(2)
    print(before, end="")
    for card in cards:
        print(", ".join(card[name] for name in fields))
    sys.exit(status)
elif asked.startswith("--query-compute-apps="):
    print(apps, end="")
"""


def write_nvidia_smi(
    path: Path, cards: Sequence[Mapping[str, str]] = (CARD,), *, apps: str = "", before: str = "", status: int = 0
) -> None:
    """Write a program that tells of these cards, after the lines `before`, and exits with `status`."""
    table = json.dumps([list(cards), apps, before, status])
    path.parent.mkdir(parents=True, exist_ok=True)
    # What reads it meanwhile finds a whole program.
    made = path.with_suffix(".new")
    made.write_text(_PROGRAM.format(python=sys.executable, table=table))
    made.chmod(0o755)
    made.replace(path)
