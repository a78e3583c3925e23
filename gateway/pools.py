"""Connections to upstreams, which stay open while a reload replaces the settings."""

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from fleet.inventory.endpoints import TlsSettings
from runtime.errors import DefibError
from runtime.tls import create_client_context

CONNECT_TIMEOUT = 10.0
_MAX_HEADER = 32 * 1024
_MAX_INTERIM = 32  # interim responses (1xx) before a response
_INTERIM, _SWITCHING_PROTOCOLS, _OK = 100, 101, 200
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


def _is_interim(status: int) -> bool:
    return _INTERIM <= status < _OK and status != _SWITCHING_PROTOCOLS


class _Protocol(ResponseHandler):
    """A connection with a limit for interim responses: aiohttp skips them without end, and gives nobody a turn."""

    _interim = 0  # since the last response

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        if self._interim > _MAX_INTERIM:
            return
        self._interim = self._interim + 1 if _is_interim(data[0].code) else 0
        if self._interim <= _MAX_INTERIM:
            super().feed_data(data, size)
            return
        self.abort()
        self.set_exception(aiohttp.ClientError("too many interim responses"))

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
