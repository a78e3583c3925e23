"""Pressed buttons over long connections, for when Feishu cannot reach the remediator: one child process per channel.

The SDK (the extra `feishu`) has its own event loop and globals, so it runs in a child process. The child
reads its credentials from stdin. It writes each event as a line of JSON to stdout, and reads the response as a line.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import structlog

from remediator.chat.buttons import ButtonHandler
from remediator.chat.feishu_events import InvalidPressError, parse_press, render_toast
from remediator.metrics import RemediatorMetrics
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.record.database import Database
from runtime.environment import child_environment
from runtime.payloads import load_json

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two connections
STABLE_AFTER = 60.0  # seconds after which the next pause is the first one again
CHECK_CHANNELS_EVERY = 5.0
TERMINATE_TIMEOUT = 5.0
RESPOND_WITHIN = 0.8  # seconds: the SDK handles events one after another, and Feishu waits three for each
LINE_LIMIT = 256 * 1024
log = structlog.get_logger()


class LongConnections:
    """Keeps a connection open for each channel with `long_connection`."""

    def __init__(self, database: Database, buttons: ButtonHandler, metrics: RemediatorMetrics) -> None:
        self._database, self._buttons, self._metrics = database, buttons, metrics

    async def run(self) -> None:
        """Run until cancelled. Channels that a reload added, changed or removed are noticed within a few seconds."""
        running: dict[str, tuple[FeishuAppOptions, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                configured = self._configured_channels()
                for name, (options, task) in list(running.items()):
                    if configured.get(name) != options:
                        task.cancel()
                        await asyncio.wait([task])
                        del running[name]
                for name in configured.keys() - running.keys():
                    task = group.create_task(self._stay_connected(name, configured[name]), name=f"connection {name}")
                    running[name] = (configured[name], task)
                await asyncio.sleep(CHECK_CHANNELS_EVERY)

    def _configured_channels(self) -> dict[str, FeishuAppOptions]:
        channels = self._database.inventory.notify.channels.items()
        apps = {name: channel.options for name, channel in channels if channel.kind == "feishu_app"}
        return {name: options for name, options in apps.items() if options.long_connection}

    async def _stay_connected(self, name: str, options: FeishuAppOptions) -> None:
        """Connect again whenever the connection is lost, with growing pauses."""
        connected, loop = self._metrics.connected.labels(name), asyncio.get_running_loop()
        connected.set(0)
        pause = FIRST_PAUSE
        while True:
            if find_spec("lark_oapi") is None:
                log.error("sdk_missing", channel=name, hint="install the extra feishu: docs/feishu.md")
                await asyncio.sleep(LONGEST_PAUSE)
                continue
            began = loop.time()
            try:
                why = await self._run_process(name, options, lambda: connected.set(1))
            except OSError as error:
                why = str(error)
            finally:
                connected.set(0)
            pause = FIRST_PAUSE if loop.time() - began > STABLE_AFTER else min(LONGEST_PAUSE, pause * 2)
            log.warning("feishu_connection_ended", channel=name, error=why, retry_in_seconds=pause)
            await asyncio.sleep(pause)

    async def _run_process(self, name: str, options: FeishuAppOptions, on_connected: Callable[[], None]) -> str:
        """Run one process and respond to its events; returns why it ended."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "remediator.chat.feishu_connection_process", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=LINE_LIMIT,
            env=child_environment(proxies=True),
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
        credentials = {
            "app_id": options.app_id, "app_secret": options.app_secret.get_secret_value(), "url": options.base,
        }  # fmt: skip
        why = ""
        try:
            process.stdin.write(json.dumps(credentials).encode() + b"\n")
            while line := await process.stdout.readline():
                message = load_json(line)
                if message.get("connected"):
                    on_connected()
                    log.info("connected", channel=name)
                elif "event" in message:
                    response = await self._respond(name, options, message["event"])
                    process.stdin.write(json.dumps(response).encode() + b"\n")
                why = message.get("why", why)
        except (ValueError, ConnectionError) as error:
            why = f"unexpected output of the process: {type(error).__name__}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(TERMINATE_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                process.kill()
        return why or f"exit status {process.returncode}"

    async def _respond(self, name: str, options: FeishuAppOptions, event: Any) -> dict[str, Any]:
        """Return the response to an event; empty if it is not a press of a button."""
        token = options.verification_token.get_secret_value() if options.verification_token else None
        try:
            press = parse_press(event, options.app_id, token)
            return render_toast(await self._buttons.handle(name, press, RESPOND_WITHIN))
        except InvalidPressError as error:
            log.info("event_ignored", channel=name, reason=str(error))
        except Exception:  # one event must not end the connection
            log.exception("feishu_event_failed", channel=name)
        return {}
