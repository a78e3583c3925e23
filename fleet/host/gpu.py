"""nvidia-smi: its queries and parsers of their output.

Its CSV has no quoting, an unknown field fails the whole query, and fields differ by driver: `--help-query-gpu` lists
them. Rows of GPUs may be mixed with lines about lost ones, and exit status 14 comes with usable output.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from fleet.host.numbers import is_count
from fleet.host.sections import Section

GPU_LIMIT = 256  # lines about GPUs of a host that are read
XID_LIMIT = 1000  # lines
GOOD_STATUSES = (0, 14)  # 14: an infoROM is corrupted, and the output is complete
_ABSENT = {"[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "[Function Not Found]", "[Not Found]", ""}
_FAULTS = {"[Unknown Error]", "[GPU requires reset]", "ERR!", "[GPU is lost]"}
_DEPRECATED = "[Requested functionality has been deprecated]"
_HEX_ID = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:$|/)")
_LOST = re.compile(r"handle for GPU\s*(?:(\d+):\s+)?([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])")
# A line of the kernel log is `[TIME] … NVRM: Xid (ADDRESS) … : NUMBER, …`. One expression for all of it would take
# quadratic time for some lines.
_XID_TIME = re.compile(r"(?:<\d+>)?\[([^\]]+)\]")
_XID_ADDRESS = re.compile(r"NVRM: Xid \(((?:PCI:)?[0-9a-fA-F:.]+)(?: GPU-I:\d+)?\)")
_XID_NUMBER = re.compile(r": (\d{1,9}),")

# The fields that are published, with the names that drivers have had for each, the newest first.
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
    "power": ("power.draw",),
    "power_instant": ("power.draw.instant",),
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
    "name": ("name", "gpu_name"),  # the last, since it may contain the separator
}  # fmt: skip

HELP_SECTION = Section("fields", "nvidia-smi --help-query-gpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its fields with values, and the names of those that report a fault in place of a value."""

    values: Mapping[str, str]
    faults: tuple[str, ...] = ()

    def number(self, name: str) -> float | None:
        """Return a field as a number; None where it has no numeric value."""
        try:
            return float(self.values[name])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class GpuQueryResult:
    """The GPUs that answered, the lost ones by PCI address and index (if known), and all other lines."""

    gpus: list[Gpu] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    messages: str = ""


def map_fields_to_driver_names(help_text: str) -> dict[str, str]:
    """Return the driver's names of the supported `FIELDS`, from the output of `--help-query-gpu`."""
    lines = [line for line in help_text.split("\n") if line.startswith('"')]
    supported = {name for line in lines for name in re.findall(r'"([^"]+)"', line)}
    chosen = {field: next((name for name in names if name in supported), None) for field, names in FIELDS.items()}
    return {field: name for field, name in chosen.items() if name is not None}


QUERY_SCRIPT = 'IFS=,; nvidia-smi --query-gpu="$*" --format=csv,noheader,nounits'


def build_nvidia_smi_section(fields: Iterable[str]) -> Section:
    """Return the section that queries these fields of all GPUs."""
    return Section("query", QUERY_SCRIPT, tuple(fields), max_lines=GPU_LIMIT)


INSTANCES_SECTION = Section("instances", "nvidia-smi -L")

# The processes that use GPU memory, their control groups, and the names of containers.
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

# The last line of each GPU and XID: an application's errors may fill the log.
XIDS_SECTION = Section("xids", max_lines=XID_LIMIT, script="""
grep '^btime ' /proc/stat
date '+zone %z'
dmesg 2>/dev/null | awk '
at = index($0, "NVRM: Xid (") {
    address = substr($0, at)
    rest = substr(address, index(address, ")") + 1)
    address = substr(address, 1, index(address, ")"))
    if (match(rest, /: [0-9]+,/)) last[address substr(rest, RSTART, RLENGTH)] = $0
}
END { for (each in last) print last[each] }'
exit 0
""")  # fmt: skip


def parse_query(output: str, fields: Sequence[str]) -> GpuQueryResult:
    """Parse the output of a query; `fields` are keys of `FIELDS`, in the order of the query."""
    gpus: list[Gpu] = []
    lost: list[tuple[str, str]] = []
    messages: list[str] = []
    for line in output.split("\n"):
        cells = line.split(", ", len(fields) - 1)
        lost_gpu = _LOST.search(line)
        if lost_gpu is not None:
            lost.append((normalize_pci_address(lost_gpu[2]), lost_gpu[1] or ""))
            messages.append(line.strip())
        elif len(cells) == len(fields) and is_count(cells[0]):
            gpus.append(_parse_gpu(dict(zip(fields, map(str.strip, cells), strict=True))))
        elif line.strip():
            messages.append(line.strip())
    return GpuQueryResult(gpus, lost, " ".join(messages))


