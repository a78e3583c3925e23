"""What we know of nvidia-smi: what to ask, and how it answers.

Its CSV quotes nothing, one unknown field fails a whole query, and fields differ by driver: `--help-query-gpu` says
which there are. Good rows may stand beside lines about cards that are lost, and exit status 14 comes with good output.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from fleet.host.sections import Section

GPU_LIMIT = 256  # of a host that are read
XID_LIMIT = 1000
GOOD_STATUSES = (0, 14)  # 14: an infoROM is corrupted; everything else is as it should be
_ABSENT = {"[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "[Function Not Found]", "[Not Found]", ""}
_FAULTS = {"[Unknown Error]", "[GPU requires reset]", "ERR!", "[GPU is lost]"}
_DEPRECATED = "[Requested functionality has been deprecated]"
_HEX_ID = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:$|/)")
_LOST = re.compile(r"handle for GPU\s*(?:(\d+):\s+)?([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])")
_XID = re.compile(r"^(?:<\d+>)?\[\s*([^\]]+?)\].*?NVRM: Xid \(((?:PCI:)?[0-9a-fA-F:.]+)\).*?: (\d+),")

# The fields that we publish, each by the names that drivers have had for it, the newest first.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "index": ("index",),
    "uuid": ("uuid", "gpu_uuid"),
    "driver": ("driver_version",),
    "pci": ("pci.bus_id", "gpu_bus_id"),
    "utilization": ("utilization.gpu",),
    "memory_utilization": ("utilization.memory",),
    **{f"memory_{name}": (f"memory.{name}",) for name in ("total", "used", "reserved", "free")},
    "temperature": ("temperature.gpu",),
    "memory_temperature": ("temperature.memory",),
    "power": ("power.draw.instant", "power.draw"),
    "power_limit": ("enforced.power.limit", "power.limit"),
    **{f"clock_{name}": (f"clocks.current.{name}", f"clocks.{name}") for name in ("sm", "memory", "graphics", "video")},
    "fan": ("fan.speed",),
    "pstate": ("pstate",),
    **{
        f"throttle_{name}": (f"clocks_event_reasons.{name}", f"clocks_throttle_reasons.{name}")
        for name in (
            "gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "hw_thermal_slowdown",
            "hw_power_brake_slowdown", "sw_thermal_slowdown", "sync_boost",
        )
    },
    **{
        f"throttled_{name}": (f"clocks_event_reasons_counters.{name}",)
        for name in (
            "sw_power_cap", "sync_boost", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
        )
    },
    **{
        f"ecc_{kind}_{scope}": (f"ecc.errors.{kind}.{scope}.total",)
        for kind in ("corrected", "uncorrected") for scope in ("volatile", "aggregate")
    },
    **{
        f"remapped_{kind}": (f"remapped_rows.{kind}",)
        for kind in ("correctable", "uncorrectable", "pending", "failure")
    },
    "retired_single_bit": ("retired_pages.single_bit_ecc.count",),
    "retired_double_bit": ("retired_pages.double_bit.count",),
    "retired_pending": ("retired_pages.pending",),
    "recovery": ("gpu_recovery_action",),
    "mig": ("mig.mode.current",),
    "name": ("name", "gpu_name"),  # the last, since it may hold anything
}  # fmt: skip

HELP_SECTION = Section("fields", "nvidia-smi --help-query-gpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One row: fields that have a value, and those that have a fault in place of one."""

    values: Mapping[str, str]
    faults: tuple[str, ...] = ()

    def number(self, name: str) -> float | None:
        try:
            return float(self.values[name])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class GpuQueryResult:
    """The cards that answered, the PCI addresses of those that did not with the index where told, and what was said."""

    cards: list[Gpu] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    said: str = ""


def map_supported_fields(help_text: str) -> dict[str, str]:
    """Which of our fields this driver has, and what it calls them, from `--help-query-gpu`."""
    there = {name for line in help_text.splitlines() if line.startswith('"') for name in re.findall(r'"([^"]+)"', line)}
    chosen = {ours: next((name for name in names if name in there), None) for ours, names in FIELDS.items()}
    return {ours: name for ours, name in chosen.items() if name is not None}


QUERY_SCRIPT = 'IFS=,; nvidia-smi --query-gpu="$*" --format=csv,noheader,nounits'


def build_query_section(fields: Iterable[str]) -> Section:
    """The fields of all cards."""
    return Section("query", QUERY_SCRIPT, tuple(fields))


INSTANCES_SECTION = Section("instances", "nvidia-smi -L")

