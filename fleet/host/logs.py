"""Logs of a host: journals of units, logs of containers, files, and access logs of web servers.

Each name of a section is `POSITION/SOURCE`: where the last reading has ended, and the unit, container or path. A
reading prints what was written since, the newest part of it where that exceeds the limits, and the position for the
next one. A host stores nothing. Lines of logs begin with `+`, all others with `!`: no log can imitate the latter.
"""

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.numbers import is_count
from fleet.host.sections import Section

UNITS, CONTAINERS, FILES, ACCESS = "log-units", "log-containers", "log-files", "log-access"
SECTIONS = (UNITS, CONTAINERS, FILES, ACCESS)
SHOWN_ERRORS = 5  # lines with a server error that a reading of an access log prints
NEW = "new"  # the position before the first reading, which only finds the end of the log
MAX_LINES, MAX_BYTES = 50_000, 4 * 1024 * 1024  # of a section's output; more than the limits in the scripts
_POSITION = re.compile(r"[A-Za-z0-9@:._-]{1,300}")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
_NUMBER = re.compile(r"[0-9]{1,15}")
_CODE = re.compile(r"[1-5][0-9][0-9]|other")
_PATH = re.compile(r"/[A-Za-z0-9@:._/+=~-]+")


def _check_path(path: str) -> str:
    if not isinstance(path, str) or _PATH.fullmatch(path) is None or posixpath.normpath(path) != path:
        raise ValueError(f"{str(path)!r} is not the absolute path of a log file; write /var/log/app.log")
    return path


LogPath = Annotated[str, AfterValidator(_check_path)]

# The limits of each source: bytes and lines that are printed. `newest` prints the last lines of its input; after
# `!rest`, the size of the incomplete line at the end, to which an `E` was added.
_COMMON = r"""
[ $# -gt 0 ] || exit 0
share=$((3145728 / $#)) max=$((40000 / $#)) drop=0
[ "$share" -le 1048576 ] || share=1048576
[ "$max" -le 10000 ] || max=10000
limit=$share
newest() {
    tr '\000' ' ' | LC_ALL=C awk -v limit="$limit" -v max="$max" -v drop="$drop" -v end="$1" '
        { size = length($0); total++; seen[total % (max + 1)] = substr($0, 1, 2000) }
        END {
            cursor = ""
            if (end == "cursor" && seen[total % (max + 1)] ~ /^-- cursor: /)
                cursor = substr(seen[total-- % (max + 1)], 12)
            if (end == "rest") total--
            first = total > max ? total - max + 1 : 1
            if (first <= drop) first = drop + 1
            for (n = total; n >= first; n--)
                if ((limit -= length(seen[n % (max + 1)]) + 2) < 0) break
            for (i = n + 1; i <= total; i++) print "+" seen[i % (max + 1)]
            if (n > drop) print "!skipped " (n - drop) " lines"
            if (end == "cursor") print "!cursor " cursor
            if (end == "rest") print "!rest " (size - 1)
        }'
}
"""

# journalctl prints the oldest entries after a cursor, or the newest in later versions: where there are too many, the
# position is the end of the journal. Without an entry there is no cursor, and the position is a time.
_UNITS_SCRIPT = (
    "set -f"
    + _COMMON
    + r"""
ask() { journalctl --no-pager --output=cat --show-cursor --unit="$unit" "$@"; }
for name; do
    position=${name%%/*} unit=${name#*/} out=
    printf '!source %s\n' "$unit"
    case $position in
    new) ;;
    @*) out=$(ask --quiet --lines=$((max + 1)) --since="$position" 2>/dev/null | newest cursor) ;;
    *)
        cursor=$(printf '%s' "$position" | tr ':.' '=;')
        out=$(ask --quiet --lines=$((max + 1)) --after-cursor="$cursor" 2>/dev/null | newest cursor)
        ;;
    esac
    cursor=${out##*!cursor } out=${out%!cursor *}
    case $position/$out in
    new/ | *"
!skipped "* | */"!skipped "*)
        cursor=$(ask --quiet --lines=1 2>/dev/null | tail -n 1)
        case $cursor in
        '-- cursor: '*) cursor=${cursor#-- cursor: } ;;
        *) cursor= ;;
        esac
        ;;
    esac
    if [ "$cursor" ]; then
        position=$(printf '%s' "$cursor" | tr '=;' ':.')
    else
        notes=$(ask --lines=1 2>&1 >/dev/null)
        if [ "$notes" ]; then
            printf '!error %s\n' "$(echo $notes)"
            continue
        fi
        case $(systemctl show --property=LoadState -- "$unit" 2>/dev/null) in
        *=not-found) echo "!error there is no such unit"; continue ;;
        esac
        [ "$position" != new ] || position=@$(date +%s)
    fi
    printf '!position %s\n%s\n' "$position" "$out"
done
"""
)

