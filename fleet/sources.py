"""Sources of services: asking servers for their targets, and reloading when targets have changed."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from fleet.inventory.endpoints import Endpoint
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.targets import TargetError, check_groups, compute_fingerprint
from fleet.json_client import ClientError, JsonClient
from runtime.errors import DefibError
from runtime.files import replace_file
from runtime.logs import LimitedLog
from runtime.metrics import ProgramMetrics

CHECK_EVERY = 5.0  # seconds in which a change of a file is noticed
TIMEOUT = 10.0  # seconds for a server's answer
log = structlog.get_logger()
limited_log = LimitedLog()


class ServiceSources:
    """Loads the inventory with the services of all sources, and keeps them up to date.

    The answer of a server is stored, so that its services exist while it does not respond; without one, they do not.
    `report` is called with the name of each server's source and its error, with an empty text if there is none, and
    with None once there is no such source.
    """

    def __init__(self, load: Callable[[], LoadedInventory], report: Callable[[str, str | None], None]) -> None:
        self._load, self._report = load, report
        self._loaded: LoadedInventory | None = None
        self._fingerprint: object = None  # of the files from which it was loaded
        self._asked_at: dict[Path, float] = {}

    def read(self) -> LoadedInventory:
        """Load with the targets in files and stored answers. Raises ConfigurationError."""
        patterns = self._loaded.target_patterns if self._loaded is not None else ()
        before = compute_fingerprint(patterns)  # what changes while it is loaded is then read again
        previous, self._loaded = self._loaded, self._load()
        for name in previous.answers if previous is not None else ():
            if name not in self._loaded.answers:
                self._report(name, None)
        same = self._loaded.target_patterns == patterns
        self._fingerprint = before if same else compute_fingerprint(self._loaded.target_patterns)
        return self._loaded

    async def load(self) -> LoadedInventory:
        """Load, and ask those servers whose answers are not fresh. Raises ConfigurationError."""
        return await self.refresh(await asyncio.to_thread(self.read))

    async def refresh(self, loaded: LoadedInventory) -> LoadedInventory:
        """Ask the servers whose turn it is, and load again if an answer is new. Raises ConfigurationError."""
        return await self._ask_servers(loaded) or loaded

    async def watch(self, reload: Callable[[], Awaitable[None]]) -> None:
        """Reload when targets have changed, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY)
            if self._loaded is None or not self._loaded.target_patterns:
                continue
            before = self._fingerprint
            await self._ask_servers(self._loaded)
            found = await asyncio.to_thread(compute_fingerprint, self._loaded.target_patterns)
            if found != before:
                self._fingerprint = found  # so that what cannot be loaded is tried only once
                log.info("targets_changed")
                with contextlib.suppress(Exception):  # logged; the previous configuration is still in force
                    await reload()

    async def _ask_servers(self, loaded: LoadedInventory) -> LoadedInventory | None:
        """Ask the servers whose turn it is; returns what is loaded with new answers, or None if there are none."""
        due = [name for name, path in loaded.answers.items() if self._is_due(path, loaded, name)]
        answers = await asyncio.gather(*(self._ask(name, loaded) for name in due))
        new = {name: answer for name, answer in zip(due, answers, strict=True) if answer is not None}
        if not new:
            return None
        try:
            return await self._load_answers(new, loaded)
        except DefibError as error:
            if len(new) == 1:
                await self._report_unusable(next(iter(new)), error)
                return None
        updated = None
        for name, answer in new.items():  # so that an answer that cannot be used does not hold up the others
            try:
                updated = await self._load_answers({name: answer}, loaded)
            except DefibError as error:
                await self._report_unusable(name, error)
        return updated

    async def _load_answers(self, new: Mapping[str, bytes], loaded: LoadedInventory) -> LoadedInventory:
        """Load with new answers. If that is not possible, restore the previous ones and raise DefibError."""
        previous = {name: await asyncio.to_thread(_replace, loaded.answers[name], new[name]) for name in new}
        try:
            updated = await asyncio.to_thread(self.read)
        except DefibError:
            for name, content in previous.items():
                await asyncio.to_thread(_replace, loaded.answers[name], content)
            raise
        for name in new:
            self._report(name, "")
        return updated

    async def _report_unusable(self, name: str, error: DefibError) -> None:
        """Report an answer that cannot be loaded, unless the configuration cannot be loaded without it either."""
        with contextlib.suppress(DefibError):
            await asyncio.to_thread(self._load)
            self._report(name, f"its answer cannot be used: {str(error).splitlines()[0]}")

    def _is_due(self, answer: Path, loaded: LoadedInventory, name: str) -> bool:
        refresh = loaded.inventory.services_from[name].refresh
        try:
            age = time.time() - answer.stat().st_mtime
        except OSError:
            age = float("inf")
        asked = time.monotonic() - self._asked_at.get(answer, float("-inf"))
        return not 0 <= age < refresh and asked >= refresh

    async def _ask(self, name: str, loaded: LoadedInventory) -> bytes | None:
        """Return the answer of a server if it is new."""
        source, path = loaded.inventory.services_from[name], loaded.answers[name]
        self._asked_at[path] = time.monotonic()
        if source.http is None:
            return None
        try:
            groups = await fetch_targets(source.http)
            if (answer := await asyncio.to_thread(_find_change, path, groups)) is not None:
                return answer
        except (DefibError, OSError) as error:
            self._report(name, str(error))
        else:
            self._report(name, "")
        return None


def report_to(metrics: ProgramMetrics) -> Callable[[str, str | None], None]:
    """Return a function that logs the error of a source, and sets its metric."""

    def report(source: str, error: str | None) -> None:
        if error is None:
            metrics.source_success.remove(source)
            return
        metrics.source_success.labels(source).set(not error)
        if error and limited_log.admits("source_failed"):
            log.warning("source_failed", source=source, error=error)

    return report


async def fetch_targets(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return the groups of targets of a server. Raises ClientError and StartError."""
    client = JsonClient(endpoint)
    try:
        answer = await client.request("GET", endpoint.url, TIMEOUT)
        return await asyncio.to_thread(check_groups, answer)
    except (ClientError, TargetError) as error:
        raise ClientError(f"{endpoint.url}: {error}") from error
    finally:
        await client.close()


def _find_change(path: Path, groups: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Return the content of the file for these targets; None if it has that already. Raises OSError."""
    entries = [{key: group[key] for key in ("targets", "labels") if key in group} for group in groups]
    content = json.dumps(entries, indent=1).encode()
    if not path.exists() or path.read_bytes() != content:
        return content
    os.utime(path)
    return None


def _replace(path: Path, content: bytes | None) -> bytes | None:
    """Write a file in one step, or remove it without content; returns its previous content. Raises OSError."""
    previous = path.read_bytes() if path.exists() else None
    if content is None:
        path.unlink(missing_ok=True)
        return previous
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, content)
    return previous