def _parse_gpu(cells: Mapping[str, str]) -> Gpu:
    values = {name: text for name, text in cells.items() if text not in _ABSENT | _FAULTS and text != _DEPRECATED}
    return Gpu(values, tuple(name for name, text in cells.items() if text in _FAULTS))


def normalize_pci_address(text: str) -> str:
    """Return a PCI address as in nvidia-smi's rows: upper case, with eight digits of the domain."""
    domain, _, rest = text.upper().partition(":")
    return f"{domain:0>8}:{rest}"


def parse_instances(output: str) -> dict[str, list[str]]:
    """Return the MIG instances by the UUID of their GPU, as `nvidia-smi -L` lists them: `3g.40gb Device 0`."""
    instances: dict[str, list[str]] = {}
    uuid = ""
    for line in output.split("\n"):
        if (gpu := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line)) is not None:
            uuid = gpu[1]
        elif (instance := re.match(r"\s+MIG (\S+)\s+Device\s+(\d+):", line)) is not None and uuid:
            instances.setdefault(uuid, []).append(f"{instance[1]} {instance[2]}")
    return instances


def parse_memory_by_gpu_and_container(output: str) -> dict[str, dict[str, float]]:
    """Return the bytes of GPU memory by GPU UUID and container; `host` stands for processes outside containers."""
    names: dict[str, str] = {}
    groups: dict[str, str] = {}
    apps: list[str] = []
    for line in output.split("\n"):
        kind, _, rest = line.partition(" ")
        if kind == "app":
            apps.append(rest)
        elif kind == "cgroup":
            pid, _, group = rest.partition(" ")
            container_id = _HEX_ID.search(group.rpartition(":")[2])
            if container_id is not None:
                groups[pid] = container_id[1]
        elif kind == "container" and " " in rest:
            identifier, _, name = rest.partition(" ")
            names[identifier] = name
    memory_by_uuid: dict[str, dict[str, float]] = {}
    for app in apps:
        uuid, pid, memory = (*app.split(", ", 3), "", "", "")[:3]
        if is_count(memory):
            group = groups.get(pid, "")
            container = names.get(group, group[:12]) or "host"
            containers = memory_by_uuid.setdefault(uuid, {})
            containers[container] = containers.get(container, 0.0) + float(memory) * 2**20
    return memory_by_uuid


def parse_boot_time(output: str) -> float:
    """Return the Unix time of the host's boot in the output of `XIDS_SECTION`, or 0."""
    found = re.search(r"^btime (\d{1,15})$", output, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def parse_last_xid_times(output: str) -> dict[tuple[str, str], float]:
    """Return the Unix time of the last XID error by PCI address (without its function) and XID number."""
    booted, zone = parse_boot_time(output), "+0000"
    last_seen: dict[tuple[str, str], float] = {}
    for line in output.split("\n"):
        if line.startswith("zone "):
            zone = line.removeprefix("zone ").strip()
        elif (xid := _parse_xid(line)) is not None and (at := _parse_log_time(xid[0], booted, zone)) is not None:
            address = normalize_pci_address(xid[1].removeprefix("PCI:"))
            key = (address.partition(".")[0], xid[2])
            last_seen[key] = max(last_seen.get(key, 0.0), at)
    return last_seen


def _parse_xid(line: str) -> tuple[str, str, str] | None:
    """Return the time, the address and the number of an XID error, or None for other lines."""
    if (time := _XID_TIME.match(line)) is None or (address := _XID_ADDRESS.search(line, time.end())) is None:
        return None
    number = _XID_NUMBER.search(line, address.end())
    return (time[1].strip(), address[1], number[1]) if number is not None else None


def _parse_log_time(text: str, booted: float, zone: str) -> float | None:
    """Return the Unix time of a line of dmesg: seconds since boot, or with `-T` a local time; None for other text."""
    try:
        return booted + float(text)
    except ValueError:
        pass
    try:
        return datetime.strptime(f"{text} {zone}", "%a %b %d %H:%M:%S %Y %z").timestamp()
    except ValueError:
        return None
