"""The `supervisor` collector: the programs of the configured instances of supervisord, or of the default one."""

from typing import ClassVar

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host.sections import Section
from fleet.managers import supervisor

FAMILIES = (
    MetricFamily("host_program_running", "gauge", "Whether the program of supervisord is RUNNING."),
    MetricFamily(
        "host_program_finished", "gauge", "Whether the program has exited as expected, or has not been started."
    ),
)


class SupervisorCollectorOptions(CollectorOptions):
    wrapper_arguments: ClassVar[tuple[str, ...]] = ("configs",)
    configs: list[supervisor.ConfigPath] = []


class SupervisorCollector(Collector[SupervisorCollectorOptions]):
    shared = True

    @property
    def _names(self) -> list[str]:
        return [supervisor.config_name(config) for config in self.options.configs] or [supervisor.config_name(None)]

    def sections(self) -> list[Section]:
        configs: list[supervisor.ConfigPath | None] = [*self.options.configs]
        return [supervisor.build_section(config) for config in configs or [None]]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        instances = supervisor.parse_supervisord_statuses(require_output(outputs, "supervisor"))
        configured = [instance for name, instance in instances.items() if name in self._names]
        # Several instances may have programs of one name.
        programs: dict[str, list[tuple[str, str]]] = {}
        for instance in configured:
            for name, status in instance.programs.items():
                programs.setdefault(name, []).append(status)
        for name, statuses in sorted(programs.items()):
            stopped = [status for status in statuses if status[0] != "RUNNING"]
            samples.add("host_program_running", int(not stopped), program=name)
            finished = bool(stopped) and all(supervisor.is_finished(*status) for status in stopped)
            samples.add("host_program_finished", int(finished), program=name)
        errors = [instance.error for instance in configured if instance.error]
        if errors:
            raise CollectorFailure(f"supervisor: {errors[0]}")


SUPERVISOR = CollectorKind(SupervisorCollectorOptions, FAMILIES, SupervisorCollector)
