"""The life of a server: bind, serve, reload, drain, stop."""

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import structlog
from aiohttp import web

from runtime.connections.listener import Listener
from runtime.connections.registry import Connections
from runtime.errors import DefibError, StartError
from runtime.metrics import ProgramMetrics
from runtime.webconfig import WebConfigFile

DRAIN_TIMEOUT = 20.0  # of the 30 s for the whole shutdown; the rest is for cancelling what has not ended
MAX_PORT = 65535
MAX_OPEN_FILES = 65536  # not more: some programs that a child process runs close every possible file at their start
_PR_SET_DUMPABLE = 4  # prctl(2)
log = structlog.get_logger()


@dataclass(frozen=True)
class ListenAddress:
    """The address and port of a listener; port 0 stands for any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "ListenAddress":
        """Parse `ADDRESS:PORT`, `[V6]:PORT` or `:PORT`. Raises StartError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit() or int(port) > MAX_PORT:
            raise StartError(f"--listen must be ADDRESS:PORT, not {text!r}")
        return cls(host.strip("[]") or "0.0.0.0", int(port))  # noqa: S104 - `:PORT` means all addresses


def freeze_garbage_collector() -> None:
    """Freeze what lives long: traversing 10,000 services in each garbage collection would delay everything else."""
    gc.unfreeze()  # so that a previous configuration can be collected
    gc.collect()
    gc.freeze()
    _return_free_memory()


def _return_free_memory() -> None:
    """Return memory that loading a configuration has used to the operating system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def disable_core_dumps() -> None:
    """Keep the memory of this process, which has secrets, from core dumps and from other processes of its user.

    The limit alone is not enough: the kernel ignores it where core dumps are piped to a program. Raises OSError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def raise_file_limit() -> None:
    """Raise the limit of open files of this process and its children, which each connection counts against."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(hard, MAX_OPEN_FILES):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_OPEN_FILES), hard))


def warn_of_restart(section: str, used: object, new: object, names: Sequence[str]) -> None:
    """Log which settings of a section a reload has not put in force."""
    changed = [f"{section}.{name}" for name in names if getattr(used, name) != getattr(new, name)]
    if changed:
        log.warning("restart_needed", settings=changed, effect="the former values stay in force until a restart")


class Reloader:
    """Reloads a program's configuration: one reload at a time, each outcome in the log and in a metric.

    `reload` replaces the configuration and returns what the log shows of it; where it raises, it has changed nothing.
    """

    def __init__(self, reload: Callable[[], Awaitable[Mapping[str, object]]], metrics: ProgramMetrics) -> None:
        self.lock = asyncio.Lock()
        self._reload = reload
        self._metrics = metrics

    async def __call__(self) -> None:
        """Reload. Raises what made it fail, after it was logged."""
        async with self.lock:
            try:
                summary = await self._reload()
            except Exception as error:
                self._metrics.record_reload(successful=False)
                if isinstance(error, DefibError):
                    problems = str(error).splitlines()
                    log.error("configuration_reload_refused", problems=problems)  # noqa: TRY400 - not a crash
                else:
                    log.exception("configuration_reload_failed")
                raise
            self._metrics.record_reload(successful=True)
            log.info("configuration_reloaded", **summary)


async def serve(
    name: str,
    app: web.Application,
    listen: ListenAddress,
    metrics: ProgramMetrics,
    *,
    web_config: WebConfigFile,
    tasks: Sequence[Callable[[], Awaitable[None]]] = (),
    reload: Reloader | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
    ends_with_client: bool = False,
) -> None:
    """Serve `app` and run `tasks` beside it until SIGTERM or SIGINT; SIGHUP reloads.

    `drain` runs after the listener has closed, and before `tasks` are cancelled. Everything ends within 30 s of the
    signal. Each connection uses the certificates that the web configuration has at that time. A task that fails ends
    the program with its error, so that its supervisor restarts it. `ends_with_client` cancels the handling of a request
    whose client has gone.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def watch_web_configuration() -> None:
        await web_config.run(metrics.record_web_reload)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, shutdown_timeout=2.0, handle_signals=False, handler_cancellation=ends_with_client)
    await runner.setup()
    try:
        listener = await _bind(Connections(app, cast("web.Server", runner.server), metrics), listen, web_config)
        address = _format_url(listener, web_config.tls)
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(_run(task), name=getattr(task, "__name__", name))
                for task in (metrics.measure_event_loop_lag, watch_web_configuration, *tasks)
            ]
            if reload is not None:
                loop.add_signal_handler(signal.SIGHUP, lambda: group.create_task(_reload_logged(reload), name="reload"))
            print(f"defib {name} listening on {address}", flush=True)  # noqa: T201 - documented output
            log.info("server_started", program=name, address=address)
            await stop.wait()
            log.info("server_stopping", program=name)
            await _stop(listener, drain)
            for task in running:
                task.cancel()
    finally:
        await runner.cleanup()  # cancels open requests after `shutdown_timeout`
    log.info("server_stopped", program=name)


async def _run(task: Callable[[], Awaitable[object]]) -> None:
    await task()


async def _reload_logged(reload: Reloader) -> None:
    with contextlib.suppress(Exception):  # the Reloader has logged it, and the old configuration is still in force
        await reload()


async def _bind(connections: Connections, listen: ListenAddress, web_config: WebConfigFile) -> Listener:
    try:
        return await Listener.bind(listen.host, listen.port, connections, lambda: web_config.tls)
    except OSError as error:
        raise StartError(f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}") from error


def _format_url(listener: Listener, tls: ssl.SSLContext | None) -> str:
    host, port = listener.address
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _stop(listener: Listener, drain: Callable[[], Awaitable[None]] | None) -> None:
    listener.close()
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT):
            if drain is not None:
                await drain()
    except TimeoutError:
        log.warning("drain_timed_out", seconds=DRAIN_TIMEOUT)
    listener.end_suspended()
