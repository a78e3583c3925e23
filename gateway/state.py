"""What the gateway must know after a restart: learned rates and used budgets, in a file beside that of the ledger."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from runtime.files import replace_file

SAVE_EVERY = 5.0  # seconds
VERSION = 1
log = structlog.get_logger()


def sent_path(path: Path) -> Path:
    """Return the path of the ledger's file, beside the state file."""
    return path.with_name(f"{path.name}.sent")


def load(path: Path) -> dict[str, Any]:
    """Return the stored state; empty if there is none, or if it cannot be used."""
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning(
            "state_unreadable", path=str(path), error=str(error), effect="the gateway begins with its base rates"
        )
        return {}
    return stored if isinstance(stored, dict) and stored.get("version") == VERSION else {}


class StateWriter:
    """Writes the state to its file when it has changed."""

    def __init__(self, path: Path | None, dump: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._dump = path, dump
        self._written = b""
        self._is_failing = False

    async def run(self) -> None:
        """Write the state again and again, until cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(SAVE_EVERY)
                await self.save()
        finally:
            await self.save()

    async def save(self) -> None:
        if self._path is None:
            return
        content = json.dumps({"version": VERSION, **self._dump()}, sort_keys=True).encode()
        if content == self._written:
            return
        try:
            await asyncio.to_thread(replace_file, self._path, content)
        except OSError as error:
            if not self._is_failing:
                log.error("state_not_written", path=str(self._path), error=error.strerror)  # noqa: TRY400 - no crash
            self._is_failing = True
            return
        self._written, self._is_failing = content, False
