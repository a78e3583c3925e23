"""What we know of docker: argv, and how its answers read."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

from fleet.host.sections import Section
from fleet.managers.guarded_scripts import ManagerMessages, ShellVariable, build_script, echo_to_stderr, quote_command

# https://github.com/moby/moby/blob/master/daemon/names/names.go
ContainerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+$", max_length=255)]
ComposeService = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.][a-zA-Z0-9_.-]*$", max_length=255)]


# As docker's client says it, and docker compose before and since it is a plugin.
MESSAGES = ManagerMessages(
    not_run=(
        r"Cannot connect to the Docker daemon at .*", r"Couldn't connect to Docker daemon.*",
        r".*permission denied while trying to connect to the .*", r"error during connect: .*: dial .*",
        r"docker: '?compose'? is not a docker command.*", r"docker: unknown command: docker compose.*",
    ),
    gone=(r"(Error: |Error response from daemon: )No such (container|object): .*", r"[Nn]o such service: .*"),
)  # fmt: skip
_ID = ShellVariable("id")


def build_action(name: str, container: str) -> list[str]:
    """`docker start|stop|restart CONTAINER`."""
    return _exactly(container, ["docker", name, _ID])


def build_exec(container: str, options: Sequence[str], command: Sequence[str]) -> list[str]:
    """`docker exec CONTAINER COMMAND`."""
    return _exactly(container, ["docker", "exec", *options, _ID, *command])


def build_logs(container: str, lines: int) -> list[str]:
    return _exactly(container, ["docker", "logs", "--timestamps", "--tail", str(lines), _ID])


def _exactly(container: str, argv: Sequence[str]) -> list[str]:
    """A script that runs `argv` with the identifier of the container of exactly this name.

    Where docker has no container of a name, it takes the name for the beginning of an identifier.
    """
    return build_script(*_found(container), f"exec {quote_command(argv)}")


def _found(container: str) -> list[str]:
    """The steps of a script that leave the container's identifier in `id`."""
    look = quote_command(["docker", "inspect", "--type", "container", "--format", _of(container, "{{.Id}}"), container])
    gone = echo_to_stderr(f"Error: No such container: {container}")
    return [f"id=$({look}) || halt", f'test -n "$id" || {{ {gone}; halt; }}']


def _of(container: str, template: str) -> str:
    """A template of `docker inspect` that gives nothing of a container of another name; podman tells it without `/`."""
    return f'{{{{if eq .Name "/{container}" "{container}"}}}}{template}{{{{end}}}}'


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
    """`docker compose start|stop|restart|logs` of a service of the project in `directory`."""
    tail = [f"--tail={lines}"] if lines else []
    act = quote_command(["docker", "compose", "--project-directory", directory, *_COMPOSE[verb], *tail, service])
    # Only what is started need not be there yet.
    return build_script(*_of_project(directory, service, empty=verb == "start"), f"exec {act}")


def build_compose_inspect(directory: str, service: str) -> list[str]:
    """Asks for what `parse_inspection` reads, of the service's first container."""
    first = f"for id in $ids; do {'; '.join(_LOOK)}; done"
    return build_script(*_of_project(directory, service, empty=False), first)


def _of_project(directory: str, service: str, *, empty: bool) -> list[str]:
    """The steps of a script that make sure of the containers that compose would act on, and leave them in `ids`.

    compose looks for its file in the folders above, too, and knows a project by the last part of its folder's name.
    """
    there = [f"test -e {shlex.quote(f'{directory}/{name}')}" for name in _COMPOSE_FILES]
    there.append(f"grep -qs COMPOSE_FILE {shlex.quote(f'{directory}/.env')}")
    ps = quote_command(["docker", "compose", "--project-directory", directory, *_COMPOSE["ps"], service])
    look = quote_command(["docker", "inspect", "--type", "container", "--format", _WORKING_DIR, _ID])
    where = shlex.quote(directory)
    plugin = f"docker compose version >/dev/null 2>&1 || {echo_to_stderr('docker has no compose plugin')}"
    other = echo_to_stderr("the container $id is of the compose project in $at and not in $dir")
    steps = [
        f"dir={where}",
        f"{' || '.join(there)} || {{ {echo_to_stderr('there is no compose file in $dir')}; halt; }}",
        f"ids=$({ps}) || {{ {plugin}; halt; }}",
        f'for id in $ids; do at=$({look}) || halt; test "$at" -ef "$dir" || {{ {other}; halt; }}; done',
    ]
    gone = echo_to_stderr(f"Error: No such container: {service}")
    return steps if empty else [*steps, f'test -n "$ids" || {{ {gone}; halt; }}']


