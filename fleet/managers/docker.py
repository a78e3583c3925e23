"""docker and docker compose: command lines, and parsers of their output."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

from fleet.host.numbers import is_count
from fleet.host.sections import Section
from fleet.managers import containers
from fleet.managers.containers import CONTAINER_ID, ContainerSelector
from fleet.managers.guarded_scripts import ManagerMessages, build_script, echo_to_stderr, quote_command

ComposeService = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.][a-zA-Z0-9_.-]*$", max_length=255)]


# Messages of docker's client, and of docker compose as a program and as a plugin.
MESSAGES = ManagerMessages(
    not_run=(
        r"Cannot connect to the Docker daemon at .*", r"Couldn't connect to Docker daemon.*",
        r".*permission denied while trying to connect to the .*", r"error during connect: .*: dial .*",
        r"docker: '?compose'? is not a docker command.*", r"docker: unknown command: docker compose.*",
    ),
    gone=(r"(Error: |Error response from daemon: )No such (container|object): .*", r"[Nn]o such service: .*"),
)  # fmt: skip


def build_action(name: str, container: ContainerSelector) -> list[str]:
    """Return the argv of `docker start|stop|restart CONTAINER`."""
    return _build_command(container, ["docker", name, CONTAINER_ID])


def build_exec(
    container: ContainerSelector, options: Sequence[str], command: Sequence[str], variables: Sequence[str] = ()
) -> tuple[list[str], bytes]:
    """Return the argv of `docker exec CONTAINER COMMAND`, and its stdin, which has the `NAME=VALUE` variables."""
    passed = _pass_variables(variables)
    argv = ["docker", "exec", *options, *passed.options, CONTAINER_ID, *command]
    return build_script(*containers.build_steps(container), *passed.steps, f"exec {quote_command(argv)}"), passed.stdin


def build_create(arguments: Sequence[str], variables: Sequence[str]) -> tuple[list[str], bytes]:
    """Return the argv of `docker create ARGUMENTS`, and its stdin, which has the `NAME=VALUE` variables.

    Variables that cannot be passed are left out.
    """
    passed = _pass_variables([each for each in variables if can_pass(each)])
    argv = ["docker", "create", *passed.options, *arguments]
    return build_script(*passed.steps, f"exec {quote_command(argv)}") if passed.steps else argv, passed.stdin


_LINE_LIMIT = 60_000  # bytes; docker reads lines of less than 64 KiB
_STDIN_START = "@environment"  # a line before the variables: sudo may have left its password unread
_SKIP_TO_START = f'while IFS= read -r line; do test "$line" = {_STDIN_START} && break; done'
# Reads a value of several lines into `v`. Each line ends with an additional `+`, the last one with `.`.
_TAKE = (
    "nl=$(echo; echo .)",
    "nl=${nl%.}",
    "take() { v=; while IFS= read -r line",
    'do v=$v${line%+}; test "$line" = "${line%+}" && break; v=$v$nl; done; v=${v%.}; }',
)
# Names that docker's client, the shell or the script itself use.
_USED_NAMES = re.compile(r"PATH|HOME|IFS|ENV|TMPDIR|GODEBUG|(DOCKER|LD|SSL|XDG)_.*|.*_(PROXY|proxy)|id|nl|line|v")


@dataclass(frozen=True)
class _PassedVariables:
    """How variables of a container are passed to docker: never as arguments, which every user of the host can read.

    docker reads most of them from its stdin. `steps` of the script come first; they read the others from stdin and add
    them to the environment of docker's client, which only its own user and root can read.
    """

    options: Sequence[str]
    steps: Sequence[str]
    stdin: bytes


def _pass_variables(variables: Sequence[str]) -> _PassedVariables:
    if not variables:
        return _PassedVariables((), (), b"")
    in_file = [each for each in variables if _fits_in_line(each)]
    others = dict(each.split("=", 1) for each in variables if not _fits_in_line(each))
    values = [value.replace("\n", "+\n") + "." for value in others.values()]
    return _PassedVariables(
        [*(part for name in others for part in ("--env", name)), "--env-file", "/dev/stdin"],
        [_SKIP_TO_START, *(_TAKE if others else ()), *(f"take; {name}=$v; export {name}" for name in others)],
        "".join(f"{line}\n" for line in [_STDIN_START, *values, *in_file]).encode("utf-8", "surrogateescape"),
    )


def can_pass(variable: str) -> bool:
    """Whether a `NAME=VALUE` variable can be passed to a container."""
    name = variable.partition("=")[0]
    by_client = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and _USED_NAMES.fullmatch(name) is None
    return "\0" not in variable and (_fits_in_line(variable) or by_client)


def _fits_in_line(variable: str) -> bool:
    """Whether docker reads a variable as it is from a line of a file."""
    name = variable.partition("=")[0]
    return (
        name.split() == [name]
        and not name.startswith(("#", "\ufeff"))
        and not ("\n" in variable or variable.endswith("\r"))
        and len(variable.encode("utf-8", "surrogateescape")) <= _LINE_LIMIT
    )


def build_logs(container: ContainerSelector, lines: int) -> list[str]:
    return _build_command(container, ["docker", "logs", "--timestamps", "--tail", str(lines), CONTAINER_ID])


def _build_command(container: ContainerSelector, argv: Sequence[str]) -> list[str]:
    """Return a script that runs `argv` with the ID of the container, and prints which one it is if it has no name."""
    steps = [*containers.build_steps(container), *containers.build_announcement(container)]
    return build_script(*steps, f"exec {quote_command(argv)}")


_COMPOSE = {
    "start": ["up", "--detach", "--no-deps", "--no-recreate"],  # also where its container was removed
    "stop": ["stop"],
    "restart": ["restart"],
    "ps": ["ps", "--all", "--quiet"],
    "logs": ["logs", "--no-color", "--timestamps"],
}
_COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
_WORKING_DIR = '{{index .Config.Labels "com.docker.compose.project.working_dir"}}'


def build_compose_action(directory: str, verb: str, service: str, lines: int = 0) -> list[str]:
    """Return the argv of `docker compose start|stop|restart|logs|ps` for a service of the project in `directory`."""
    tail = [f"--tail={lines}"] if lines else []
    act = quote_command(["docker", "compose", "--project-directory", directory, *_COMPOSE[verb], *tail, service])
    # Only `start` may find no container.
    return build_script(*_find_project_steps(directory, service, empty=verb == "start"), f"exec {act}")


def build_compose_inspect(directory: str, service: str) -> list[str]:
    """Return the argv that prints what `parse_inspection` reads, for the service's first container."""
    first = f"for id in $ids; do {'; '.join(_INSPECT_STEPS)}; done"
    return build_script(*_find_project_steps(directory, service, empty=False), first)


