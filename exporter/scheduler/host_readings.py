"""Readings of hosts, shared by the probes and collectors of a host that are due at the same time."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from exporter.probes.host import HostProbeOptions
from fleet.host.sections import HostReading, Section, merge_sections, read_sections
from fleet.inventory.model import Service
from fleet.shells import ShellError
from fleet.shells.pool import Shells
from runtime.tasks import cancel_and_wait

SHARED_FOR = 1.0  # seconds: how much older than a probe the reading that it uses may be


class HostReadings:
    """Reads hosts; callers within a second of each other share one reading of a host."""

    def __init__(self, shells: Shells) -> None:
        self._shells = shells
        self._sections: Mapping[str, tuple[Section, ...]] = {}
        self._current: dict[str, HostReading] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def set_sections(self, sections: Mapping[str, tuple[Section, ...]]) -> None:
        """Set the sections to read by host name; all sections of a host are read together."""
        for host in [name for name in self._current if self._sections.get(name) != sections.get(name)]:
            self._current.pop(host)
        self._sections = sections

    def get(self, host: str, *, since: float) -> HostReading:
        """Return a reading of `host` started at `since` (event loop's clock) or later. Raises ShellError."""
        current = self._current.get(host)
        if current is None or current.requested_at < since:
            sections = self._sections.get(host)
            if sections is None:
                raise ShellError(f"{host}: no longer in the inventory")
            current = self._current[host] = HostReading(sections)
            task = asyncio.create_task(self._read(host, sections, current), name=f"read {host}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return current

    async def _read(self, host: str, sections: Sequence[Section], reading: HostReading) -> None:
        error = ShellError(f"{host}: reading the host was cancelled")
        try:
            timeout = max(section.timeout for section in sections)
            error = await read_sections(
                self._shells.get(host), sections, timeout=timeout, on_section=reading.set_output
            )
        except ShellError as shell_error:
            error = shell_error
        finally:
            reading.fail(error)

    async def close(self) -> None:
        await cancel_and_wait(self._tasks)


def sections_by_host(
    services: Iterable[Service], collector_sections: Mapping[str, Sequence[Section]] = MappingProxyType({})
) -> dict[str, tuple[Section, ...]]:
    """Return by host the sections that probes and collectors read; equal sections are merged."""
    sections: dict[str, list[Section]] = {host: list(each) for host, each in collector_sections.items()}
    for service in services:
        if isinstance(service.probe.options, HostProbeOptions):
            section = replace(service.probe.options.section, timeout=service.probe.timeout)
            sections.setdefault(service.host, []).append(section)
    return {host: merge_sections(each) for host, each in sections.items()}
