"""Readings of a host that are requested at the same time: one script, unless one of them held up the others."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from exporter.scheduler import host_readings
from exporter.scheduler.host_readings import JOIN_WITHIN, HostReadings
from fleet.host.sections import HostReading, IncompleteReadingError, Section, SectionOutput
from fleet.shells import CompletedCommand, OutputCallback, ShellError
from fleet.shells.pool import Shells

SLOW = [Section("slow-1", "x", timeout=45), Section("slow-2", "x", timeout=45)]
RANKED = [Section("ranked", "x", rank=3)]
FAST = [Section("fast-b", "x"), Section("fast-a", "x")]


class FakeShell:
    """Prints each section, except those in `missing`; `ends` is how the command ends."""

    wrapped = True

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.missing: set[str] = set()
        self.late = self.too_long = False
        self.error: ShellError | None = None
        self.hangs = False

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> CompletedCommand:
        assert (timeout, stdin) > (0, b"")
        assert on_output is not None
        _, mark, *items = argv
        names = [item.partition(":")[0] for item in items]
        self.commands.append(names)
        if self.error is not None:
            raise self.error
        for name in names:
            if name not in self.missing:
                on_output(f"\n{mark} {name}\nof {shlex.quote(name)}\n{mark} {name} 0\n".encode())
        if self.hangs:
            await asyncio.sleep(3600)
        return CompletedCommand(None, "some", "", "why", late=self.late, too_long=self.too_long)


class Hosts:
    def __init__(self, shell: FakeShell) -> None:
        self.shell = shell

    def get(self, name: str) -> FakeShell:
        assert name == "h"
        return self.shell


@pytest.fixture
async def shell() -> FakeShell:
    return FakeShell()


@pytest.fixture
async def readings(shell: FakeShell) -> AsyncIterator[HostReadings]:
    made = HostReadings(cast("Shells", Hosts(shell)))
    yield made
    await made.close()


async def texts(reading: HostReading, sections: Sequence[Section]) -> list[str]:
    return [(await reading.section(section.name, str))[0].text for section in sections]


async def test_those_at_the_same_time_are_one_script_with_the_slow_ones_last(
    readings: HostReadings, shell: FakeShell
) -> None:
    readings.set_sections({"h": tuple(RANKED)})
    requested = [(readings.start("h", SLOW), SLOW), (readings.get("h", since=0.0), RANKED)]
    await asyncio.sleep(0)  # others may be due a little later
    requested.append((readings.start("h", FAST), FAST))
    for reading, sections in requested:
        assert await texts(reading, sections) == [f"of {section.name}" for section in sections]
    assert shell.commands == [["fast-b", "fast-a", "ranked", "slow-1", "slow-2"]]
    await asyncio.sleep(2 * JOIN_WITHIN)
    assert await texts(readings.start("h", FAST), FAST) == ["of fast-b", "of fast-a"]
    assert len(shell.commands) == 2


async def test_sections_of_the_same_name_are_read_apart(readings: HostReadings, shell: FakeShell) -> None:
    one, other = readings.start("h", FAST), readings.start("h", FAST[:1])
    assert await texts(one, FAST) == ["of fast-b", "of fast-a"]
    assert await texts(other, FAST[:1]) == ["of fast-b"]
    assert sorted(shell.commands, key=len) == [["fast-b"], ["fast-b", "fast-a"]]


@pytest.mark.parametrize("how", ["late", "too_long"])
async def test_one_that_holds_up_the_others_is_read_apart_from_then_on(
    readings: HostReadings, shell: FakeShell, how: str
) -> None:
    shell.missing = {"slow-1", "slow-2"}
    setattr(shell, how, True)
    for _ in range(2):
        fast, slow = readings.start("h", FAST), readings.start("h", SLOW)
        assert await texts(fast, FAST) == ["of fast-b", "of fast-a"]
        with pytest.raises(IncompleteReadingError, match="why"):
            await slow.section("slow-1", str)
    assert sorted(map(len, shell.commands)) == [2, 2, 4]


async def test_a_host_that_does_not_answer_is_an_error_of_all(readings: HostReadings, shell: FakeShell) -> None:
    shell.error = ShellError("no connection")
    started = [(readings.start("h", each), each[0].name) for each in (FAST, SLOW)]
    for reading, name in started:
        with pytest.raises(ShellError, match="no connection"):
            await reading.section(name, str)
    shell.error = None
    assert isinstance((await readings.start("h", FAST).section("fast-a", str))[0], SectionOutput)
    assert len(shell.commands) == 2


async def test_a_script_has_no_more_sections_than_wrappers_accept(readings: HostReadings, shell: FakeShell) -> None:
    parts = [[Section(f"s{number}-{part}", "x") for number in range(5)] for part in range(3)]
    started = [(readings.start("h", part), part) for part in parts]
    for reading, sections in started:
        assert await texts(reading, sections) == [f"of {section.name}" for section in sections]
    assert sorted(map(len, shell.commands)) == [5, 10]


async def test_a_part_ends_at_its_own_deadline(
    readings: HostReadings, shell: FakeShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_readings, "CONNECT_TIMEOUT", 0.1)
    shell.missing, shell.hangs = {"short", "slow-1", "slow-2"}, True
    short = [Section("early", "x", timeout=0.1), Section("short", "x", timeout=0.1)]
    one, slow = readings.start("h", short), readings.start("h", SLOW)
    assert (await one.section("early", str))[0].text == "of early"
    with pytest.raises(IncompleteReadingError, match=r"no answer within 0\.1 s") as caught:
        await one.section("short", str)
    assert caught.value.late
    assert not slow.is_complete
