"""A host's CPU, memory and filesystems, from /proc (proc(5)) and stat."""

import re
from dataclasses import dataclass

from fleet.host import kernel
from fleet.host.numbers import is_count, parse_count
from fleet.host.sections import Section

# Local filesystems. Asking a network filesystem for its size may hang. `fuseblk` is NTFS by ntfs-3g, and exFAT.
_LOCAL_TYPES = "ext2|ext3|ext4|xfs|btrfs|zfs|f2fs|jfs|reiserfs|vfat|exfat|ntfs|ntfs3|fuseblk|bcachefs"
FILESYSTEMS_LIMIT = 200
_SIZES = 5  # of a block, blocks and those available, inodes and free ones
_NOT_FOR_US = ("ermission denied", "o such file", "ot a directory")  # errors, as programs spell them
_MODES, _IDLE, _IOWAIT = 8, 3, 4  # modes of CPU times in /proc/stat, without those of guests, which are counted twice

PROC_SECTION = Section("proc", f"""
echo now $(date +%s.%N)
grep -E '^(cpu[0-9]* |btime )' /proc/stat || exit $?
echo load $(cat /proc/loadavg)
{kernel.SCRIPT.strip()}
grep -E '^Mem(Total|Free|Available):|^(Buffers|Cached|SwapTotal|SwapFree):' /proc/meminfo
""")  # fmt: skip

# The arguments are the numbers of filesystems (`MAJOR:MINOR`) that are listed, but not asked for their size.
#
# Of two filesystems at one place the last one mounted counts, and those below it are hidden, too, unless they were
# mounted on it. Each filesystem is asked by a process of its own, at the same time: one may hang in the kernel, where
# nothing ends it. Its process must not hold the section's output, and is left behind shortly before the section's end.
# busybox's df asks other filesystems as well; it serves where `stat` cannot ask one.
FILESYSTEMS_SECTION = Section("df", rf"""
command -v awk >/dev/null && [ -r /proc/self/mountinfo ] || {{ echo 'awk or /proc/self/mountinfo is missing'; exit 1; }}
exec 2>/dev/null
newline='
'
if stat -f -c %S /proc >/dev/null 2>&1; then
    ask() {{
        found=$(exec stat -f -c '%S %b %a %c %d' "$2" 2>&1) &&
        printf 'sizes %s %s\n' "$1" "$found" || printf 'failed %s %s\n' "$1" "${{found##*: }}"
    }}
else
    ask() {{
        found=$(exec df -Pk "$2" 2>&1) || {{ printf 'failed %s %s\n' "$1" "${{found##*: }}"; return; }}
        files=$(df -Pi "$2" 2>/dev/null)
        printf 'row %s %s\nfiles %s %s\n' "$1" "${{found##*"$newline"}}" "$1" "${{files##*"$newline"}}"
    }}
fi
awk -v skip=" $* " -v limit="${{limit:-8}}" '
function within(mount, other) {{
    for (steps = 0; mount in parent && parent[mount] != mount && steps < 100; steps++) {{
        mount = parent[mount]
        if (mount == other) return 1
    }}
    return 0
}}
{{
    for (dash = 7; dash < NF && $dash != "-"; dash++);
    id[NR] = $1; parent[$1] = $2; number[NR] = $3; at[NR] = $5; type[NR] = $(dash + 1); device[NR] = $(dash + 2)
    if (type[NR] ~ /^({_LOCAL_TYPES})$/ && device[NR] !~ /^\/dev\/loop/) local[++locals] = NR
}}
END {{
    seconds = limit * 0.75
    print "wait", seconds < 1 ? seconds : int(seconds)
    for (over = 1; over <= NR; over++) {{
        below = at[over] == "/" ? "/" : at[over] "/"
        for (i = 1; i <= locals && local[i] < over; i++) {{
            each = local[i]
            if ((at[each] == at[over] || index(at[each], below) == 1) && !within(id[each], id[over])) hidden[each] = 1
        }}
    }}
    for (i = 1; i <= locals; i++) {{
        each = local[i]
        if (hidden[each] || seen[number[each]]++) continue
        if (++listed > {FILESYSTEMS_LIMIT}) {{ left_out++; continue }}
        print index(skip, " " number[each] " ") ? "skip" : "ask", number[each], device[each], type[each], at[each]
    }}
    if (left_out) print "more", left_out
}}' /proc/self/mountinfo | {{
    jobs=
    while read -r what number device type mount; do
        case $what in
        wait) seconds=$number; continue ;;
        more) echo "more $number"; continue ;;
        esac
        printf 'local %s %s %s %s\n' "$number" "$device" "$type" "$mount"
        [ "$what" = ask ] || {{ echo "skipped $number"; continue; }}
        mount=$(printf '%b.' "$mount")
        ask "$number" "${{mount%.}}" &
        jobs="$jobs $!"
    done
    (
        trap 'kill $timer; exit' TERM
        {{ sleep "$seconds" || sleep 1; }} & timer=$!
        wait $timer
        for each in $jobs; do pkill -9 -P "$each"; kill -9 "$each"; done
    ) >/dev/null 2>&1 &
    echo "watchdog $!"
}} | {{
    while IFS= read -r line; do
        case $line in
        'watchdog '*) watchdog=${{line#* }} ;;
        *) printf '%s\n' "$line" ;;
        esac
    done
    kill "$watchdog"
}}
exit 0
""")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU, memory and clock of a host, in seconds, bytes and Unix time.

    `jiffies` are those of all CPUs since boot, by mode: user, nice, system, idle, iowait, irq, softirq, steal. `now` is
    the earliest and the latest time that the host's clock may have had: busybox's date prints whole seconds.
    """

    now: tuple[float, float] | None
    load: tuple[float, float, float]
    cpus: int
    jiffies: tuple[int, ...]
    booted: float
    memory_total: int
    memory_available: int
    swap_total: int | None = None
    swap_free: int | None = None

    def usage_since(self, earlier: "Machine") -> float | None:
        """Return the ratio of CPU time used since an earlier reading; None if no time has passed.

        The kernel's times of idle, iowait and steal may go back; such a mode counts as 0.
        """
        passed = [max(0, now - before) for now, before in zip(self.jiffies, earlier.jiffies, strict=True)]
        total = sum(passed)
        return (total - passed[_IDLE] - passed[_IOWAIT]) / total if total else None


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A filesystem: sizes in bytes, and inodes where their number is fixed.

    Without a size, `error` is why, or empty if the filesystem did not answer. `number` identifies it on the host; hosts
    with an earlier wrapper do not print it, nor filesystems without a size.
    """

    device: str
    type: str
    mountpoint: str
    size: int | None
    available: int | None
    files: int | None = None
    files_free: int | None = None
    number: str = ""
    error: str = ""

    @property
    def hangs(self) -> bool:
        """Whether the filesystem did not answer."""
        return self.size is None and not self.error


