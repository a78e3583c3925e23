"""The `docker` collector: state, health, exit code, restarts and start time of every container."""

from datetime import datetime

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorOptions, ReadSections, require_output
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
    MetricFamily("host_container_info", "gauge", "Image and restart policy of the container; always 1."),
)
HEALTH = ("starting", "healthy", "unhealthy")
ENDED = ("created", "restarting", "exited", "dead")  # the states of a container that has an exit code
RESTART_POLICIES = ("no", "always", "unless-stopped", "on-failure")
NEVER_STARTED = "0001-"  # start year that Docker reports for a container that was never started


class DockerCollector(Collector[CollectorOptions]):
    shared = True

    def sections(self) -> list[Section]:
        return [docker.SECTION]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        outputs = await read(self.sections())
        for name, container in sorted(docker.parse_containers(require_output(outputs, "docker")).items()):
            samples.add("host_container_up", int(container.is_up), container=name)
            samples.add("host_container_restarts_total", container.restarts, container=name)
            samples.add("host_container_started_timestamp_seconds", _start_time(container.started), container=name)
            if container.state in ENDED:
                samples.add("host_container_exit_code", container.exit_code, container=name)
            for health in HEALTH if container.state == "running" and container.health in HEALTH else ():
                samples.add("host_container_health", int(container.health == health), container=name, health=health)
            policy = container.policy if container.policy in RESTART_POLICIES else ""
            samples.add("host_container_info", 1, container=name, image=container.image, restart_policy=policy)


def _start_time(text: str) -> float | None:
    """Return the Unix time of an RFC 3339 time, or None if the container was never started."""
    try:
        return None if text.startswith(NEVER_STARTED) else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


DOCKER = CollectorKind(CollectorOptions, FAMILIES, DockerCollector)
