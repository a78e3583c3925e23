"""Files of a host: when they were changed, and their size.

A name that ends in `/` stands for the files of a folder, without those of folders below it.
"""

import fnmatch
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.sections import Section

NAME = "files"
FILES_LIMIT = 1000  # of a folder, the newest
MAX_LINES, MAX_BYTES = 20_000, 4 * 1024 * 1024  # of the section, for all folders of a host
_GLOB = re.compile(r"[*?\[]")
_ENTRY = re.compile(r"\+(-?\d{1,12}) (\d{1,18}) (.+)")
_COUNT = re.compile(r"\d{1,12}")


def _check_path(path: str) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "," in path or not path.isprintable():
        raise ValueError(f"{str(path)!r} is not an absolute path on the host; write /var/backups/db.dump")
    folder, name = posixpath.split(path)
    if posixpath.normpath(folder) != folder or name in ("", ".", ".."):
        raise ValueError(f"{path!r} must be the path of a file, without `.`, `..` or a slash at its end")
    if _GLOB.search(folder):
        raise ValueError(f"{path!r}: `*`, `?` and `[…]` are possible in the last part only")
    return path


FilePath = Annotated[str, AfterValidator(_check_path)]

# Names with line breaks are left out. The host's time comes first: its clock may differ from ours.
SCRIPT = rf"""
export LC_ALL=C
printf '!now %s\n' "$(date +%s)"
for name; do
    printf '!path %s\n' "$name"
    if ! found=$(stat -L -c '%Y %s %n' -- "$name" 2>&1); then
        case $found in
        *'No such file'* | *'Not a directory'*) ;;
        *) printf '!error %s\n' "$(echo $found)" ;;
        esac
    elif [ "${{name%/}}" = "$name" ]; then
        if [ -f "$name" ]; then printf '+%s\n' "$found"; else echo '!other'; fi
    elif [ -r "$name" ] && [ -x "$name" ]; then
        find -L "$name" -maxdepth 1 -type f ! -name '*
*' -exec stat -L -c '%Y %s %n' -- {{}} + 2>/dev/null | sort -rn | awk '
            NR <= {FILES_LIMIT} {{ print "+" $0 }}
            END {{ print "!count " NR }}'
    else
        echo '!error Permission denied'
    fi
    echo '!end'
done
"""


@dataclass(frozen=True, slots=True)
class HostFile:
    """A file: Unix time of its last change by the host's clock, and bytes."""

    name: str
    modified: float
    size: int


@dataclass(frozen=True, slots=True)
class FileListing:
    """The files that a name stands for: of a folder with `count` files, those that were changed last.

    `error` says why they could not be read.
    """

    now: float  # the host's Unix time
    files: tuple[HostFile, ...] = ()
    count: int = 0
    error: str = ""
    is_other: bool = False  # than a regular file

    def find_newest(self, path: str) -> HostFile | None:
        """Return the file that was changed last among those that match the path, as a shell matches it."""
        pattern = posixpath.basename(path)
        matching = (each for each in self.files if _matches(posixpath.basename(each.name), pattern))
        return max(matching, key=lambda each: each.modified, default=None)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, or is the same; a dot at its beginning must stand in the pattern."""
    if _GLOB.search(pattern) is None:
        return name == pattern
    return fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))


def name_of(path: str) -> str:
    """Return the name in the section for a path: its folder, if the last part is a pattern."""
    folder, slash, last = path.rpartition("/")
    return folder + slash if _GLOB.search(last) else path


def build_section(path: str) -> Section:
    return Section(NAME, SCRIPT, (name_of(path),), rank=1, max_lines=MAX_LINES, max_bytes=MAX_BYTES)


def parse_listings(output: str) -> Mapping[str, FileListing]:
    """Parse the section's output: listings by name, without those that are incomplete."""
    listings: dict[str, FileListing] = {}
    now, name, files, count, error, is_other = 0.0, "", list[HostFile](), 0, "", False
    for line in output.split("\n"):
        word, _, rest = line.partition(" ")
        if len(files) == FILES_LIMIT and line.startswith("+"):
            error = f"more than {FILES_LIMIT} files were listed"  # the script lists no more
        elif entry := _ENTRY.fullmatch(line):
            files.append(HostFile(entry[3], float(entry[1]), int(entry[2])))
        elif word == "!now" and _COUNT.fullmatch(rest):
            now = float(rest)
        elif word == "!path":
            name, files, count, error, is_other = rest, [], 0, "", False
        elif word == "!count" and _COUNT.fullmatch(rest):
            count = int(rest)
        elif word == "!error":
            error = rest or "unknown error"
        elif word == "!other":
            is_other = True
        elif word == "!end":
            listings[name] = FileListing(now, tuple(files), count, error, is_other)
    return listings
