"""One reading per host, shared by all probes of that host that need one at the same time."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from exporter.probes.host import HostOptions
from fleet.host.sections import HostReading, Section, merge_sections, read_sections
from fleet.inventory.model import Service
from fleet.shells import ShellError
from fleet.shells.pool import Shells
from runtime.tasks import cancel_and_wait

SHARED_FOR = 1.0  # seconds: how much older than a probe the reading that it rests on may be


class Readings:
    """Reads hosts, each at most once for those who ask within a second."""

    def __init__(self, shells: Shells) -> None:
        self._shells = shells
        self._wanted: Mapping[str, tuple[Section, ...]] = {}
        self._current: dict[str, HostReading] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def want(self, wanted: Mapping[str, tuple[Section, ...]]) -> None:
        """Read this from now on: all that is wanted of a host travels together."""
        for host in [name for name in self._current if self._wanted.get(name) != wanted.get(name)]:
            self._current.pop(host)
        self._wanted = wanted

    def of(self, host: str, *, since: float) -> HostReading:
        """A reading of `host` that began at `since` (of the event loop's clock) or later. Raises ShellError."""
        current = self._current.get(host)
        if current is None or current.requested_at < since:
            sections = self._wanted.get(host)
            if sections is None:
                raise ShellError(f"{host}: nothing is read of it any more")
            current = self._current[host] = HostReading(sections)
            task = asyncio.create_task(self._read(host, sections, current), name=f"read {host}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return current

    async def _read(self, host: str, sections: Sequence[Section], reading: HostReading) -> None:
        error = ShellError(f"{host}: the reading was given up")
        try:
            timeout = max(section.timeout for section in sections)
            error = await read_sections(
                self._shells.get(host), sections, timeout=timeout, on_section=reading.set_output
            )
        except ShellError as failed:
            error = failed
        finally:
            reading.fail(error)

    async def close(self) -> None:
        await cancel_and_wait(self._tasks)


def wanted_by_host(
    services: Iterable[Service], collected: Mapping[str, Sequence[Section]] = MappingProxyType({})
) -> dict[str, tuple[Section, ...]]:
    """What the probes of `services` and the collectors want of each host, within the longest of their timeouts."""
    asked: dict[str, list[Section]] = {host: list(sections) for host, sections in collected.items()}
    for service in services:
        if isinstance(service.probe.options, HostOptions):
            section = replace(service.probe.options.section, timeout=service.probe.timeout)
            asked.setdefault(service.host, []).append(section)
    return {host: merge_sections(sections) for host, sections in asked.items()}
