"""Clients of httpx, and of httpx2, which authlib uses, for servers that may be hostile.

httpcore passes over interim responses (1xx), however many there are, and parses all that it has read without a pause.
"""

import importlib
import os
import re
import ssl
from collections.abc import Iterable
from typing import Any, TypeVar

import httpcore
import httpx

LIMIT = 64 * 1024  # bytes of interim responses before a response
PART = 4096  # bytes that are read at once until a response begins
_FINAL = re.compile(rb"HTTP/1\.[01] [2-9]")
_SPLIT = 10  # bytes at the end of a part in which the match may have begun
C = TypeVar("C")


def limit_interim_responses(client: C) -> C:
    """Make the connections of a client end with an error after too many interim responses; returns the client."""
    found: Any = client
    for transport in [found._transport, *found._mounts.values()]:  # noqa: SLF001 - httpx has no setting for this
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            library = importlib.import_module(type(pool).__module__.partition(".")[0])  # httpcore or httpcore2
            pool._network_backend = _Backend(pool._network_backend, library.RemoteProtocolError)  # noqa: SLF001 - as above
    return client


def find_cause(error: httpx.TransportError) -> str:
    """Return why a server could not be reached: httpx's own texts say that all attempts failed."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {cause.verify_message}"
    if isinstance(cause, OSError) and (cause.errno or 0) > 0 and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno or 0)
    return getattr(cause, "reason", None) or getattr(cause, "strerror", None) or type(error).__name__


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, inner: httpcore.AsyncNetworkBackend, error: type[Exception]) -> None:
        self._inner, self._error = inner, error

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(stream, self._error)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, inner: httpcore.AsyncNetworkStream, error: type[Exception]) -> None:
        self._inner, self._error = inner, error
        self._has_begun = False  # the response
        self._early, self._tail = 0, b""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._has_begun:
            return await self._inner.read(max_bytes, timeout)
        data = await self._inner.read(min(max_bytes, PART), timeout)
        if _FINAL.search(self._tail + data) is not None:
            self._has_begun = True
            return data
        self._early, self._tail = self._early + len(data), (self._tail + data)[-_SPLIT:]
        if self._early > LIMIT:
            raise self._error(f"more than {LIMIT // 1024} KiB before the response")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._has_begun, self._early, self._tail = False, 0, b""
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout), self._error)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
