"""Small helpers of the tests."""

import asyncio
import re
import ssl
import tempfile
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from defib.kinds import KINDS
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import probe_once
from fleet.inventory.loading import PROGRAMS, LoadedInventory, load
from fleet.inventory.model import Inventory
from fleet.inventory.problems import ConfigurationError
from fleet.inventory.references import Program
from remediator.record.database import Database
from runtime.clock import SteadyClock
from runtime.redaction import Redactor

T = TypeVar("T")
SCREENSHOTS = Path("build/screenshots")  # of the tests in a browser; docs/images has some of them


def write(folder: Path, **files: str) -> Path:
    """Write YAML files named by the keywords; returns the folder."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return folder


def loaded(
    folder: Path, environ: Mapping[str, str] | None = None, programs: Iterable[Program] = PROGRAMS
) -> LoadedInventory:
    return load(folder, KINDS, programs=programs, environ=environ or {})


def load_problems(
    folder: Path, environ: Mapping[str, str] | None = None, programs: Iterable[Program] = PROGRAMS
) -> list[str]:
    """The errors of a configuration, its files named without their folder."""
    try:
        loaded(folder, environ, programs)
    except ConfigurationError as error:
        return [re.sub(rf"{re.escape(str(folder))}/(\S+?\.yaml:)", r"\1", str(wrong)) for wrong in error.problems]
    return []


def inventory_of(folder: Path, written: Mapping[str, Any]) -> LoadedInventory:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defib.yaml").write_text(yaml.safe_dump(dict(written), allow_unicode=True), encoding="utf-8")
    return loaded(folder)


def new_record(folder: Path, inventory: Inventory | None = None) -> Database:
    """Create an empty record in a folder."""
    path = folder / "record.db"
    path.write_bytes(_migrated())
    return Database(f"sqlite:///{path}", inventory or Inventory())


WEBHOOK_TOKEN = "a-token-for-webhooks-only"


class ManualClock(SteadyClock):
    """A clock that stands at `at` until it is set."""

    def __init__(self, at: float) -> None:
        super().__init__(0.0)
        self.at = at

    def now(self) -> float:
        return self.at

    def unix(self, at: float) -> float:
        return at


class RecordHarness:
    """A record in a new database; `inventory` is the database's."""

    def __init__(self, folder: Path, inventory: Inventory) -> None:
        self.database = new_record(folder, inventory)

    @property
    def inventory(self) -> Inventory:
        return self.database.inventory

    @inventory.setter
    def inventory(self, inventory: Inventory) -> None:
        self.database.inventory = inventory


class ClockedHarness(RecordHarness):
    """A record whose clock stands at `now` until it is set."""

    def __init__(self, folder: Path, inventory: Inventory, at: float | None = None) -> None:
        super().__init__(folder, inventory)
        self.database.clock = self.clock = ManualClock(self.database.clock.now() if at is None else at)

    @property
    def now(self) -> float:
        return self.clock.at

    @now.setter
    def now(self, at: float) -> None:
        self.clock.at = at


@cache
def _migrated() -> bytes:
    """The file of an empty record: all migrations take several times as long as the rest of its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.db"
        Database(f"sqlite:///{path}", Inventory()).close()
        return path.read_bytes()


def patience(reason: str | None, short: str, said: str = "") -> str:
    """A probe's timeout: `short` where it is to pass, and else long enough for a machine that is busy.

    `said` is what the probe is to say: a dialogue waits until its timeout for what it expects.
    """
    if "of the dialogue: expected" in said and reason == "protocol":
        return "3s"
    return short if reason == "timeout" else "30s"


async def probed(
    folder: Path, kind: str, options: Any, timeout: str = "30s", host: Mapping[str, Any] | None = None
) -> ProbeResult:
    """One probe of a service on this host, or on another."""
    service = {"host": "h", "probe": {"timeout": timeout, kind: options}}
    hosts = {"h": host or {"address": "127.0.0.1", "shell": "local"}}
    known = await asyncio.to_thread(inventory_of, folder, {"hosts": hosts, "services": {"it": service}})
    return await probe_once(known.inventory.services["it"], known.inventory.hosts, Redactor(known.secrets))


async def eventually(look: Callable[[], Awaitable[T]], within: float = 200.0) -> T:
    """Wait until `look` gives something true, and give it."""
    ends = time.monotonic() + within
    while True:
        found = await look()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"not seen within {within} s; last: {found!r}")
        await asyncio.sleep(0.05)


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates for each client
LONGEST_GAP = 0.1  # seconds for which one peer may block the event loop
_RUNS = 30  # at most, of which one has to keep to it
_TICK = 0.005


async def longest_gap(work: Awaitable[object]) -> float:
    """Run `work`, and return the most seconds for which the event loop ran nothing else.

    They are seconds of this process, of all its threads: those of other processes on a busy machine do not count.
    """
    gaps = [0.0]

    async def tick() -> None:
        while True:
            before, used_before = time.perf_counter(), time.process_time()
            await asyncio.sleep(_TICK)
            gaps.append(min(time.perf_counter() - before - _TICK, time.process_time() - used_before))

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        await work
        await asyncio.sleep(0)  # the last gap
    finally:
        ticking.cancel()
    return max(gaps)


async def leaves_the_loop_free(work: Callable[[], Awaitable[object]]) -> None:
    """Check that `work` never blocks the event loop for longer than `LONGEST_GAP`. Raises AssertionError.

    The best of several runs counts: on a busy machine, a thread may run on although the event loop waits for it.
    """
    gaps: list[float] = []
    while len(gaps) < _RUNS and min(gaps, default=1.0) > LONGEST_GAP:
        gaps.append(await longest_gap(work()))
    assert min(gaps) <= LONGEST_GAP, f"the event loop was blocked for {[round(gap, 3) for gap in gaps]} s"
