"""One request to one upstream: send it, and pass the response on as it arrives."""

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict
from yarl import URL

from gateway import answers
from gateway.admission import Permit
from gateway.bodies import iterate_parts
from gateway.headers import response_headers
from gateway.upstreams import Upstream
from gateway.usage import UsageReader

EXAMINED = 64 * 1024  # bytes of a refusal that are read before it is passed on
_STATUSES = range(200, 600)
_LIMITED, _SERVER_ERROR, _UNAVAILABLE = 429, 500, 503


class UpstreamError(Exception):
    """An upstream has failed before it has answered. The message is for the client and the log."""


@dataclass(frozen=True)
class Call:
    """A request as an upstream gets it."""

    method: str
    url: URL
    headers: CIMultiDict[str]
    content: bytes


class _Content(aiohttp.Payload):
    """The body of a request, which notes when it is sent."""

    def __init__(self, content: bytes, permit: Permit) -> None:
        super().__init__(content)
        self._size, self._permit = len(content), permit

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._permit.begin_sending()
        for part in iterate_parts(self._value):
            await writer.write(part)
        self._permit.mark_sent()


class _Answer(web.StreamResponse):
    """A response whose headers are sent with the first part of its body, unless `send_headers` is called before."""

    _send_headers_immediately = False

    def send_headers(self) -> None:
        writer: Any = self._payload_writer
        if writer is not None:
            writer.send_headers()


class Exchange:
    """A request that was admitted, and its response."""

    def __init__(self, upstream: Upstream, permit: Permit) -> None:
        self.upstream, self._permit = upstream, permit
        self._response: aiohttp.ClientResponse | None = None
        self._first = b""  # what was read of the response's body
        self.seconds = 0.0  # until the response began
        self.is_out_of_quota = False

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def response(self) -> aiohttp.ClientResponse:
        assert self._response is not None  # noqa: S101 - after `send`
        return self._response

    @property
    def has_failed(self) -> bool:
        """Whether another upstream may do better."""
        return self.status == _LIMITED or self.status >= _SERVER_ERROR

    async def send(self, session: aiohttp.ClientSession, call: Call) -> None:
        """Send the request, and wait until the response begins. Raises UpstreamError."""
        started = time.monotonic()
        if not call.content:
            self._permit.begin_sending()
        try:
            with _translating():
                self._response = await session.request(
                    call.method,
                    call.url,
                    headers=call.headers,
                    data=_Content(call.content, self._permit) if call.content else None,
                    allow_redirects=False,
                    timeout=self.upstream.timeout,
                    server_hostname=self.upstream.settings.tls.server_name,
                )
                self._permit.mark_sent()
                if self.status not in _STATUSES:
                    raise UpstreamError(f"the upstream's response has the status {self.status}")
                if self.status == _LIMITED:
                    self._first = await self._read_first()
        finally:
            self.seconds = time.monotonic() - started

    async def _read_first(self) -> bytes:
        """Read a refusal, as far as is needed to see its kind."""
        first = bytearray()
        while len(first) <= EXAMINED and (part := await self.response.content.readany()):
            first += part
        self.is_out_of_quota = answers.is_out_of_quota(bytes(first))
        return bytes(first)

    def find_pause(self) -> float | None:
        """Return for how many seconds the upstream wants no requests, None if it does not say."""
        if self.is_out_of_quota:
            return None
        headers = self.response.headers
        if self.status in (_LIMITED, _UNAVAILABLE):
            return answers.find_retry_after(headers, time.time())
        return answers.find_exhaustion(headers)

    async def pass_on(self, request: web.Request, usage: UsageReader) -> web.StreamResponse:
        """Pass the response on, each part as it arrives. Raises UpstreamError if it ends too early.

        The connection with the client is then closed, too: what was passed on must not look complete.
        """
        content = self.response.content
        reason = self.response.reason or ""
        answer = _Answer(
            status=self.status,
            reason=reason if reason.isprintable() else None,
            headers=response_headers(self.response.headers),
        )
        await answer.prepare(request)
        try:
            part = self._first or self._take_part()
            if not part:  # what comes later must not delay the headers
                answer.send_headers()
                part = await self._read_part()
            while part and not content.at_eof():
                usage.add(part)
                await answer.write(part)
                part = await self._read_part()
        except UpstreamError:
            if request.transport is not None:
                request.transport.close()
            raise
        usage.add(part)
        await answer.write_eof(part)
        return answer

    def _take_part(self) -> bytes:
        """Return the part of the body that has arrived, empty if there is none yet."""
        with _translating():
            return self.response.content.read_nowait()

    async def _read_part(self) -> bytes:
        """Return the next part of the body, empty at its end."""
        with _translating():
            return await self.response.content.readany()

    def close(self) -> None:
        """End the exchange: a response that was not read to its end ends the connection with the upstream."""
        if self._response is not None:
            self._response.close()


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    """Raise UpstreamError for what aiohttp raises while it sends or reads."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UpstreamError(_describe(error)) from error


def _describe(error: Exception) -> str:
    """Return what has failed, without what the upstream has sent."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "the upstream was silent for too long"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect to the upstream: {_find_cause(error.os_error)}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the upstream's response ended too early"
    if isinstance(error, aiohttp.ServerDisconnectedError | OSError):
        return "the upstream closed the connection"
    return f"the upstream's response is not valid ({type(error).__name__})"


def _find_cause(error: OSError) -> str:
    """Return why a connection failed: the texts of asyncio name addresses instead."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    known = isinstance(error.errno, int) and error.errno > 0 and not isinstance(error, ssl.SSLError)
    return os.strerror(error.errno) if known and error.errno else type(error).__name__
