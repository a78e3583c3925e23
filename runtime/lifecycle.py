"""How a server of ours lives: bind, work, serve, reload, drain, stop."""

import asyncio
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
from aiohttp import web

from runtime.errors import DefibError, StartError

DRAIN_TIMEOUT = 20.0  # of the 30 s in which everything has ended; the rest is for what does not end by itself
log = structlog.get_logger()


@dataclass(frozen=True)
class ListenAddress:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "ListenAddress":
        """Read `ADDRESS:PORT`, `[V6]:PORT` or `:PORT`. Raises StartError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004
            raise StartError(f"--listen wants ADDRESS:PORT, not {text!r}")
        return cls(host.strip("[]") or "0.0.0.0", int(port))  # noqa: S104 - as the user asked


async def serve(
    name: str,
    app: web.Application,
    listen: ListenAddress,
    *,
    tls: ssl.SSLContext | None = None,
    tasks: Sequence[Callable[[], Awaitable[None]]] = (),
    reload: Callable[[], Awaitable[object]] | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve `app` and run `tasks` beside it until SIGTERM or SIGINT; SIGHUP reloads.

    `drain` runs after the listener closed and before `tasks` are cancelled. Everything ends within 30 s of the
    signal. A task that fails ends the program with its error: a supervisor starts it anew.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, handle_signals=False)
    await runner.setup()
    try:
        address = await _bind(runner, listen, tls)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(_run(task), name=getattr(task, "__name__", name)) for task in tasks]
            if reload is not None:
                loop.add_signal_handler(signal.SIGHUP, lambda: group.create_task(_reload(reload), name="reload"))
            print(f"defib {name} listening on {address}", flush=True)  # noqa: T201 - promised to whoever starts us
            log.info("serving", program=name, address=address)
            await stop.wait()
            log.info("stopping", program=name)
            await _stop(runner, drain)
            for task in running:
                task.cancel()
    finally:
        await runner.cleanup()  # ends requests that are still being answered, after `shutdown_timeout`
    log.info("stopped", program=name)


async def _run(task: Callable[[], Awaitable[object]]) -> None:
    await task()


async def _reload(reload: Callable[[], Awaitable[object]]) -> None:
    try:
        await reload()
    except DefibError:
        pass  # refused, and told by whoever refused it; the old configuration stays
    except Exception:  # a reload is where a task begins
        log.exception("the reload broke; the old configuration stays")


async def _bind(runner: web.AppRunner, listen: ListenAddress, tls: ssl.SSLContext | None) -> str:
    site = web.TCPSite(runner, listen.host, listen.port, ssl_context=tls, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        raise StartError(f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}") from error
    host, port = runner.addresses[0][:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _stop(runner: web.AppRunner, drain: Callable[[], Awaitable[None]] | None) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT):
            for site in list(runner.sites):
                await site.stop()
            if drain is not None:
                await drain()
    except TimeoutError:
        print("defib: not everything ended in time", file=sys.stderr)  # noqa: T201
