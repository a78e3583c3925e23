"""The collectors: the options of each, what it publishes, and the class that reads it of one host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.collectors import docker, gpu, supervisor, system, systemd
from exporter.collectors.collecting import Collecting, Every
from exporter.page import Family


@dataclass(frozen=True)
class Kind:
    """A kind of collector: `make(options, host)` gives one that keeps what it must know from run to run."""

    options: type[Every]
    families: tuple[Family, ...]
    make: type[Collecting[Any]]


COLLECTORS: Mapping[str, Kind] = {
    "system": Kind(Every, system.FAMILIES, system.System),
    "gpu": Kind(Every, gpu.FAMILIES, gpu.Gpu),
    "docker": Kind(Every, docker.FAMILIES, docker.Docker),
    "systemd": Kind(systemd.SystemdOptions, systemd.FAMILIES, systemd.Systemd),
    "supervisor": Kind(supervisor.SupervisorOptions, supervisor.FAMILIES, supervisor.Supervisor),
}