# docker prints a timestamp before each line; only its own messages have none. `--tail` comes first, so that it reads a
# long log from its end.
_CONTAINERS_SCRIPT = (
    _COMMON
    + r"""
for name; do
    since=${name%%/*} container=${name#*/}
    printf '!source %s\n!now %s\n' "$container" "$(date +%s)"
    case $since in
    new) set -- --tail 1 ;;
    *) set -- --since "$since" --tail $((max + 1)) ;;
    esac
    { docker logs --timestamps "$@" "$container" 2>&1 || printf '\n!failed\n'; } | newest
done
"""
)

# A position is INODE.OFFSET.CHECKSUM. The checksum is that of the first 256 bytes, or of those before the offset: a
# file that was truncated and written again, or that has the inode of a removed one, begins with something else.
# The opened file is compared with the path, since root must not read what another user links to.
_FILES_HEAD = r"""
sense() { set -- $(ls -Lnid /proc/self/fd/3 2>/dev/null); inode=$1 size=$6; }
checksum() { printf '%.16s' "$(head -c $(($1 < 256 ? $1 : 256)) </proc/self/fd/3 | sha256sum)"; }
opened() { place=$(readlink /proc/self/fd/3); [ "$place" = "$1" ] || [ "$(id -u)" -ne 0 ]; }
is_old() { [ "$size" -ge "$offset" ] && [ "$(checksum "$offset")" = "$mark" ]; }
bytes() {
    dd if=/proc/self/fd/3 bs=65536 skip=$(($1 / 65536)) count=$((($2 - $1) / 65536 + 2)) 2>/dev/null |
        tail -c +$(($1 % 65536 + 1)) | head -c $(($2 - $1))
}
show() {
    from=$1 drop=0
    if [ $((size - from)) -gt "$read" ]; then
        skipped="$skipped
!skipped $((size - from - read)) bytes"
        from=$((size - read)) drop=1
    fi
    shown=$({ bytes "$from" "$size"; echo E; } | newest rest)
    rest=${shown##*!rest }
    case $rest in
    '' | *[!0-9]*) failed=yes rest=0 ;;
    esac
    next=$((size - rest))
    out="$out
${shown%!rest *}"
}
show_rotated() {
    opened "$1" || return 1
    sense
    [ "$inode" = "$old" ] || [ "$current" = "$old" ] || return 1
    is_old || return 1
    [ "$offset" -eq "$size" ] || show "$offset"
}
show_file() {
    if ! opened "$path"; then
        printf '!error it is reached through a symbolic link: write %s\n' "$(printf %s "$place" | tr -d '\000-\037')"
        return
    fi
    sense
    case $position in
    new) next=$size ;;
    none) show 0 ;;
    *)
        old=${position%%.*} mark=${position##*.} offset=${position#*.}
        offset=${offset%.*} current=$inode
        if [ "$inode" = "$old" ] && is_old; then
            show "$offset"
        else
            limit=$((limit / 2)) read=$((read / 2))
            for dated in "$path"-[0-9]*[0-9]; do :; done
            for other in "$path.1" "$dated"; do
                [ -f "$other" ] && [ -r "$other" ] && show_rotated "$other" 3<"$other" && break
            done
            sense
            show 0
        fi
        ;;
    esac
    sum=$(checksum "$next")
    if [ "$failed" ] || [ ! "$sum" ]; then
        echo "!error it cannot be read with dd, tail, head, awk and sha256sum"
    else
        printf '!position %s\n%s\n' "$inode.$next.$sum" "$out$skipped"
    fi
}
for name; do
    position=${name%%/*} path=${name#*/} limit=$share read=$reads out= skipped= failed=
    printf '!source %s\n' "$path"
    case $position in
    new | none) ;;
    *[!0-9a-f.]* | *.*.*.* | [!0-9]* | *..*) position=new ;;
    *.*.?*) ;;
    *) position=new ;;
    esac
    if [ -d "${path%/*}/" ] && [ -x "${path%/*}/" ] && [ ! -e "$path" ]; then
        echo "!error there is no such file"
        [ "$position" != new ] || echo "!position none"
    elif [ ! -e "$path" ]; then
        echo "!error there is no such file, or its directory cannot be read"
    elif [ ! -f "$path" ]; then
        echo "!error it is not a regular file"
    elif [ ! -r "$path" ]; then
        echo "!error permission denied"
    else
        show_file 3<"$path"
    fi
done
"""
_FILES_SCRIPT = f"{_COMMON}\nreads=$share\n{_FILES_HEAD}"

