"""What /proc and df tell of a machine: what to read, and how it reads (proc(5))."""

from dataclasses import dataclass, field

from fleet.host.sections import Section

# Filesystems on disks of the machine. One that a network carries may hang whoever asks for its size.
_REAL = "ext2|ext3|ext4|xfs|btrfs|zfs|f2fs|jfs|reiserfs|vfat|exfat|ntfs|ntfs3|bcachefs"

PROC_SECTION = Section("proc", """
echo now $(date +%s.%N)
grep -E '^(cpu[0-9]* |btime )' /proc/stat || exit $?
echo load $(cat /proc/loadavg)
grep -E '^Mem(Total|Free|Available):|^(Buffers|Cached):' /proc/meminfo
""")  # fmt: skip

FILESYSTEMS_SECTION = Section("df", f"""
awk '$3 ~ /^({_REAL})$/ && $1 !~ /^\\/dev\\/loop/ && !seen[$1]++ {{print $1, $2, $3}}' /proc/mounts |
while read -r device mount type; do
    mount=$(printf '%b' "$mount")
    printf 'mount %s %s %s\\n' "$device" "$type" "$mount"
    df -Pk "$mount" | tail -n 1
    df -Pi "$mount" 2>/dev/null | tail -n 1
done
""")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds, bytes, and Unix times; `busy` and `total` are jiffies of all CPUs since the start.

    `now` is between which times the clock was: busybox's date tells whole seconds.
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
    """Bytes, and inodes where it has a fixed number of them."""

    device: str
    type: str
    mountpoint: str
    size: int
    available: int
    files: int | None = None
    files_free: int | None = None


@dataclass(slots=True)
class _Told:
    words: dict[str, list[str]] = field(default_factory=dict)
    cpus: int = 0


def parse_machine(output: str) -> Machine:
    """What `PROC_SECTION` printed. Raises ValueError where something of it is missing."""
    told = _Told()
    for line in output.splitlines():
        name, _, rest = line.partition(" ")
        told.words[name.rstrip(":")] = rest.split()
        told.cpus += name[:3] == "cpu" and name[3:].isdigit()
    try:
        jiffies = [int(number) for number in told.words["cpu"][:8]]
        idle = jiffies[3] + jiffies[4]
        memory = {name: int(words[0]) * 1024 for name, words in told.words.items() if name[:3] in ("Mem", "Buf", "Cac")}
        # Kernels before 3.14 do not say what is available.
        rough = memory["MemFree"] + memory.get("Buffers", 0) + memory.get("Cached", 0)
        one, five, fifteen = (float(number) for number in told.words["load"][:3])
        return Machine(
            _time(told.words.get("now", [])), (one, five, fifteen), told.cpus, sum(jiffies) - idle, sum(jiffies),
            float(told.words["btime"][0]), memory["MemTotal"], memory.get("MemAvailable", rough),
        )  # fmt: skip
    except (KeyError, IndexError) as error:
        raise ValueError(f"/proc did not tell {error}") from None


def _time(words: list[str]) -> tuple[float, float] | None:
    seconds, _, rest = (words[0] if words else "").partition(".")
    if not seconds.isdigit():
        return None
    exact = float(f"{seconds}.{rest}") if rest.isdigit() else None
    return (float(seconds), float(seconds) + 1.0) if exact is None else (exact, exact)


def parse_filesystems(output: str) -> list[Filesystem]:
    """What `FILESYSTEMS_SECTION` printed; one that df did not tell of is left out."""
    found = []
    for block in f"\n{output}".split("\nmount ")[1:]:
        head, *rows = block.splitlines()
        device, kind, mountpoint = (*head.split(" ", 2), "", "")[:3]
        sizes = _numbers(rows[0]) if rows else None
        files = _numbers(rows[1]) if len(rows) > 1 else None
        if sizes is None:
            continue
        fixed = files if files is not None and files[0] > 0 else (None, None)
        found.append(Filesystem(device, kind, mountpoint, sizes[0] * 1024, sizes[1] * 1024, *fixed))
    return found


def _numbers(row: str) -> tuple[int, int] | None:
    """All of it and what is left, of a row of `df -P`: device, all, used, left, share, mount point."""
    words = row.split()
    at = next((index for index, word in enumerate(words) if word.endswith("%") or word == "-"), 0)
    if at < 4 or not (words[at - 3].isdigit() and words[at - 1].lstrip("-").isdigit()):  # noqa: PLR2004
        return None
    return int(words[at - 3]), int(words[at - 1])
