"""The sections of a host that discovery reads, and the parsers of their output.

No command line of a process is read, as it may contain secrets.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

from defib.discovery.model import COMPOSE, Container, Listener, Process, Program, PublishedPort, Unit
from fleet.host.sections import Section
from fleet.managers import supervisor, systemd
from runtime.payloads import load_json

PUBLISHED_LIMIT = 1000  # ports of a container
MAX_PORT = 65535
_DOCKER_FIELDS = (
    ".ID", ".Names", ".State", ".Image", ".Status", ".Command", ".Ports", f'(.Label "{COMPOSE}.project")',
    f'(.Label "{COMPOSE}.service")', f'(.Label "{COMPOSE}.project.working_dir")',
)  # fmt: skip
_DOCKER_FORMAT = ",".join(f"{{{{json {each}}}}}" for each in _DOCKER_FIELDS)

# `docker ps` shortens the command, which may contain secrets, to 20 characters.
CONTAINERS = Section("containers", f"docker ps --all --format '[{_DOCKER_FORMAT}]'", rank=3)

UNITS = Section("units", rank=2, script="""
shown=$(systemctl show --no-pager --property=Id,ActiveState,SubState,Type,LoadState,FragmentPath -- '*.service') || {
    s=$?; printf '%s\\n' "$shown"; exit $s
}
printf '%s\\n' "$shown" | awk 'BEGIN { RS = ""; FS = "\\n" } { for (i = 1; i < NF; i++) printf "%s\\t", $i; print $NF }'
""")  # fmt: skip

# Sockets by inode, the processes that have them open, and the control groups that the kernel has for the sockets, which
# any account may read. Where the account may not name a control group, ss prints its ID, the inode of its directory.
LISTENERS = Section("listeners", rank=1, max_lines=20_000, script=r"""
sockets=$(awk '$4 == "0A" {print "socket", $2, $10}' /proc/net/tcp) || exit $?
[ ! -r /proc/net/tcp6 ] || sockets="$sockets
$(awk '$4 == "0A" {print "socket", $2, $10}' /proc/net/tcp6)"
printf '%s\n' "$sockets"
owners=$({ printf '%s\n' "$sockets"; ls -l /proc/[0-9]*/fd 2>/dev/null; } | awk '
    $1 == "socket" { wanted[$3] = 1; next }
    /^\/proc\/[0-9]+\/fd:$/ { split($0, path, "/"); pid = path[3]; next }
    match($0, /socket:\[[0-9]+\]$/) {
        inode = substr($0, RSTART + 8, RLENGTH - 9)
        if (inode in wanted && !(inode in seen)) { seen[inode] = 1; print "owner", pid, inode }
    }')
printf '%s\n' "$owners"
{ printf '%s\n' "$owners"; cat /proc/[0-9]*/status 2>/dev/null; } | awk '
    $1 == "owner" { wanted[$2] = 1; next }
    $1 == "Name:" { name = substr($0, 7) }
    $1 == "Pid:" { pid = $2; names[pid] = name }
    $1 == "PPid:" { parents[pid] = $2 }
    END {
        for (pid in wanted) {
            line = ""
            for (each = parents[pid]; each > 1 && length(line) < 500; each = parents[each]) line = line "," each
            print "process", pid, substr(line, 2) "-", names[pid]
        }
    }'
files=$(printf '%s\n' "$owners" | awk '!seen[$2]++ && $2 {print "/proc/" $2 "/cgroup"}')
[ -z "$files" ] || grep -E '^(0:|[0-9]+:name=systemd):' /dev/null $files 2>/dev/null
command -v ss >/dev/null 2>&1 || exit 0
ss=$(ss -Hltne 2>/dev/null | awk '{ for (i = 6; i <= NF; i++) if ($i ~ /^cgroup:/) print "cgroup", $4, substr($i, 8) }')
printf '%s\n' "$ss"
case $ss in *unreachable:*)
    find /sys/fs/cgroup -type d \( -name '*.service' -o -name '*.scope' \) -exec ls -di {} + 2>/dev/null |
        sed 's/^ */inode /'
