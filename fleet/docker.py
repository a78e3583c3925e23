"""What we know of docker: argv, and how its answers read."""

from typing import Annotated

from pydantic import StringConstraints

# https://github.com/moby/moby/blob/master/daemon/names/names.go
ContainerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+$", max_length=255)]


def verb(name: str, container: str) -> list[str]:
    """`docker start|stop|restart CONTAINER`."""
    return ["docker", name, container]


def state(container: str) -> list[str]:
    return ["docker", "inspect", "--type", "container", "--format", "{{.State.Status}} {{.State.StartedAt}}", container]


def is_running(output: str) -> bool:
    """Whether the output of `state` says that the container runs."""
    return output.split(" ", 1)[0] == "running"


def logs(container: str, lines: int) -> list[str]:
    return ["docker", "logs", "--timestamps", "--tail", str(lines), container]
