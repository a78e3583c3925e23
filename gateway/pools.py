"""Connections to upstreams, which stay open while a reload replaces the settings."""

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage

from fleet.inventory.endpoints import TlsSettings
from runtime.errors import DefibError
from runtime.tls import create_client_context

CONNECT_TIMEOUT = 10.0
MAX_INTERIM = 20  # responses before the final one
_INTERIM = {100, *range(102, 200)}  # 101 ends HTTP
_MAX_HEADER = 32 * 1024
_SENT_BY_CLIENTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # aiohttp would add its own


def create_tls(tls: TlsSettings) -> ssl.SSLContext:
    """Return the context for connections to an upstream. Raises DefibError."""
    try:
        context = create_client_context(str(tls.ca_file) if tls.ca_file else None)
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise DefibError(f"gateway: cannot load the certificates of an upstream: {error}") from error
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Protocol(ResponseHandler):
    _interim = 0  # responses since the last final one

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Pass a final response on. Interim ones are dropped; too many end the connection."""
        if data[0].code not in _INTERIM:
            self._interim = 0
            super().feed_data(data, size)
            return
        self._interim += 1
        if self._interim > MAX_INTERIM:
            self.set_exception(HttpProcessingError(message="too many interim responses"))
            self.close()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume if reading was paused: readers call this for each part of a body, and the parser would be run."""
        if self._reading_paused:
            super().resume_reading(resume_parser)


class ConnectionPool:
    """The connections with one set of TLS settings. A retired pool closes when its last request has ended."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        connector = aiohttp.TCPConnector(limit=0, ssl=tls)
        make_protocol: Any = functools.partial(_Protocol, loop=asyncio.get_running_loop())
        connector._factory = make_protocol  # noqa: SLF001 - there is no other way
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_SENT_BY_CLIENTS,
            max_line_size=_MAX_HEADER,
            max_field_size=_MAX_HEADER,
        )
        self.session._retry_connection = False  # noqa: SLF001 - a request that is sent twice would count once
        self._in_use = 0
        self._is_retired = False

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[aiohttp.ClientSession]:
        self._in_use += 1
        try:
            yield self.session
        finally:
            self._in_use -= 1
            await self._close_if_idle()

    async def retire(self) -> None:
        self._is_retired = True
        await self._close_if_idle()

    async def _close_if_idle(self) -> None:
        if self._is_retired and self._in_use == 0:
            await self.session.close()
