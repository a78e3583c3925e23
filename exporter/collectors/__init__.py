"""The table of collectors: the options of each, its metric families, and its class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.collectors.base import Collector, CollectorOptions
from exporter.exposition.metrics_page import MetricFamily
from fleet.inventory.kinds import LazyTable


@dataclass(frozen=True)
class CollectorKind:
    """A kind of collector; `create(options, host)` returns a collector, which may keep state between its runs."""

    options: type[CollectorOptions]
    families: tuple[MetricFamily, ...]
    create: type[Collector[Any]]


COLLECTORS: Mapping[str, CollectorKind] = LazyTable(
    {
        "system": "exporter.collectors.system:SYSTEM",
        "gpu": "exporter.collectors.gpu:GPU",
        "docker": "exporter.collectors.docker:DOCKER",
        "systemd": "exporter.collectors.systemd:SYSTEMD",
        "supervisor": "exporter.collectors.supervisor:SUPERVISOR",
        "logs": "exporter.collectors.logs:LOGS",
    }
)
