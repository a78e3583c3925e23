"""The `supervisor` collector: the programs of every supervisord that is named, or of the one that has no name."""

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host.reading import Section
from fleet.managers import supervisor

FAMILIES = (MetricFamily("host_program_running", "gauge", "Whether a program of supervisor is RUNNING."),)


class SupervisorCollectorOptions(CollectorOptions):
    configs: list[supervisor.Config] = []


class SupervisorCollector(Collector[SupervisorCollectorOptions]):
    shared = True

    @property
    def _names(self) -> list[str]:
        return [supervisor.named(config) for config in self.options.configs] or [supervisor.named(None)]

    def sections(self) -> list[Section]:
        configs: list[supervisor.Config | None] = [*self.options.configs]
        return [supervisor.reading(config) for config in configs or [None]]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        everyone = supervisor.told(require_output(outputs, "supervisor"))
        told = {name: one for name, one in everyone.items() if name in self._names}
        programs: dict[str, bool] = {}
        for one in told.values():
            for name, (state, _) in one.programs.items():
                programs[name] = programs.get(name, True) and state == "RUNNING"
        for name, running in sorted(programs.items()):
            samples.add("host_program_running", int(running), program=name)
        refused = [one.failed for one in told.values() if one.failed]
        if refused:
            raise CollectorFailure(f"supervisor: {refused[0]}")


SUPERVISOR = CollectorKind(SupervisorCollectorOptions, FAMILIES, SupervisorCollector)
