"""What discovery finds on a host, and the services that it proposes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fleet.host.gpu import Gpu

COMPOSE = "com.docker.compose"  # the beginning of the labels of docker compose


@dataclass(frozen=True, slots=True)
class Process:
    """A process with listening ports: its name, its control group and its ancestors, the parent first."""

    pid: int
    name: str
    cgroup: str = ""
    ancestors: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port with a listener: its addresses, and its process and control group where the account may see them."""

    port: int
    addresses: Sequence[str] = ()  # none: unknown
    process: Process | None = None
    cgroup: str = ""

    @property
    def only_loopback(self) -> bool:
        return bool(self.addresses) and all(map(is_loopback, self.addresses))


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A TCP port of the host that docker forwards to a port of a container."""

    address: str
    port: int
    inner: int


@dataclass(frozen=True, slots=True)
class Container:
    """A container of `docker ps`; project, service and directory are those of docker compose."""

    name: str
    id: str
    state: str
    image: str
    status: str = ""
    command: str = ""
    ports: Sequence[PublishedPort] = ()
    project: str = ""
    service: str = ""
    directory: str = ""

    @property
    def compose_labels(self) -> Sequence[str]:
        """The labels of the compose service, which stay when its containers are replaced; none without compose."""
        if not self.project or not self.service:
            return ()
        labels = {"project": self.project, "service": self.service, "oneoff": "False"}
        return [f"{COMPOSE}.{name}={value}" for name, value in labels.items()]


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd service; `path` is the file that defines it."""

    name: str
    active: str
    sub: str
    type: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """A program of a supervisord, which `config` names (`-` for the default one)."""

    name: str
    state: str
    config: str = "-"
    pid: int | None = None


EndpointKind = Literal["closed", "tcp", "http", "openai", "vllm", "ollama", "mineru"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What answers on a port: `closed` where nothing does, `tcp` where it is not HTTP."""

    port: int
    kind: EndpointKind
    scheme: Literal["http", "https"] = "http"
    path: str = "/"  # the path to probe, and its status
    status: int = 0
    title: str = ""
    models: Sequence[str] = ()
    needs_key: bool = False  # the API's list of models was refused
    verified: bool = True  # the certificate, with TLS


@dataclass(frozen=True, slots=True)
class Findings:
    """What runs on a host; `notes` say what could not be read, `missing` which programs the host does not have."""

    host: str
    containers: Sequence[Container] = ()
    units: Sequence[Unit] = ()
    programs: Sequence[Program] = ()
    listeners: Sequence[Listener] = ()
    gpus: Sequence[Gpu] = ()
    endpoints: Mapping[int, Endpoint] = field(default_factory=dict)
    has_docker: bool = False
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """A service: its ID, what it is, its keys as in the configuration, and remarks for the person who reads it."""

    id: str
    base: str  # the ID without the host's name
    host: str
    what: str
    service: Mapping[str, Any]
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class HostProposals:
    """The proposals for a host, what its inventory has already, and what is left out, with the reason."""

    host: str
    proposals: Sequence[Proposal] = ()
    covered: Sequence[str] = ()
    left_out: Sequence[str] = ()
    collect: Mapping[str, Any] = field(default_factory=dict)
