"""Readings of hosts: those that are requested at the same time are one script, and probes of a host share theirs."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from exporter.probes.host import HostProbeOptions
from fleet.host.sections import (
    HostReading,
    IncompleteReadingError,
    Section,
    SectionOutput,
    merge_sections,
    read_sections,
)
from fleet.inventory.model import Service
from fleet.shells import CONNECT_TIMEOUT, ShellError
from fleet.shells.pool import Shells
from runtime.tasks import cancel_and_wait

SHARED_FOR = 1.0  # seconds: how much older than a probe the reading that it uses may be
JOIN_WITHIN = 0.01  # seconds in which further readings of a host join the first one
SECTIONS_LIMIT = 12  # of one script: the wrappers of hosts refuse more
APART_FOR = 600.0  # seconds for which readings of a host are sent one by one, after a joint one was incomplete


@dataclass(frozen=True)
class _Part:
    """A reading of a joint one, and its sections."""

    sections: Sequence[Section]
    reading: HostReading

    @property
    def timeout(self) -> float:
        return max(section.timeout for section in self.sections)

    @property
    def rank(self) -> int:
        return max(section.rank for section in self.sections)


@dataclass
class _JointReading:
    """Readings of a host that are one script."""

    parts: list[_Part] = field(default_factory=list)

    def may_join(self, sections: Sequence[Section]) -> bool:
        """Whether it has room for these sections, and none of the same name."""
        present = [section.name for part in self.parts for section in part.sections]
        return len(present) + len(sections) <= SECTIONS_LIMIT and not {each.name for each in sections} & {*present}

    def list_sections(self) -> list[Section]:
        """Return all sections; those that may take longer are last, since each is printed after those before it."""
        parts = sorted(self.parts, key=lambda part: (part.timeout, part.rank))
        return [section for part in parts for section in part.sections]

    def set_output(self, name: str, output: SectionOutput) -> None:
        for part in self.parts:
            part.reading.set_output(name, output)

    @property
    def is_incomplete(self) -> bool:
        return not all(part.reading.is_complete for part in self.parts)

    def fail(self, error: ShellError) -> None:
        for part in self.parts:
            part.reading.fail(error)

    def fail_late(self) -> list[asyncio.TimerHandle]:
        """End each part at its own deadline, also if others take longer; return what does that."""
        loop = asyncio.get_running_loop()
        timers = []
        for part in self.parts:
            error = IncompleteReadingError(f"no answer within {part.timeout:g} s", late=True)
            timers.append(loop.call_later(part.timeout + CONNECT_TIMEOUT, part.reading.fail, error))
        return timers


class HostReadings:
    """Reads hosts."""

    def __init__(self, shells: Shells) -> None:
        self._shells = shells
        self._sections: Mapping[str, tuple[Section, ...]] = {}
        self._current: dict[str, HostReading] = {}
        self._joint: dict[str, _JointReading] = {}  # by host, before they are sent
        self._apart_until: dict[str, float] = {}  # by host; event loop's clock
        self._tasks: set[asyncio.Task[None]] = set()

    def set_sections(self, sections: Mapping[str, tuple[Section, ...]]) -> None:
        """Set the sections that callers of `get` share, by host name: all of a host are read together."""
        for host in [name for name in self._current if self._sections.get(name) != sections.get(name)]:
            self._current.pop(host)
        self._sections = sections

    def get(self, host: str, *, since: float) -> HostReading:
        """Return the shared reading of `host` started at `since` (event loop's clock) or later. Raises ShellError."""
        current = self._current.get(host)
        if current is None or current.requested_at < since:
            sections = self._sections.get(host)
            if sections is None:
                raise ShellError(f"{host}: no longer in the inventory")
            current = self._current[host] = self.start(host, sections)
        return current

    def start(self, host: str, sections: Sequence[Section]) -> HostReading:
        """Start a reading of `host`, together with others that are started at the same time."""
        reading, loop = HostReading(sections), asyncio.get_running_loop()
        joint = self._joint.get(host)
        if joint is None or not joint.may_join(sections) or loop.time() < self._apart_until.get(host, 0.0):
            joint = self._joint[host] = _JointReading()
            task = asyncio.create_task(self._read(host, joint), name=f"read {host}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        joint.parts.append(_Part(sections, reading))
        return reading

    async def _read(self, host: str, joint: _JointReading) -> None:
        error = ShellError(f"{host}: reading the host was cancelled")
        timers: list[asyncio.TimerHandle] = []
        try:
            await asyncio.sleep(JOIN_WITHIN)
            self._close_joint(host, joint)
            timers = joint.fail_late()
            sections = joint.list_sections()
            timeout = max(part.timeout for part in joint.parts)
            error = await read_sections(self._shells.get(host), sections, timeout=timeout, on_section=joint.set_output)
            if isinstance(error, IncompleteReadingError) and len(joint.parts) > 1 and joint.is_incomplete:
                self._apart_until[host] = asyncio.get_running_loop().time() + APART_FOR
        except ShellError as shell_error:
            error = shell_error
        finally:
            self._close_joint(host, joint)
            for timer in timers:
                timer.cancel()
            joint.fail(error)

    def _close_joint(self, host: str, joint: _JointReading) -> None:
        if self._joint.get(host) is joint:
            del self._joint[host]

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