# Who holds memory, and in which control group and container it runs.
PROCESSES_SECTION = Section("processes", """
fields=gpu_uuid,pid,used_gpu_memory,process_name
apps=$(nvidia-smi --query-compute-apps=$fields --format=csv,noheader,nounits) || :
printf '%s\\n' "$apps" | sed 's/^/app /'
printf '%s\\n' "$apps" | awk -F', ' '$2 ~ /^[0-9]+$/ && !seen[$2]++ {print $2}' | while read -r pid; do
    sed "s/^/cgroup $pid /" "/proc/$pid/cgroup" 2>/dev/null
done
docker ps --no-trunc --format 'container {{.ID}} {{.Names}}' 2>/dev/null
exit 0
""")  # fmt: skip

XIDS_SECTION = Section("xids", """
grep '^btime ' /proc/stat
date '+zone %z'
dmesg 2>/dev/null | grep 'NVRM: Xid' | tail -n 200
exit 0
""")  # fmt: skip


def parse_query(output: str, fields: Sequence[str]) -> GpuQueryResult:
    """Read a query's rows; `fields` are our names, in the order that they were asked for."""
    cards: list[Gpu] = []
    lost: list[tuple[str, str]] = []
    said: list[str] = []
    for line in output.splitlines():
        cells = line.split(", ", len(fields) - 1)
        gone = _LOST.search(line)
        if len(cards) + len(lost) >= GPU_LIMIT:
            break
        if gone is not None:
            lost.append((normalize_pci_address(gone[2]), gone[1] or ""))
            said.append(line.strip())
        elif len(cells) == len(fields) and cells[0].isdigit():
            cards.append(_card(dict(zip(fields, map(str.strip, cells), strict=True))))
        elif line.strip():
            said.append(line.strip())
    return GpuQueryResult(cards, lost, " ".join(said))


def _card(cells: Mapping[str, str]) -> Gpu:
    values = {name: text for name, text in cells.items() if text not in _ABSENT | _FAULTS and text != _DEPRECATED}
    return Gpu(values, tuple(name for name, text in cells.items() if text in _FAULTS))


def normalize_pci_address(text: str) -> str:
    """As nvidia-smi's rows have it: eight digits of the domain, upper case."""
    domain, _, rest = text.upper().partition(":")
    return f"{domain:0>8}:{rest}"


def parse_instances(output: str) -> dict[str, list[str]]:
    """The MIG instances of each card, by its UUID, as `-L` lists them: `3g.40gb Device 0`."""
    found: dict[str, list[str]] = {}
    card = ""
    for line in output.splitlines():
        if (of := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line)) is not None:
            card = of[1]
        elif (part := re.match(r"\s+MIG (\S+)\s+Device\s+(\d+):", line)) is not None and card:
            found.setdefault(card, []).append(f"{part[1]} {part[2]}")
    return found


def parse_memory_by_container(output: str) -> dict[str, dict[str, float]]:
    """Bytes held by container, by the card's UUID; `host` is what runs in none."""
    names: dict[str, str] = {}
    groups: dict[str, str] = {}
    apps: list[str] = []
    for line in output.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "app":
            apps.append(rest)
        elif kind == "cgroup":
            pid, _, group = rest.partition(" ")
            of = _HEX_ID.search(group.rpartition(":")[2])
            if of is not None:
                groups[pid] = of[1]
        elif kind == "container" and " " in rest:
            identifier, _, name = rest.partition(" ")
            names[identifier] = name
    held: dict[str, dict[str, float]] = {}
    for app in apps:
        uuid, pid, memory = (*app.split(", ", 3), "", "", "")[:3]
        if memory.isdigit():
            group = groups.get(pid, "")
            container = names.get(group, group[:12]) or "host"
            of_card = held.setdefault(uuid, {})
            of_card[container] = of_card.get(container, 0.0) + float(memory) * 2**20
    return held


def parse_xids(output: str) -> dict[tuple[str, str], float]:
    """When each XID was last seen, in Unix time, by PCI address (without its function) and number."""
    booted, zone = 0.0, "+0000"
    found: dict[tuple[str, str], float] = {}
    for line in output.splitlines():
        if line.startswith("btime "):
            booted = float(line.split()[1])
        elif line.startswith("zone "):
            zone = line.split()[1]
        elif (seen := _XID.match(line)) is not None and (at := _logged(seen[1], booted, zone)) is not None:
            address = normalize_pci_address(seen[2].removeprefix("PCI:"))
            key = (address.partition(".")[0], seen[3])
            if key not in found and len(found) >= XID_LIMIT:
                continue
            found[key] = max(found.get(key, 0.0), at)
    return found


def _logged(text: str, booted: float, zone: str) -> float | None:
    """Unix time of a line of the kernel's log: seconds since the start, or what dmesg makes of them in a time zone."""
    try:
        return booted + float(text)
    except ValueError:
        pass
    try:
        return datetime.strptime(f"{text} {zone}", "%a %b %d %H:%M:%S %Y %z").timestamp()
    except ValueError:
        return None
