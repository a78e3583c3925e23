"""What a host's kernel counts: OOM kills, swapped pages, pressure, open files, connections, network, disks and RAID.

All of it is in /proc and /sys. The shell itself reads the files of each device, without a process for each; those of
/proc/sys can only be read in one piece, which some shells do not do. A part that the kernel does not have is left out.
The lines belong to the section `proc`, so that a host with an earlier wrapper lacks only them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from fleet.host.numbers import is_count

DEVICES_LIMIT = 64  # network cards, disks and arrays of each kind
SECTOR = 512  # bytes: the unit of /proc/diskstats, whatever the disk's own
_DIRECTIONS = ("receive", "transmit")
_ACCESSES = ("read", "write")

# Only devices of their own: no bridges, virtual links, partitions or loops. chronyc is asked for the clock, or else
# systemd-timesyncd, which creates a file once it has set the clock.
SCRIPT = """
grep -E '^(oom_kill|pswpin|pswpout) ' /proc/vmstat
for resource in cpu memory io; do
    [ -r /proc/pressure/$resource ] && while read -r kind rest; do
        echo pressure $resource/$kind ${rest##*total=}
    done </proc/pressure/$resource
done
echo files $(cat /proc/sys/fs/file-nr)
track=/proc/sys/net/netfilter/nf_conntrack
[ -r ${track}_count ] && echo conntrack $(cat ${track}_count ${track}_max)
for at in /sys/class/net/*; do
    [ -e $at/device ] && [ -r $at/statistics/rx_packets ] || continue
    read -r in <$at/statistics/rx_packets && read -r out <$at/statistics/tx_packets || continue
    read -r in_errors <$at/statistics/rx_errors && read -r out_errors <$at/statistics/tx_errors || continue
    echo net ${at##*/} $in $out $in_errors $out_errors
    read -r in <$at/statistics/rx_bytes && read -r out <$at/statistics/tx_bytes || continue
    read -r in_drops <$at/statistics/rx_dropped && read -r out_drops <$at/statistics/tx_dropped || continue
    echo traffic ${at##*/} $in $out $in_drops $out_drops
done
[ -r /proc/diskstats ] && while read -r major minor name a b c d e f g h i j weighted rest; do
    [ -e /sys/block/$name/device ] && echo disk $name $weighted && echo io $name $a $e $c $g $j
done </proc/diskstats
for at in /sys/block/md*/md; do
    [ -r $at/degraded ] && read -r missing <$at/degraded || continue
    at=${at%/md}
    echo raid ${at##*/} $missing
done
if command -v chronyc >/dev/null 2>&1; then
    chronyc -c tracking 2>/dev/null | sed -n 's/.*,Not synchronised$/clock 0/p; t; s/.*,.*/clock 1/p'
elif [ -d /run/systemd/timesync ]; then
    [ -e /run/systemd/timesync/synchronized ] && echo clock 1 || echo clock 0
fi
"""


@dataclass(frozen=True, slots=True)
class NetworkCounts:
    """Packets and errors of a network card in one direction, `receive` or `transmit`, since boot."""

    device: str
    direction: str
    packets: int
    errors: int


@dataclass(frozen=True, slots=True)
class TrafficCounts:
    """Bytes and dropped packets of a network card in one direction, `receive` or `transmit`, since boot."""

    device: str
    direction: str
    size: int
    dropped: int


@dataclass(frozen=True, slots=True)
class DiskCounts:
    """Operations and bytes of a disk in one direction, `read` or `write`, since boot."""

    device: str
    direction: str
    operations: int
    size: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """What was read; None or empty is what the kernel does not have.

    `queue_seconds` is, by disk, the time that requests have waited or were in progress, summed over the requests;
    `busy_seconds` is the time with any request in progress. `missing_disks` is how many disks a RAID array lacks.
    `pressure` has the seconds in which tasks waited, by resource and `some` (of the tasks) or `full` (all).
    """

    oom_kills: int | None = None
    files: tuple[int, int] | None = None  # allocated, and the limit
    connections: tuple[int, int] | None = None  # tracked, and the limit
    clock_synchronized: bool | None = None
    network: list[NetworkCounts] = field(default_factory=list)
    queue_seconds: dict[str, float] = field(default_factory=dict)
    missing_disks: dict[str, int] = field(default_factory=dict)
    traffic: list[TrafficCounts] = field(default_factory=list)
    disks: list[DiskCounts] = field(default_factory=list)
    busy_seconds: dict[str, float] = field(default_factory=dict)
    swapped_pages: dict[str, int] = field(default_factory=dict)  # by `in` and `out`
    pressure: dict[tuple[str, str], float] = field(default_factory=dict)


def parse_kernel(output: str) -> Kernel:
    """Parse the lines of `SCRIPT`, among others; lines of another form are ignored."""
    single: dict[str, list[int]] = {}
    devices: dict[str, dict[str, list[int]]] = {kind: {} for kind, (has_name, _) in _FORMS.items() if has_name}
    for kind, name, numbers in _parse_lines(output):
        if name is None:
            single[kind] = numbers
        elif len(devices[kind]) < DEVICES_LIMIT:
            devices[kind][name] = numbers
    files, connections, clock = single.get("files"), single.get("conntrack"), single.get("clock")
    return Kernel(
        oom_kills=single["oom_kill"][0] if "oom_kill" in single else None,
        files=(files[0], files[2]) if files else None,  # the second is always 0
        connections=(connections[0], connections[1]) if connections else None,
        clock_synchronized=clock == [1] if clock else None,
        network=[
            NetworkCounts(name, direction, numbers[index], numbers[2 + index])
            for name, numbers in devices["net"].items()
            for index, direction in enumerate(_DIRECTIONS)
        ],
        queue_seconds={name: numbers[0] / 1000 for name, numbers in devices["disk"].items()},
        missing_disks={name: numbers[0] for name, numbers in devices["raid"].items()},
        traffic=[
            TrafficCounts(name, direction, numbers[index], numbers[2 + index])
            for name, numbers in devices["traffic"].items()
            for index, direction in enumerate(_DIRECTIONS)
        ],
        disks=[
            DiskCounts(name, direction, numbers[index], numbers[2 + index] * SECTOR)
            for name, numbers in devices["io"].items()
            for index, direction in enumerate(_ACCESSES)
        ],
        busy_seconds={name: numbers[-1] / 1000 for name, numbers in devices["io"].items()},
        swapped_pages={kind[len("pswp") :]: single[kind][0] for kind in ("pswpin", "pswpout") if kind in single},
        pressure={
            (resource, kind): numbers[0] / 1e6
            for name, numbers in devices["pressure"].items()
            for resource, _, kind in [name.partition("/")]
            if resource in _RESOURCES and kind in _PRESSURES
        },
    )


_RESOURCES, _PRESSURES = ("cpu", "memory", "io"), ("some", "full")
# Kind of a line: whether a device's name follows, and how many numbers.
_FORMS = {
    "oom_kill": (False, 1), "files": (False, 3), "conntrack": (False, 2), "clock": (False, 1), "pswpin": (False, 1),
    "pswpout": (False, 1), "net": (True, 4), "traffic": (True, 4), "disk": (True, 1), "io": (True, 5),
    "raid": (True, 1), "pressure": (True, 1),
}  # fmt: skip


def _parse_lines(output: str) -> Iterator[tuple[str, str | None, list[int]]]:
    """Yield kind, name of the device and numbers of each line that has one of `_FORMS`."""
    for line in output.split("\n"):
        kind, *words = line.split() or [""]
        has_name, count = _FORMS.get(kind, (False, -1))
        name = words.pop(0) if has_name and words else None
        if len(words) == count and all(map(is_count, words)):
            yield kind, name, [int(word) for word in words]
