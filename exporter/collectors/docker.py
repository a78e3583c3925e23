"""The `docker` collector: state, health, exit code, restarts, start time, CPU and memory of every container."""

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorOptions, ReadSections, SteadyCounters, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host.sections import Section
from fleet.managers import docker

FAMILIES = (
    MetricFamily(
        "host_container_up", "gauge", "Whether the container is running and, if it has a health check, healthy."
    ),
    MetricFamily(
        "host_container_restarts_total",
        "counter",
        "Number of restarts by Docker since the container was started manually.",
    ),
    MetricFamily(
        "host_container_started_timestamp_seconds", "gauge", "Unix time at which the container was last started."
    ),
    MetricFamily(
        "host_container_exit_code", "gauge", "Exit code of the last run of a container; absent while it is running."
    ),
    MetricFamily(
        "host_container_health",
        "gauge",
        "Whether the health check of a running container has this result; absent without a health check.",
    ),
    MetricFamily("host_container_cpu_seconds_total", "counter", "CPU time that a running container has used."),
    MetricFamily("host_container_memory_bytes", "gauge", "Memory that a running container uses, without file cache."),
    MetricFamily("host_container_memory_limit_bytes", "gauge", "Memory limit of a running container; absent if none."),
    MetricFamily("host_container_info", "gauge", "Image and restart policy of the container; always 1."),
)
HEALTH = ("starting", "healthy", "unhealthy")
ENDED = ("created", "restarting", "exited", "stopped", "dead")  # the states of a container that has an exit code
RESTART_POLICIES = ("no", "always", "unless-stopped", "on-failure")


class DockerCollector(Collector[CollectorOptions]):
    shared = True

    def __init__(self, options: CollectorOptions, host: str) -> None:
        super().__init__(options, host)
        self._counters = SteadyCounters()

    def sections(self) -> list[Section]:
        return [docker.SECTION]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        output = require_output(outputs, "docker")
        count = self._counters.start_run(samples)
        usage = docker.parse_usage(output)
        for name, container in sorted(docker.parse_containers(output).items()):
            samples.add("host_container_up", int(container.is_up), container=name)
            samples.add("host_container_restarts_total", container.restarts, container=name)
            samples.add(
                "host_container_started_timestamp_seconds", docker.parse_time(container.started), container=name
            )
            if container.state in ENDED:
                samples.add("host_container_exit_code", container.exit_code, container=name)
            for health in HEALTH if container.state == "running" and container.health in HEALTH else ():
                samples.add("host_container_health", int(container.health == health), container=name, health=health)
            policy = container.policy if container.policy in RESTART_POLICIES else ""
            samples.add("host_container_info", 1, container=name, image=container.image, restart_policy=policy)
            if name in usage:
                count("host_container_cpu_seconds_total", usage[name].cpu_seconds, container=name)
                samples.add("host_container_memory_bytes", usage[name].memory, container=name)
                samples.add("host_container_memory_limit_bytes", usage[name].memory_limit, container=name)


DOCKER = CollectorKind(CollectorOptions, FAMILIES, DockerCollector)
