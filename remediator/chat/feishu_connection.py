"""Pressed buttons over a long connection, where Feishu cannot reach the remediator: one process for each channel.

The process has the SDK (`pip install 'defib[feishu]'`) to itself, since that brings its own event loop and globals. It
is told its secrets on stdin, writes one line of JSON for each event, and is written one for each answer.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import structlog

from remediator.chat.buttons import ButtonHandler, InvalidPressError, parse_press
from remediator.metrics import RemediatorMetrics
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.record.database import Database

FIRST_AGAIN, LONGEST_AGAIN = 1.0, 60.0
LASTED = 60.0  # seconds after which a connection was a good one
LOOK_AGAIN = 5.0
END_WITHIN = 5.0
ANSWER_WITHIN = 0.8  # seconds: the SDK takes events one after another, and each has three
LINE_LIMIT = 256 * 1024
log = structlog.get_logger()


class LongConnections:
    """A task and a process for each channel that wants a long connection."""

    def __init__(self, database: Database, buttons: ButtonHandler, metrics: RemediatorMetrics) -> None:
        self._database, self._buttons, self._metrics = database, buttons, metrics

    async def run(self) -> None:
        """Keep them until cancelled; what a reload changes is taken up within a few seconds."""
        kept: dict[str, tuple[FeishuAppOptions, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                wanted = self._wanted()
                for name, (options, task) in list(kept.items()):
                    if wanted.get(name) != options:
                        task.cancel()
                        await asyncio.wait([task])
                        del kept[name]
                for name in wanted.keys() - kept.keys():
                    task = group.create_task(self._keep(name, wanted[name]), name=f"connection {name}")
                    kept[name] = (wanted[name], task)
                await asyncio.sleep(LOOK_AGAIN)

    def _wanted(self) -> dict[str, FeishuAppOptions]:
        channels = self._database.inventory.notify.channels.items()
        found = {name: channel.options for name, channel in channels if channel.kind == "feishu_app"}
        return {name: options for name, options in found.items() if options.long_connection}

    async def _keep(self, name: str, options: FeishuAppOptions) -> None:
        connected, loop = self._metrics.connected.labels(name), asyncio.get_running_loop()
        connected.set(0)
        pause = FIRST_AGAIN
        while True:
            if find_spec("lark_oapi") is None:
                log.error("a long connection needs the SDK: pip install 'defib[feishu]'", channel=name)
                await asyncio.sleep(LONGEST_AGAIN)
                continue
            began = loop.time()
            try:
                why = await self._one(name, options, lambda: connected.set(1))
            except OSError as error:
                why = str(error)
            finally:
                connected.set(0)
            pause = FIRST_AGAIN if loop.time() - began > LASTED else min(LONGEST_AGAIN, pause * 2)
            log.warning("the long connection ended", channel=name, why=why, again_in_seconds=pause)
            await asyncio.sleep(pause)

    async def _one(self, name: str, options: FeishuAppOptions, connected: Callable[[], None]) -> str:
        """One process from its start to its end; why it ended."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "remediator.chat.feishu_connection_process", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=LINE_LIMIT,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
        told = {"app_id": options.app_id, "app_secret": options.app_secret.get_secret_value(), "url": options.base}
        why = ""
        try:
            process.stdin.write(json.dumps(told).encode() + b"\n")
            while line := await process.stdout.readline():
                said = json.loads(line)
                if said.get("connected"):
                    connected()
                    log.info("the long connection stands", channel=name)
                elif "event" in said:
                    answer = await self._answer(name, options, said["event"])
                    process.stdin.write(json.dumps(answer).encode() + b"\n")
                why = said.get("why", why)
        except (ValueError, ConnectionError) as error:
            why = f"its process was not understood: {type(error).__name__}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(END_WITHIN):
                    await process.wait()
            except TimeoutError:
                process.kill()
        return why or f"exit status {process.returncode}"

    async def _answer(self, name: str, options: FeishuAppOptions, event: Any) -> dict[str, Any]:
        wanted = options.verification_token.get_secret_value() if options.verification_token else None
        try:
            return await self._buttons.handle(name, parse_press(event, options.app_id, wanted), ANSWER_WITHIN)
        except InvalidPressError as error:
            log.info("an event was not taken", channel=name, why=str(error))
        except Exception:  # one event must not end the connection
            log.exception("an event broke", channel=name)
        return {}
