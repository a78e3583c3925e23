"""The collectors: the options of each, what it publishes, and the class that reads it of one host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.collectors.base import Collector, CollectorOptions
from exporter.exposition.metrics_page import MetricFamily
from fleet.inventory.kinds import Table


@dataclass(frozen=True)
class CollectorKind:
    """A kind of collector: `make(options, host)` gives one that keeps what it must know from run to run."""

    options: type[CollectorOptions]
    families: tuple[MetricFamily, ...]
    make: type[Collector[Any]]


COLLECTORS: Mapping[str, CollectorKind] = Table(
    {
        "system": "exporter.collectors.system:SYSTEM",
        "gpu": "exporter.collectors.gpu:GPU",
        "docker": "exporter.collectors.docker:DOCKER",
        "systemd": "exporter.collectors.systemd:SYSTEMD",
        "supervisor": "exporter.collectors.supervisor:SUPERVISOR",
    }
)
