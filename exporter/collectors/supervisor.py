"""The `supervisor` collector: the programs of every supervisord that is named, or of the one that has no name."""

from typing import ClassVar

from exporter.collectors import Kind
from exporter.collectors.collecting import CollectFailure, Collecting, Every, Read, good
from exporter.exposition.page import Family
from exporter.exposition.samples import Samples
from fleet.host.sections import Section
from fleet.managers import supervisor

FAMILIES = (Family("host_program_running", "gauge", "Whether a program of supervisor is RUNNING."),)


class SupervisorOptions(Every):
    wrapper_argument: ClassVar[str] = "configs"
    configs: list[supervisor.ConfigPath] = []


class Supervisor(Collecting[SupervisorOptions]):
    shared = True

    @property
    def _names(self) -> list[str]:
        return [supervisor.config_name(config) for config in self.options.configs] or [supervisor.config_name(None)]

    def sections(self) -> list[Section]:
        configs: list[supervisor.ConfigPath | None] = [*self.options.configs]
        return [supervisor.build_section(config) for config in configs or [None]]

    async def collect(self, read: Read, samples: Samples) -> None:
        outputs = await read(self.sections())
        everyone = supervisor.parse_status(good(outputs, "supervisor"))
        told = {name: one for name, one in everyone.items() if name in self._names}
        programs: dict[str, bool] = {}
        for one in told.values():
            for name, (state, _) in one.programs.items():
                programs[name] = programs.get(name, True) and state == "RUNNING"
        for name, running in sorted(programs.items()):
            samples.add("host_program_running", int(running), program=name)
        refused = [one.error for one in told.values() if one.error]
        if refused:
            raise CollectFailure(f"supervisor: {refused[0]}")


SUPERVISOR = Kind(SupervisorOptions, FAMILIES, Supervisor)