def _find_project_steps(directory: str, service: str, *, empty: bool) -> list[str]:
    """Return the steps that set `ids` to the containers that compose would act on, or halt.

    They check that the containers are of this very folder: compose also uses a file of a parent folder, and
    identifies a project by its folder's last name only.
    """
    has_file = [f"test -e {shlex.quote(f'{directory}/{name}')}" for name in _COMPOSE_FILES]
    has_file.append(f"grep -qs COMPOSE_FILE {shlex.quote(f'{directory}/.env')}")
    ps = quote_command(["docker", "compose", "--project-directory", directory, *_COMPOSE["ps"], service])
    folder = quote_command(["docker", "inspect", "--type", "container", "--format", _WORKING_DIR, CONTAINER_ID])
    plugin = f"docker compose version >/dev/null 2>&1 || {echo_to_stderr('docker has no compose plugin')}"
    other = echo_to_stderr("the container $id is of the compose project in $at and not in $dir")
    steps = [
        f"dir={shlex.quote(directory)}",
        f"{' || '.join(has_file)} || {{ {echo_to_stderr('there is no compose file in $dir')}; halt; }}",
        f"ids=$({ps}) || {{ {plugin}; halt; }}",
        f'for id in $ids; do at=$({folder}) || halt; test "$at" -ef "$dir" || {{ {other}; halt; }}; done',
    ]
    gone = echo_to_stderr(f"Error: No such container: {service}")
    return steps if empty else [*steps, f'test -n "$ids" || {{ {gone}; halt; }}']


def build_state_query(container: ContainerSelector) -> list[str]:
    """Return the argv that prints state and start time; nothing where no container has exactly this name."""
    query = ["docker", "inspect", "--type", "container", "--format"]
    if container.name:
        state = containers.if_named(container.name, "{{.State.Status}} {{.State.StartedAt}}")
        return [*query, state, container.name]
    state = quote_command([*query, "{{.State.Status}} {{.State.StartedAt}} {{.Name}}", CONTAINER_ID])
    return build_script(*containers.build_steps(container), f"exec {state}")


