"""The `docker` collector: every container's state, health, restarts and start."""

from datetime import datetime

from exporter.collectors import Kind
from exporter.collectors.collecting import Collecting, Every, Read, good
from exporter.exposition.page import Family
from exporter.exposition.samples import Samples
from fleet.host.sections import Section
from fleet.managers import docker

FAMILIES = (
    Family("host_container_up", "gauge", "Whether a container runs and, if it has a health check, is healthy."),
    Family("host_container_restarts_total", "counter", "Restarts by docker since the container was started by hand."),
    Family("host_container_started_timestamp_seconds", "gauge", "When the container was started last."),
    Family("host_container_info", "gauge", "The container's image; always 1."),
)
NEVER = "0001-"  # the year of a container that was never started


class Docker(Collecting[Every]):
    shared = True

    def sections(self) -> list[Section]:
        return [docker.SECTION]

    async def collect(self, read: Read, samples: Samples) -> None:
        outputs = await read(self.sections())
        for name, found in sorted(docker.parse_containers(good(outputs, "docker")).items()):
            samples.add("host_container_up", int(found.is_up), container=name)
            samples.add("host_container_restarts_total", found.restarts, container=name)
            samples.add("host_container_started_timestamp_seconds", _started(found.started), container=name)
            samples.add("host_container_info", 1, container=name, image=found.image)


def _started(text: str) -> float | None:
    """Unix time of docker's RFC 3339, whose fractions are longer than Python reads before 3.11."""
    try:
        return None if text.startswith(NEVER) else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


DOCKER = Kind(Every, FAMILIES, Docker)