def build_state_query(container: str) -> list[str]:
    """Asks for state and start; nothing is printed where the container is not there under this very name."""
    template = _of(container, "{{.State.Status}} {{.State.StartedAt}}")
    return ["docker", "inspect", "--type", "container", "--format", template, container]


def is_running(output: str) -> bool:
    """Whether the output of `build_state_query` or of `build_inspect` says that the container runs."""
    return output.split(" ", 1)[0] == "running"


_FACTS = (
    "{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{else}}-{{end}} {{.State.Pid}} {{.State.ExitCode}}"
    " {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}} {{if .State.Error}}error{{else}}-{{end}}"
    " {{.RestartCount}} {{.ID}} {{.Name}} {{.HostConfig.RestartPolicy.Name}}"
)


# The container's ends among the daemon's last 256 events; a daemon that is restarted forgets them.
_EVENTS = ["docker", "events", "--since", "168h", "--until", "0s", "--filter", "event=stop", "--filter", "event=die"]
_EVENT = "{{.TimeNano}} {{.Action}}"


def build_inspect(container: str) -> list[str]:
    """Asks for what `parse_inspection` reads, of the container of exactly this name."""
    return build_script(*_found(container), *_LOOK)


def _look() -> list[str]:
    """The steps of a script that print how the container `id` stands, the host's clock, and the container's ends."""
    inspect = quote_command(["docker", "inspect", "--type", "container", "--format", _FACTS, _ID])
    events = f'{quote_command(_EVENTS)} --filter container="$id" --format {shlex.quote(_EVENT)}'
    return [f"{inspect} || exit", "date +%s", f"exec {events}"]


_LOOK = _look()


@dataclass(frozen=True, slots=True)
class ContainerDetails:
    """One container in detail; `health` is empty where it has no check of its own, `failed` where docker failed."""

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
    """What `build_inspect` printed, or None where it is not that."""
    words = output.split()
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
    """What a host told of a container: how it stands, the host's clock (Unix time), its ends by kind (Unix times)."""

    told: ContainerDetails
    now: float | None
    ends: Mapping[str, float]


def parse_inspection(output: str) -> ContainerInspection | None:
    """What `build_inspect` or `build_compose_inspect` printed, or None where it is not that."""
    first, _, rest = output.partition("\n")
    clock, _, events = rest.partition("\n")
    container = parse_details(first)
    if container is None:
        return None
    started = parse_time(container.started) or 0.0
    found = [words for line in events.splitlines() if len(words := line.split()) == 2]  # noqa: PLR2004
    ends = {what: int(at) / 1e9 for at, what in found if _NANOSECONDS.fullmatch(at) and int(at) / 1e9 > started}
    return ContainerInspection(container, _seconds(clock), ends)


_NANOSECONDS = re.compile(r"[0-9]{1,19}")
RESTARTED_ALWAYS = ("always", "unless-stopped")  # restart policies by which docker restarts whatever ends
CRASHES = (134, 139)  # exit codes of an abort and of a segmentation fault


@dataclass(frozen=True, slots=True)
class ContainerEnd:
    """How the last run of an exited container ended: why it was on purpose, or nothing, and when (Unix time).

    Without `known`, docker does not say how.
    """

    stopped: str = ""
    at: float | None = None
    known: bool = True