def is_running(output: str) -> bool:
    """Whether the container runs, by the output of `build_state_query` or `build_inspect`."""
    return output.split(" ", 1)[0] == "running"


_DETAILS = (
    "{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{else}}-{{end}} {{.State.Pid}} {{.State.ExitCode}}"
    " {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}} {{if .State.Error}}error{{else}}-{{end}}"
    " {{.RestartCount}} {{.ID}} {{.Name}} {{.HostConfig.RestartPolicy.Name}}"
)


# The container's ends, among the last 256 events of all containers; a restart of the daemon clears them.
_EVENTS = ["docker", "events", "--since", "168h", "--until", "0s", "--filter", "event=stop", "--filter", "event=die"]
_EVENT = "{{.TimeNano}} {{.Action}}"


def build_inspect(container: ContainerSelector) -> list[str]:
    """Return the argv that prints what `parse_inspection` reads."""
    more = containers.build_running_names(container)
    return build_script(*containers.build_steps(container), *_INSPECT_STEPS[:-1], *more, _INSPECT_STEPS[-1])


def _build_inspect_steps() -> list[str]:
    """Return the steps that print the details of the container `id`, the host's clock, and the container's ends."""
    inspect = quote_command(["docker", "inspect", "--type", "container", "--format", _DETAILS, CONTAINER_ID])
    events = f'{quote_command(_EVENTS)} --filter container="$id" --format {shlex.quote(_EVENT)}'
    return [f"{inspect} || exit", "date +%s", f"exec {events}"]


_INSPECT_STEPS = _build_inspect_steps()


@dataclass(frozen=True, slots=True)
class ContainerDetails:
    """A container in detail; `health` is empty without a health check, `failed` where docker could not start it."""

    state: str
    health: str
    pid: int
    exit_code: int
    out_of_memory: bool
    started: str
    finished: str
    failed: bool
    restarts: int
    id: str
    name: str
    policy: str


def parse_details(output: str) -> ContainerDetails | None:
    """Parse the first line of the output of `build_inspect`; None where it has another form."""
    # podman prints times with blanks, and an empty health without a health check.
    words = _GO_TIME.sub(r"\1T\2\3", output).strip().split(" ")
    try:
        state, health, pid, exit_code, out_of_memory, started, finished, failed, restarts, id_, name, *policy = words
        return ContainerDetails(
            state, health.strip("-"), int(pid), int(exit_code), out_of_memory == "true", started, finished,
            failed == "error", int(restarts), id_, name.removeprefix("/"), policy[0] if policy else "no",
        )  # fmt: skip
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class ContainerInspection:
    """A container's details, the host's clock, and the times of its ends by event (`die`, `stop`), in Unix time.

    `running` has the names of all running containers that match, where it was not selected by its name.
    """

    details: ContainerDetails
    now: float | None
    ends: Mapping[str, float]
    running: Sequence[str] = ()


def parse_inspection(output: str) -> ContainerInspection | None:
    """Parse the output of `build_inspect` or `build_compose_inspect`; None where it has another form."""
    first, _, rest = output.partition("\n")
    clock, _, events = rest.partition("\n")
    container = parse_details(first)
    if container is None:
        return None
    started = parse_time(container.started) or 0.0
    rows = [(line.split(" ", 1)) for line in events.splitlines() if line.count(" ") == 1]
    ends = {action: int(at) / 1e9 for at, action in rows if _NANOSECONDS.fullmatch(at) and int(at) / 1e9 > started}
    running = next((line.split()[1:] for line in events.splitlines() if line.startswith("running ")), [])
    return ContainerInspection(container, _parse_clock(clock), ends, running)


_NANOSECONDS = re.compile(r"[0-9]{1,19}")
RESTARTED_ALWAYS = ("always", "unless-stopped")  # restart policies that restart a container however it ends
CRASHES = (134, 139)  # exit codes: SIGABRT, SIGSEGV


@dataclass(frozen=True, slots=True)
class ContainerEnd:
    """How the last run of an exited container ended.

    `stopped` is why it was stopped on purpose, or empty; `at` is when (Unix time). Without `known`, docker has no
    information about it.
    """

    stopped: str = ""
    at: float | None = None
    known: bool = True