esac
exit 0
""")  # fmt: skip


def parse_containers(output: str) -> list[Container]:
    """Parse the output of `CONTAINERS`; lines that are not complete are left out."""
    found = []
    for line in output.split("\n"):
        values = _parse_json_list(line)
        if len(values) == len(_DOCKER_FIELDS) and all(isinstance(value, str) for value in values):
            id_, name, state, image, status, command, ports, project, service, directory = values
            # Links give a container further names, with a slash.
            own = next((each for each in name.split(",") if "/" not in each), "")
            details = (_parse_published(ports), project, service, directory)
            found.append(Container(own, id_, state, image, status, command.strip('"'), *details))
    return found


def _parse_json_list(line: str) -> list[Any]:
    try:
        value = load_json(line)
    except ValueError:
        return []
    return value if isinstance(value, list) else []


_PUBLISHED = re.compile(r"(\S+):(\d{1,5})(?:-(\d{1,5}))?->(\d{1,5})(?:-\d{1,5})?/tcp")


def _parse_published(text: str) -> tuple[PublishedPort, ...]:
    """Parse the ports of `docker ps`: `0.0.0.0:8000-8001->8000-8001/tcp, 9000/tcp`."""
    found: list[PublishedPort] = []
    for part in text.split(", "):
        if (match := _PUBLISHED.fullmatch(part)) is not None:
            address, (first, inner) = match[1].strip("[]"), (int(match[2]), int(match[4]))
            ports = range(max(first, 1), min(int(match[3] or first), first + PUBLISHED_LIMIT, MAX_PORT) + 1)
            found += (PublishedPort(address, port, inner + port - first) for port in ports)
    return tuple(found[:PUBLISHED_LIMIT])


def parse_units(output: str) -> list[Unit]:
    """Parse the output of `UNITS`: loaded services."""
    found = []
    for line in output.split("\n"):
        values = systemd.parse_properties(line.replace("\t", "\n"))
        if values.get("LoadState") == "loaded" and "ActiveState" in values:
            names = ("Id", "ActiveState", "SubState", "Type", "FragmentPath")
            found.append(Unit(*(values.get(each, "") for each in names)))
    return found


_PID = re.compile(r"pid (\d{1,9}),")


def list_programs(by_config: Mapping[str, supervisor.SupervisordStatus]) -> list[Program]:
    """Return the programs of each supervisord that answered."""
    return [
        Program(name, state, config, int(pid[1]) if (pid := _PID.match(description)) else None)
        for config, instance in by_config.items()
        if not instance.error
        for name, (state, description) in instance.programs.items()
    ]


def parse_listeners(output: str) -> list[Listener]:
    """Parse the output of `LISTENERS`: one listener for each port."""
    lines = _by_kind(output)
    inodes = dict(_pairs(lines["inode"]))
    cgroups = {_parse_port(address): _name_cgroup(path, inodes) for address, path in _pairs(lines["cgroup"])}
    owners = {inode: pid for pid, inode in _pairs(lines["owner"])}
    processes = _parse_processes(lines["process"], lines["file"])
    found: dict[int, Listener] = {}
    for place, inode in _pairs(lines["socket"]):
        address, port = _parse_socket(place)
        if port is None:
            continue
        known = found.get(port)
        process = processes.get(owners.get(inode, "")) or (known.process if known else None)
        addresses = sorted({*(known.addresses if known else ()), address})
        found[port] = Listener(port, addresses, process, cgroups.get(port, ""))
    return [found[port] for port in sorted(found)]


def _by_kind(output: str) -> Mapping[str, list[str]]:
    """Return the lines of each kind, without their first word."""
    kinds: dict[str, list[str]] = {each: [] for each in ("socket", "owner", "process", "file", "cgroup", "inode")}
    for line in output.split("\n"):
        kind, _, rest = line.partition(" ")
        if line.startswith("/proc/"):
            kinds["file"].append(line)
        elif kind in kinds:
            kinds[kind].append(rest)
    return kinds


def _pairs(lines: Iterable[str]) -> list[tuple[str, str]]:
    split = (line.split(" ", 1) for line in lines)
    return [(words[0], words[1]) for words in split if len(words) == 2]  # noqa: PLR2004 - a pair


def _name_cgroup(path: str, inodes: Mapping[str, str]) -> str:
    """Return the path of a control group that ss has printed, or an ID in its place."""
    kind, _, identifier = path.partition(":")
    if kind != "unreachable" or re.fullmatch("[0-9a-f]{1,16}", identifier) is None:
        return path
    return inodes.get(str(int(identifier, 16)), "")


_NUMBER = re.compile("[0-9]{1,9}")
_FILE = re.compile(r"/proc/(\d+)/cgroup:\d+:[^:]*:(.*)")


def _parse_processes(lines: Iterable[str], files: Iterable[str]) -> dict[str, Process]:
    cgroups: dict[str, str] = {}
    for match in filter(None, map(_FILE.fullmatch, files)):
        if match[2] != "/" or match[1] not in cgroups:  # of the two hierarchies, one may be unused
            cgroups[match[1]] = match[2]
    found = {}
    for line in lines:
        pid, ancestors, name = (*line.split(" ", 2), "", "", "")[:3]
        if _NUMBER.fullmatch(pid):
            parents = map(int, filter(_NUMBER.fullmatch, ancestors.rstrip("-").split(",")))
            found[pid] = Process(int(pid), name.strip(), cgroups.get(pid, ""), tuple(parents))
    return found


def _parse_port(address: str) -> int | None:
    port = address.rpartition(":")[2]
    return int(port) if _NUMBER.fullmatch(port) else None


def _parse_socket(place: str) -> tuple[str, int | None]:
    """Return address and port of an entry of /proc/net/tcp, such as `0100007F:1F90`."""
    match = re.fullmatch("([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4})", place)
    if match is None:
        return "", None
    words = (bytes.fromhex(match[1][at : at + 8])[::-1] for at in range(0, len(match[1]), 8))  # little-endian
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address), int(match[2], 16)
