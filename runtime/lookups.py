"""Lookups of names by the system's resolver, each of which takes a thread until the resolver has answered."""

import asyncio
import os
import socket
from typing import Any

THREADS = 128  # of libuv; some units permit 256 in all
_LOOKUPS: dict[tuple[asyncio.AbstractEventLoop, str, int], asyncio.Future[Any]] = {}


def set_threads(number: int = THREADS) -> None:
    """Set the number of libuv's threads, of which it uses at most half for lookups; call before the event loop exists.

    It has only 4 otherwise: two names whose servers do not answer would hold up all others.
    """
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(number))


async def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return the addresses of a name, as `getaddrinfo` does. Concurrent lookups of a name share one.

    Raises OSError and UnicodeError.
    """
    loop = asyncio.get_running_loop()
    key = loop, host, port
    if key not in _LOOKUPS:
        lookup = asyncio.ensure_future(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        lookup.add_done_callback(lambda done: (_LOOKUPS.pop(key, None), done.cancelled() or done.exception()))
        _LOOKUPS[key] = lookup
    return list(await asyncio.shield(_LOOKUPS[key]))