# Counts the status codes on the host: an access log may have thousands of lines per second, and addresses of people.
# The status follows the request, which is the first text in quotes; within it, servers write a quote as \x22 or \".
_ACCESS_SCRIPT = (
    _COMMON
    + r"""
reads=$((67108864 / $#))
[ "$reads" -le 33554432 ] || reads=33554432
newest() {
    tr '\000' ' ' | LC_ALL=C awk -v drop="$drop" '
        function count(line,    code) {
            if (line == "") return
            line = substr(line, 1, 65536)
            code = match(line, /[^\\]" [1-5][0-9][0-9]( |$)/) ? substr(line, RSTART + 3, 3) : "other"
            codes[code]++
            if (code ~ /^5/) seen[++errors % 5] = substr(line, 1, 2000)
        }
        NR > 1 + drop { count(before) }
        { before = $0 }
        END {
            for (code in codes) print "!code " code " " codes[code]
            for (i = errors > 5 ? errors - 4 : 1; i <= errors; i++) print "+" seen[i % 5]
            print "!rest " (length(before) - 1)
        }'
}
"""
    + _FILES_HEAD
)

SCRIPTS: Mapping[str, str] = {
    UNITS: _UNITS_SCRIPT, CONTAINERS: _CONTAINERS_SCRIPT, FILES: _FILES_SCRIPT, ACCESS: _ACCESS_SCRIPT,
}  # fmt: skip


def build_section(name: str, positions: Mapping[str, str]) -> Section:
    """Return the section that reads these sources from their positions."""
    names = tuple(f"{position}/{source}" for source, position in positions.items())
    return Section(name, SCRIPTS[name], names, rank=3, max_lines=MAX_LINES, max_bytes=MAX_BYTES)


def source_of(name: str) -> str:
    """Return the source of a section's name."""
    return name.partition("/")[2]


@dataclass
class SourceOutput:
    """What a reading has found in a source.

    `position` is where the next one begins, empty if this one has not ended; `skipped` describes what exceeded a limit.
    """

    position: str = ""
    lines: list[str] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    error: str = ""
    now: int = 0  # the host's clock, Unix time


def parse_sources(output: str, sources: Iterable[str]) -> dict[str, SourceOutput]:
    """Parse the output of a section: those of `sources` that it contains."""
    found: dict[str, SourceOutput] = {}
    expected, current = set(sources), SourceOutput()
    for line in output.split("\n"):
        if line.startswith("+"):
            current.lines.append(line[1:].rstrip("\r"))
            continue
        key, _, value = line.partition(" ")
        if key == "!source":
            current = SourceOutput()
            if value in expected:
                found.setdefault(value, current)
        elif key in _SETTERS:
            _SETTERS[key](current, value)
    return found


def _set_position(source: SourceOutput, value: str) -> None:
    if _POSITION.fullmatch(value):
        source.position = value


def _set_error(source: SourceOutput, value: str) -> None:
    source.error = value


def _set_now(source: SourceOutput, value: str) -> None:
    source.now = int(value) if _NUMBER.fullmatch(value) else 0


def _add_skipped(source: SourceOutput, value: str) -> None:
    number, _, unit = value.partition(" ")
    if _NUMBER.fullmatch(number) and unit in ("bytes", "lines"):
        source.skipped.append(f"{number} {unit}")


def _add_code(source: SourceOutput, value: str) -> None:
    code, _, number = value.partition(" ")
    if _CODE.fullmatch(code) and _NUMBER.fullmatch(number):
        source.codes[code] = source.codes.get(code, 0) + int(number)


_SETTERS = {
    "!position": _set_position, "!error": _set_error, "!now": _set_now, "!skipped": _add_skipped, "!code": _add_code,
}  # fmt: skip


def finish_container(source: SourceOutput, before: str) -> None:
    """Complete what was read from the log of a container: its position, its lines without timestamps, and its error.

    The position is a Unix time with nanoseconds, one after that of the last line. `before` is the position so far.
    """
    lines, messages = [], []
    last = _as_nanoseconds(before)
    for line in source.lines:
        stamp, _, text = line.partition(" ")
        at = _parse_timestamp(stamp)
        if at is None:
            messages.append(line.strip())
        elif before == NEW or last is None or at >= (_as_nanoseconds(before) or 0):
            lines.append(text)
            last = max(last or 0, at + 1)
    failed = bool(messages) and messages[-1] == "!failed"
    source.lines = [] if before == NEW else lines
    if failed:
        source.error = next((each for each in reversed(messages[:-1]) if each), "docker logs failed")
        if before == NEW and "o such container" in source.error:
            last = 0  # all that it writes once it exists is new
    if source.now and last is not None and last > (source.now + 2) * 10**9:
        last = source.now * 10**9
        source.skipped.append("lines while the clock was set back")
    if not failed and last is None:
        last = 0
    if last is not None:
        source.position = f"{last // 10**9}.{last % 10**9:09}"


def _parse_timestamp(text: str) -> int | None:
    """Return the nanoseconds since 1970 of a timestamp of docker, or None."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        return None
    try:
        seconds = int(datetime.fromisoformat(f"{match[1]}{match[3]}").timestamp())
    except (ValueError, OverflowError):
        return None
    return seconds * 10**9 + int((match[2] or "").ljust(9, "0"))


def _as_nanoseconds(position: str) -> int | None:
    seconds, _, fraction = position.partition(".")
    return int(seconds) * 10**9 + int(fraction) if is_count(seconds) and is_count(fraction) else None