def classify_end(look: ContainerInspection) -> ContainerEnd:
    """How a container ended after its last start.

    docker tells of `die`, and then of `stop` where it was asked to stop it. What it has forgotten may show in this: it
    restarts whatever ends by policies such as `always`, unless it was asked to stop it, or to send it a signal.
    """
    container = look.told
    if container.state != "exited":
        return ContainerEnd()
    if "stop" in look.ends:
        return ContainerEnd("docker was asked to stop it (docker stop), and not to start it again", look.ends["stop"])
    crashed = container.failed or container.out_of_memory or container.exit_code in CRASHES
    if "die" in look.ends or (crashed and container.policy in RESTARTED_ALWAYS):
        return ContainerEnd()
    if container.policy in RESTARTED_ALWAYS:
        why = f"docker has not restarted it, though its restart policy is {container.policy}"
        return ContainerEnd(f"{why}: it was stopped, or sent a signal", parse_time(container.finished))
    return ContainerEnd(known=False)


def parse_time(time: str) -> float | None:
    """The Unix time of one of docker's; None of what never was."""
    try:
        at = datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return None
    return at if at > 0 else None


def _seconds(output: str) -> float | None:
    """What `date +%s` printed."""
    text = output.strip()
    return float(text) if re.fullmatch("[0-9]{1,19}", text) else None


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    """A container as `docker inspect` tells of it; `health` is empty where it has no check of its own."""

    state: str
    health: str
    exit_code: int
    started: str
    restarts: int
    image: str

    @property
    def is_up(self) -> bool:
        """Running and, where it has a health check, healthy."""
        return self.state == "running" and self.health in ("", "healthy")


_INSPECT = (
    "{{.Name}}\t{{.State.Status}}\t{{if .State.Health}}{{.State.Health.Status}}{{end}}\t{{.State.ExitCode}}"
    "\t{{.State.StartedAt}}\t{{.RestartCount}}\t{{.Config.Image}}"
)

_LISTED = "listed\t{{.ID}}\t{{.Names}}\t{{.State}}\t{{.Image}}\t{{.Status}}"

# The list comes first: `docker inspect` may hang at one container, and then tells of none.
# A container that is removed between the two commands makes the second one fail, and says nothing of the others.
SECTION = Section("docker", rank=3, script=f"""
list=$(docker ps --all --no-trunc --format '{_LISTED}') || exit $?
[ -n "$list" ] || exit 0
printf '%s\\n' "$list"
ids=$(printf '%s\\n' "$list" | cut -f 2)
{{ said=$(docker inspect --type container --format '{_INSPECT}' $ids 2>&1 >&3); s=$?; }} 3>&1
printf '%s\\n' "$said"
case $said in *"No such "*) ;; *) exit $s ;; esac
""")  # fmt: skip


def parse_containers(output: str) -> dict[str, ContainerStatus]:
    """Every container by name, from what `SECTION` printed; of one that is only listed, what the list says."""
    found = {}
    for line in output.splitlines():
        fields = line.split("\t")
        if fields[0] == "listed" and len(fields) == 6:  # noqa: PLR2004
            _, _, names, state, image, status = fields
            code, checked = re.search(r"\((\d+)\)", status), re.search(r"\((?:health: )?([a-z]+)\)$", status)
            health = checked[1] if checked and state == "running" else ""
            container = ContainerStatus(state, health, int(code[1]) if code else 0, "", 0, image)
            # A link gives a container a further name, with a slash; a host may print no other.
            own = [name for name in names.split(",") if "/" not in name]
            found.update(dict.fromkeys(own[:1], container))
        elif len(fields) == 7 and fields[3].lstrip("-").isdigit() and fields[5].isdigit():  # noqa: PLR2004
            name, state, health, exit_code, started, restarts, image = fields
            found[name.lstrip("/")] = ContainerStatus(state, health, int(exit_code), started, int(restarts), image)
    return found