def classify_end(inspection: ContainerInspection) -> ContainerEnd:
    """Return how a container ended after its last start.

    docker has an event `die`, followed by `stop` where a client stopped the container. Where it has lost the events,
    the restart policy helps: with `always`, docker restarts a container unless a client stopped it or sent it a signal.
    """
    container = inspection.details
    if container.state != "exited":
        return ContainerEnd()
    if "stop" in inspection.ends:
        return ContainerEnd("it was stopped with docker stop, and not started again", inspection.ends["stop"])
    crashed = container.failed or container.out_of_memory or container.exit_code in CRASHES
    if "die" in inspection.ends or (crashed and container.policy in RESTARTED_ALWAYS):
        return ContainerEnd()
    if container.policy in RESTARTED_ALWAYS:
        reason = f"docker has not restarted it, although its restart policy is {container.policy}"
        return ContainerEnd(f"{reason}: it was stopped, or sent a signal", parse_time(container.finished))
    return ContainerEnd(known=False)


# A time as podman prints it: `2026-11-28 20:00:00.123456789 +0000 UTC`.
_GO_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d{1,9})?) ([+-]\d{4}) [A-Z0-9+-]{1,9}")


def parse_time(time: str) -> float | None:
    """Return the Unix time of a time in docker's or podman's output; None for the zero time."""
    try:
        at = datetime.fromisoformat(_GO_TIME.sub(r"\1T\2\3", time)).timestamp()
    except (ValueError, OverflowError):
        return None
    return at if at > 0 else None


def _parse_clock(output: str) -> float | None:
    """Parse the output of `date +%s`."""
    text = output.strip()
    return float(text) if re.fullmatch("[0-9]{1,19}", text) else None


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    """A container from `docker inspect`; `health` is empty without a health check, `policy` where it is unknown."""

    state: str
    health: str
    exit_code: int
    started: str
    restarts: int
    image: str
    policy: str = ""

    @property
    def is_up(self) -> bool:
        """Running and, where it has a health check, healthy."""
        return self.state == "running" and self.health in ("", "healthy")


# Columns are separated by `|`: podman 3 replaces tabs with blanks. It has another name for the health, too.
_INSPECT = (
    "{{.Name}}|{{.State.Status}}|{{if .State.Health}}{{.State.Health.Status}}{{end}}|{{.State.ExitCode}}"
    "|{{.State.StartedAt}}|{{.RestartCount}}|{{.Config.Image}}|{{.HostConfig.RestartPolicy.Name}}|{{.ID}}"
)
_INSPECTED_BEFORE = (7, 8)  # columns that wrappers of earlier versions print, separated by tabs

_LISTED = "listed|{{.ID}}|{{.Names}}|{{.State}}|{{.Image}}|{{.Status}}"

# The list comes first: where `docker inspect` hangs at one container, it prints none.
# A container that is removed between the two commands makes the second fail, but its output has all others.
# What containers use is in the files of their control groups, which have their IDs; `docker stats` would take seconds.
# The first version of control groups has a tree for each resource.
SECTION = Section("docker", rank=3, script=f"""
inspect() {{
    found=$(docker inspect --type container --format "$1" $ids 2>&1)
    status=$?
}}
list=$(docker ps --all --no-trunc --format '{_LISTED}') || exit $?
[ -n "$list" ] || exit 0
printf '%s\\n' "$list"
ids=$(printf '%s\\n' "$list" | cut -d '|' -f 2)
inspect '{_INSPECT}'
case $found in *'evaluate field Health '*) inspect '{_INSPECT.replace(".State.Health", ".State.Healthcheck")}' ;; esac
printf '%s\\n' "$found"
if [ -d /sys/fs/cgroup/memory ]; then
    groups='/sys/fs/cgroup/cpuacct/ /sys/fs/cgroup/memory/'
else
    groups=/sys/fs/cgroup
fi
{{ printf '%s\\n' "$found"; find $groups -type d 2>/dev/null; }} | awk -F '|' '
function read_line(path) {{
    line = ""
    if ((getline line < path) <= 0) line = ""
    close(path)
    return line
}}
function read_value(path, name) {{
    value = ""
    while ((getline line < path) > 0) {{ split(line, words, " "); if (words[1] == name) value = words[2] }}
    close(path)
    return value
}}
NF > 8 {{ running[$NF] = $2 == "running" }}
/^\\/sys\\// && !/conmon/ {{
    id = $0
    sub(/\\.scope$/, "", id)
    sub(/.*[\\/-]/, "", id)
    if (!running[id]) next
    if (/^\\/sys\\/fs\\/cgroup\\/cpuacct\\//) time[id] = "nanoseconds|" read_line($0 "/cpuacct.usage")
    else if (/^\\/sys\\/fs\\/cgroup\\/memory\\//)
        memory[id] = read_line($0 "/memory.usage_in_bytes") "|" read_value($0 "/memory.stat", "total_inactive_file") \\
            "|" read_line($0 "/memory.limit_in_bytes")
    else {{
        time[id] = "microseconds|" read_value($0 "/cpu.stat", "usage_usec")
        memory[id] = read_line($0 "/memory.current") "|" read_value($0 "/memory.stat", "inactive_file") \\
            "|" read_line($0 "/memory.max")
    }}
}}
END {{
    for (id in time) print "used|" id "|" time[id] "|" (id in memory ? memory[id] : "||")
}}'
case $found in *"No such "*) ;; *) exit $status ;; esac
""")  # fmt: skip