def parse_machine(output: str) -> Machine:
    """Parse the output of `PROC_SECTION`. Raises ValueError where a part is missing or malformed."""
    values: dict[str, list[str]] = {}
    cpus = 0
    for line in output.split("\n"):
        name, _, rest = line.partition(" ")
        values[name.rstrip(":")] = rest.split()
        cpus += name[:3] == "cpu" and name[3:].isdigit()
    try:
        jiffies = [parse_count(number) for number in values["cpu"][:_MODES]]
        jiffies += [0] * (_MODES - len(jiffies))  # old kernels have fewer modes
        kinds = ("Mem", "Buf", "Cac", "Swa")
        memory = {name: parse_count(words[0]) * 1024 for name, words in values.items() if name[:3] in kinds}
        # Kernels before 3.14 have no MemAvailable.
        estimate = memory["MemFree"] + memory.get("Buffers", 0) + memory.get("Cached", 0)
        booted = float(parse_count(values["btime"][0]))
        one, five, fifteen = (float(number) for number in values["load"][:3])
        return Machine(
            _parse_time(values.get("now", [])), (one, five, fifteen), cpus, tuple(jiffies), booted,
            memory["MemTotal"], memory.get("MemAvailable", estimate), memory.get("SwapTotal"), memory.get("SwapFree"),
        )  # fmt: skip
    except (KeyError, IndexError) as error:
        raise ValueError(f"/proc has no {error}") from None


def _parse_time(words: list[str]) -> tuple[float, float] | None:
    seconds, _, rest = (words[0] if words else "").partition(".")
    if not is_count(seconds):
        return None
    exact = float(f"{seconds}.{rest}") if is_count(rest) else None
    return (float(seconds), float(seconds) + 1.0) if exact is None else (exact, exact)


@dataclass(frozen=True, slots=True)
class FilesystemList:
    """The filesystems of a host, and how many more there are than `FILESYSTEMS_LIMIT`."""

    found: list[Filesystem]
    left_out: int = 0


def parse_filesystems(output: str) -> FilesystemList:
    """Parse the output of `FILESYSTEMS_SECTION`, also that of a wrapper of an earlier version.

    Left out are filesystems that the account may not ask, and those that were unmounted meanwhile.
    """
    if re.search(r"^mount ", output, re.MULTILINE):
        return FilesystemList(_parse_blocks(output))
    places: dict[str, list[str]] = {}
    sizes: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    left_out = 0
    for line in output.split("\n"):
        kind, number, rest = (*line.split(" ", 2), "", "")[:3]
        words = rest.split()
        if kind == "local" and len(words) == len(("device", "type", "mountpoint")):
            places[number] = words
        elif kind == "sizes" and len(words) == _SIZES and all(map(is_count, words)):
            block, *blocks, files, files_free = map(int, words)
            sizes[number] = [*(block * count for count in blocks), files, files_free]
        elif kind == "row" and (row := _parse_row(rest)) is not None:
            sizes[number] = [*(count * 1024 for count in row), 0, 0]
        elif kind == "files" and number in sizes and (row := _parse_row(rest)) is not None:
            sizes[number][2:] = row
        elif kind == "failed":
            errors[number] = rest.strip()
        elif kind == "more" and is_count(number):
            left_out = int(number)
    hidden = [number for number, error in errors.items() if any(each in error for each in _NOT_FOR_US)]
    found = [
        _build_filesystem(number, words, sizes.get(number), errors.get(number, ""))
        for number, words in places.items()
        if number not in hidden
    ]
    return FilesystemList(found, left_out)


def _build_filesystem(number: str, words: list[str], sizes: list[int] | None, error: str) -> Filesystem:
    device, kind, mountpoint = (_unescape(word) for word in words)
    if sizes is None:
        return Filesystem(device, kind, mountpoint, None, None, number=number, error=error)
    size, available, files, files_free = sizes
    if files <= 0:
        return Filesystem(device, kind, mountpoint, size, available, number=number)
    return Filesystem(device, kind, mountpoint, size, available, files, files_free, number)


def _unescape(text: str) -> str:
    """Return a name of /proc/self/mountinfo, in which blanks and backslashes are octal numbers."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda octal: chr(int(octal[1], 8)), text)


def _parse_blocks(output: str) -> list[Filesystem]:
    """Parse blocks of the line `mount DEVICE TYPE MOUNTPOINT` and the rows of `df -Pk` and `df -Pi`."""
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
        or not is_count(total[0])
        or not is_count(available[0].removeprefix("-"))
    ):
        return None
    return int(total[0]), int(available[0])
