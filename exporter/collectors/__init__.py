"""The collectors: the options of each, what it publishes, and the class that reads it of one host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.collectors.collecting import Collecting, Every
from exporter.exposition.page import Family
from fleet.inventory.kinds import LazyTable


@dataclass(frozen=True)
class Kind:
    """A kind of collector: `make(options, host)` gives one that keeps what it must know from run to run."""

    options: type[Every]
    families: tuple[Family, ...]
    make: type[Collecting[Any]]


COLLECTORS: Mapping[str, Kind] = LazyTable(
    {
        "system": "exporter.collectors.system:SYSTEM",
        "gpu": "exporter.collectors.gpu:GPU",
        "docker": "exporter.collectors.docker:DOCKER",
        "systemd": "exporter.collectors.systemd:SYSTEMD",
        "supervisor": "exporter.collectors.supervisor:SUPERVISOR",
    }
)