def parse_containers(output: str) -> dict[str, ContainerStatus]:
    """Parse the output of `SECTION`: containers by name, from `docker inspect`, or else from `docker ps`."""
    found: dict[str, ContainerStatus] = {}
    for fields in _split_lines(output):
        if fields[0] == "listed" and len(fields) == len(_LISTED.split("|")):
            _, _, names, state, image, status = fields
            code, checked = re.search(r"\(([0-9]{1,20})\)", status), re.search(r"\((?:health: )?([a-z]+)\)$", status)
            state = _parse_state(state)
            health = checked[1] if checked and state == "running" else ""
            container = ContainerStatus(state, health, int(code[1]) if code else 0, "", 0, image)
            # Links give a container further names, with a slash.
            own = [name for name in names.split(",") if "/" not in name]
            found.update(dict.fromkeys(own[:1], container))
        elif _is_inspected(fields):
            name, state, health, exit_code, started, restarts, image, *policy = fields
            found[name.lstrip("/")] = ContainerStatus(
                state, health, _read_number(exit_code), started, _read_number(restarts), image, *policy[:1]
            )
    return found


def _split_lines(output: str) -> Iterator[list[str]]:
    """Yield the columns of each line."""
    for line in output.split("\n"):
        yield line.split("|" if "|" in line else "\t")


def _parse_state(text: str) -> str:
    """Return a container's state in the list; podman 3 prints `Up 2 hours ago` and `Exited (0) 2 hours ago`."""
    word = text.partition(" ")[0].lower()
    return "running" if word == "up" else word


_NUMBER = re.compile("-?[0-9]+")


def _read_number(text: str) -> int:
    """Return a number; 0 for one that is too large, since its container has a state, too."""
    return int(text) if is_count(text.removeprefix("-")) else 0


def _is_inspected(fields: Sequence[str]) -> bool:
    """Whether a line is of `docker inspect`."""
    known = (*_INSPECTED_BEFORE, len(_INSPECT.split("|")))
    return (
        len(fields) in known and _NUMBER.fullmatch(fields[3]) is not None and _NUMBER.fullmatch(fields[5]) is not None
    )


@dataclass(frozen=True, slots=True)
class ContainerUsage:
    """What a running container uses: seconds of CPU time since its start, and bytes of memory without file cache."""

    cpu_seconds: float | None
    memory: int | None
    memory_limit: int | None


_PER_SECOND = {"nanoseconds": 10**9, "microseconds": 10**6}
_UNLIMITED = 2**62  # bytes: the kernel's value without a limit is a little below 2**63


def parse_usage(output: str) -> dict[str, ContainerUsage]:
    """Parse what the containers use by name; wrappers of earlier versions do not print it."""
    names: dict[str, str] = {}
    found: dict[str, ContainerUsage] = {}
    for fields in _split_lines(output):
        if len(fields) == len(_INSPECT.split("|")) and _is_inspected(fields):
            names[fields[-1]] = fields[0].lstrip("/")
        elif fields[0] == "used" and len(fields) == _USED and fields[1] in names and fields[2] in _PER_SECOND:
            time, memory, inactive, limit = (int(text) if is_count(text) else None for text in fields[3:])
            found[names[fields[1]]] = ContainerUsage(
                None if time is None else time / _PER_SECOND[fields[2]],
                None if memory is None else max(0, memory - (inactive or 0)),
                limit if limit is not None and limit < _UNLIMITED else None,
            )
    return found


_USED = len(("used", "id", "unit", "time", "memory", "inactive", "limit"))
