"""The `systemd` collector: the configured units, and all failed units."""

import re
from typing import ClassVar

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host.sections import Section
from fleet.managers import systemd

FAMILIES = (
    MetricFamily(
        "host_unit_active",
        "gauge",
        "Whether the unit is active; has a series for every configured and every failed unit.",
    ),
    MetricFamily(
        "host_unit_finished", "gauge", "Whether the configured unit is of the type oneshot and has ended successfully."
    ),
    MetricFamily("host_unit_restarts_total", "counter", "Number of automatic restarts of the configured unit."),
)


NUMBER = re.compile("[0-9]{1,10}")


class SystemdCollectorOptions(CollectorOptions):
    wrapper_arguments: ClassVar[tuple[str, ...]] = ("units",)
    units: list[systemd.UnitName] = []


class SystemdCollector(Collector[SystemdCollectorOptions]):
    shared = True

    def sections(self) -> list[Section]:
        return [systemd.build_section(*self.options.units), systemd.FAILED_SECTION]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        failed = systemd.parse_failed_units(require_output(outputs, systemd.FAILED_SECTION.name))
        units = systemd.parse_units(require_output(outputs, "systemd"))
        configured = {name: units.get(name) for name in self.options.units}
        known = {name: unit for name, unit in configured.items() if isinstance(unit, systemd.UnitStatus)}
        active = {name: unit.is_active or unit.is_running_once for name, unit in known.items()}
        for name, is_active in sorted({**dict.fromkeys(failed, False), **active}.items()):
            samples.add("host_unit_active", int(is_active), unit=name)
        for name, unit in sorted(known.items()):
            samples.add("host_unit_finished", int(unit.is_finished), unit=name)
            restarts = int(unit.restarts) if NUMBER.fullmatch(unit.restarts) else None
            samples.add("host_unit_restarts_total", restarts, unit=name)


SYSTEMD = CollectorKind(SystemdCollectorOptions, FAMILIES, SystemdCollector)
