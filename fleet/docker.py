"""What we know of docker: argv, and how its answers read."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

from fleet.readings import Section

# https://github.com/moby/moby/blob/master/daemon/names/names.go
ContainerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+$", max_length=255)]
ComposeService = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.][a-zA-Z0-9_.-]*$", max_length=255)]


def verb(name: str, container: str) -> list[str]:
    """`docker start|stop|restart CONTAINER`."""
    return ["docker", name, container]


_COMPOSE = {
    "start": ["up", "--detach", "--no-deps", "--no-recreate"],  # also where its container was removed
    "stop": ["stop"],
    "restart": ["restart"],
    "ps": ["ps", "--all", "--quiet"],
    "logs": ["logs", "--no-color", "--timestamps"],
}


def compose(directory: str, verb: str, service: str, lines: int = 0) -> list[str]:
    """`docker compose start|stop|restart|ps|logs` of a service of the project in `directory`."""
    tail = [f"--tail={lines}"] if lines else []
    return ["docker", "compose", "--project-directory", directory, *_COMPOSE[verb], *tail, service]


def state(container: str) -> list[str]:
    return ["docker", "inspect", "--type", "container", "--format", "{{.State.Status}} {{.State.StartedAt}}", container]


def is_running(output: str) -> bool:
    """Whether the output of `state` says that the container runs."""
    return output.split(" ", 1)[0] == "running"


_FACTS = (
    "{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{else}}-{{end}} {{.State.Pid}} {{.State.ExitCode}}"
    " {{.State.OOMKilled}} {{.State.StartedAt}} {{.RestartCount}} {{.HostConfig.RestartPolicy.Name}}"
)


def facts(container: str) -> list[str]:
    """Asks for what `told` reads."""
    return ["docker", "inspect", "--type", "container", "--format", _FACTS, container]


@dataclass(frozen=True, slots=True)
class Told:
    """One container in detail; `health` is empty where it has no check of its own."""

    state: str
    health: str
    pid: int
    exit_code: int
    out_of_memory: bool
    started: str
    restarts: int
    policy: str


def told(output: str) -> Told | None:
    """What `facts` printed, or None where it is not that."""
    words = output.split()
    try:
        state, health, pid, exit_code, out_of_memory, started, restarts, *policy = words
        return Told(
            state, health.strip("-"), int(pid), int(exit_code), out_of_memory == "true", started, int(restarts),
            policy[0] if policy else "no",
        )  # fmt: skip
    except ValueError:
        return None


def logs(container: str, lines: int) -> list[str]:
    return ["docker", "logs", "--timestamps", "--tail", str(lines), container]


@dataclass(frozen=True, slots=True)
class Container:
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
READING = Section("docker", rank=3, script=f"""
list=$(docker ps --all --no-trunc --format '{_LISTED}') || exit $?
[ -n "$list" ] || exit 0
printf '%s\\n' "$list"
ids=$(printf '%s\\n' "$list" | cut -f 2)
{{ said=$(docker inspect --type container --format '{_INSPECT}' $ids 2>&1 >&3); s=$?; }} 3>&1
printf '%s\\n' "$said"
case $said in *"No such "*) ;; *) exit $s ;; esac
""")  # fmt: skip


def containers(output: str) -> dict[str, Container]:
    """Every container by name, from what `READING` printed; of one that is only listed, what the list says."""
    found = {}
    for line in output.splitlines():
        fields = line.split("\t")
        if fields[0] == "listed" and len(fields) == 6:  # noqa: PLR2004
            _, _, names, state, image, status = fields
            code, checked = re.search(r"\((\d+)\)", status), re.search(r"\((?:health: )?([a-z]+)\)$", status)
            found[next(name for name in names.split(",") if "/" not in name)] = Container(
                state, checked[1] if checked and state == "running" else "", int(code[1]) if code else 0, "", 0, image
            )
        elif len(fields) == 7 and fields[3].lstrip("-").isdigit() and fields[5].isdigit():  # noqa: PLR2004
            name, state, health, exit_code, started, restarts, image = fields
            found[name.lstrip("/")] = Container(state, health, int(exit_code), started, int(restarts), image)
    return found
