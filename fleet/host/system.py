"""A host's CPU, memory and filesystems, from /proc and df (proc(5))."""

from dataclasses import dataclass

from fleet.host import kernel
from fleet.host.sections import Section

# Local filesystems. Asking a network filesystem for its size may hang.
_LOCAL_TYPES = "ext2|ext3|ext4|xfs|btrfs|zfs|f2fs|jfs|reiserfs|vfat|exfat|ntfs|ntfs3|bcachefs"

PROC_SECTION = Section("proc", f"""
echo now $(date +%s.%N)
grep -E '^(cpu[0-9]* |btime )' /proc/stat || exit $?
echo load $(cat /proc/loadavg)
{kernel.SCRIPT.strip()}
grep -E '^Mem(Total|Free|Available):|^(Buffers|Cached):' /proc/meminfo
""")  # fmt: skip

FILESYSTEMS_SECTION = Section("df", f"""
awk '$3 ~ /^({_LOCAL_TYPES})$/ && $1 !~ /^\\/dev\\/loop/ && !seen[$1]++ {{print $1, $2, $3}}' /proc/mounts |
while read -r device mount type; do
    mount=$(printf '%b' "$mount")
    printf 'mount %s %s %s\\n' "$device" "$type" "$mount"
    df -Pk "$mount" | tail -n 1
    df -Pi "$mount" 2>/dev/null | tail -n 1
done
""")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU, memory and clock of a host, in seconds, bytes and Unix time.

    `busy` and `total` are jiffies of all CPUs since boot. `now` is the earliest and the latest time that the host's
    clock may have had: busybox's date prints whole seconds.
    """

    now: tuple[float, float] | None
    load: tuple[float, float, float]
    cpus: int
    busy: int
    total: int
    booted: float
    memory_total: int
    memory_available: int


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A filesystem: sizes in bytes, and inodes where their number is fixed."""

    device: str
    type: str
    mountpoint: str
    size: int
    available: int
    files: int | None = None
    files_free: int | None = None


def parse_machine(output: str) -> Machine:
    """Parse the output of `PROC_SECTION`. Raises ValueError where a part is missing."""
    values: dict[str, list[str]] = {}
    cpus = 0
    for line in output.split("\n"):
        name, _, rest = line.partition(" ")
        values[name.rstrip(":")] = rest.split()
        cpus += name[:3] == "cpu" and name[3:].isdigit()
    try:
        jiffies = [int(number) for number in values["cpu"][:8]]
        idle = jiffies[3] + jiffies[4]
        memory = {name: int(words[0]) * 1024 for name, words in values.items() if name[:3] in ("Mem", "Buf", "Cac")}
        # Kernels before 3.14 have no MemAvailable.
        estimate = memory["MemFree"] + memory.get("Buffers", 0) + memory.get("Cached", 0)
        one, five, fifteen = (float(number) for number in values["load"][:3])
        return Machine(
            _parse_time(values.get("now", [])), (one, five, fifteen), cpus, sum(jiffies) - idle, sum(jiffies),
            float(values["btime"][0]), memory["MemTotal"], memory.get("MemAvailable", estimate),
        )  # fmt: skip
    except (KeyError, IndexError) as error:
        raise ValueError(f"/proc has no {error}") from None


def _parse_time(words: list[str]) -> tuple[float, float] | None:
    seconds, _, rest = (words[0] if words else "").partition(".")
    if not seconds.isdigit():
        return None
    exact = float(f"{seconds}.{rest}") if rest.isdigit() else None
    return (float(seconds), float(seconds) + 1.0) if exact is None else (exact, exact)


def parse_filesystems(output: str) -> list[Filesystem]:
    """Parse the output of `FILESYSTEMS_SECTION`; filesystems without sizes are left out."""
    found = []
    for block in f"\n{output}".split("\nmount ")[1:]:
        head, *rows = block.split("\n")
        device, kind, mountpoint = (*head.split(" ", 2), "", "")[:3]
        sizes = _parse_row(rows[0]) if rows else None
        files = _parse_row(rows[1]) if len(rows) > 1 else None
        if sizes is None:
            continue
        fixed = files if files is not None and files[0] > 0 else (None, None)
        found.append(Filesystem(device, kind, mountpoint, sizes[0] * 1024, sizes[1] * 1024, *fixed))
    return found


def _parse_row(row: str) -> tuple[int, int] | None:
    """Return total and available from a row of `df -P`: device, total, used, available, percentage, mount point."""
    words = row.split()
    percentage = next((index for index, word in enumerate(words) if word.endswith("%") or word == "-"), 0)
    total, available = words[percentage - 3 : percentage - 2], words[percentage - 1 : percentage]
    if (
        percentage <= len(("total", "used", "available"))
        or not total[0].isdigit()
        or not available[0].lstrip("-").isdigit()
    ):
        return None
    return int(total[0]), int(available[0])
