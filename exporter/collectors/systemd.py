"""The `systemd` collector: the configured units, and all failed units."""

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host.reading import Section
from fleet.managers import systemd

FAMILIES = (
    MetricFamily(
        "host_unit_active",
        "gauge",
        "Whether the unit is active; has a series for every configured and every failed unit.",
    ),
)


class SystemdCollectorOptions(CollectorOptions):
    units: list[systemd.UnitName] = []


class SystemdCollector(Collector[SystemdCollectorOptions]):
    shared = True

    def sections(self) -> list[Section]:
        return [systemd.reading(*self.options.units), systemd.FAILED]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        failed = systemd.failed(require_output(outputs, systemd.FAILED.name))
        units = systemd.units(require_output(outputs, "systemd"))
        configured = {name: units.get(name) for name in self.options.units}
        active = {name: unit.is_active for name, unit in configured.items() if isinstance(unit, systemd.Unit)}
        for name, is_active in sorted({**dict.fromkeys(failed, False), **active}.items()):
            samples.add("host_unit_active", int(is_active), unit=name)


SYSTEMD = CollectorKind(SystemdCollectorOptions, FAMILIES, SystemdCollector)
