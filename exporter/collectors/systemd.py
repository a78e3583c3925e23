"""The `systemd` collector: the units that are named, and all that have failed."""

from typing import ClassVar

from exporter.collectors import Kind
from exporter.collectors.collecting import Collecting, Every, Read, good
from exporter.exposition.page import Family
from exporter.exposition.samples import Samples
from fleet.host.sections import Section
from fleet.managers import systemd

FAMILIES = (
    Family("host_unit_active", "gauge", "Whether a unit is active: those that are named, and 0 for all that failed."),
)


class SystemdOptions(Every):
    wrapper_argument: ClassVar[str] = "units"
    units: list[systemd.UnitName] = []


class Systemd(Collecting[SystemdOptions]):
    shared = True

    def sections(self) -> list[Section]:
        return [systemd.build_section(*self.options.units), systemd.FAILED_SECTION]

    async def collect(self, read: Read, samples: Samples) -> None:
        outputs = await read(self.sections())
        failed = systemd.parse_failed_units(good(outputs, systemd.FAILED_SECTION.name))
        units = systemd.parse_units(good(outputs, "systemd"))
        own = {name: units.get(name) for name in self.options.units}
        active = {name: unit.is_active for name, unit in own.items() if isinstance(unit, systemd.UnitStatus)}
        for name, is_active in sorted({**dict.fromkeys(failed, False), **active}.items()):
            samples.add("host_unit_active", int(is_active), unit=name)


SYSTEMD = Kind(SystemdOptions, FAMILIES, Systemd)
