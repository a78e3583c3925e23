"""One request to one upstream: send it, and pass the response on as it arrives."""

import time
from typing import Any

from aiohttp import web

from gateway import answers
from gateway.admission import Permit
from gateway.connections import Call, Response, UpstreamError
from gateway.headers import response_headers
from gateway.upstreams import Upstream
from gateway.usage import UsageReader

EXAMINED = 64 * 1024  # bytes of a refusal that are read before it is passed on
_STATUSES = range(200, 600)
_LIMITED, _SERVER_ERROR, _UNAVAILABLE = 429, 500, 503


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
        self._response: Response | None = None
        self._first = b""  # what was read of the response's body
        self.seconds = 0.0  # until the response began
        self.is_out_of_quota = False

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def response(self) -> Response:
        assert self._response is not None  # noqa: S101 - after `send`
        return self._response

    @property
    def content_type(self) -> str:
        return self.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def is_unanswered(self) -> bool:
        return self._response is None

    @property
    def has_failed(self) -> bool:
        """Whether another upstream may do better."""
        return self.status == _LIMITED or self.status >= _SERVER_ERROR

    async def send(self, call: Call) -> None:
        """Send the request, and wait until the response begins. Raises UpstreamError."""
        upstream, started = self.upstream, time.monotonic()
        try:
            self._response = await upstream.pool.request(upstream.origin, call, upstream.settings.timeout, self._permit)
            if self.status not in _STATUSES:
                raise UpstreamError(f"the upstream's response has the status {self.status}")
            if self.status == _LIMITED:
                self._first = await self._read_first()
        finally:
            self.seconds = time.monotonic() - started

    async def _read_first(self) -> bytes:
        """Read a refusal, as far as is needed to see its kind."""
        first = bytearray()
        while len(first) <= EXAMINED and (part := await self.response.read()):
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
        response = self.response
        answer = _Answer(
            status=response.status,
            reason=response.reason if response.reason.isprintable() else None,
            headers=response_headers(response.headers),
        )
        await answer.prepare(request)
        try:
            part = self._first or response.take()
            if not part:  # what comes later must not delay the headers
                answer.send_headers()
                part = await response.read()
            while part and not response.at_end:
                usage.add(part)
                await answer.write(part)
                part = await response.read()
        except UpstreamError:
            if request.transport is not None:
                request.transport.close()
            raise
        usage.add(part)
        await answer.write_eof(part)
        return answer

    def close(self) -> None:
        """End the exchange: a response that was not read to its end ends the connection with the upstream."""
        if self._response is not None:
            self._response.close()
