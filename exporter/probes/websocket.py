"""The `websocket` probe: a handshake (RFC 6455) and a dialogue of messages, using aiohttp's client."""

import asyncio
import time
from http import HTTPStatus
from typing import Annotated, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import AfterValidator, Field
from yarl import URL

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.connections import DialOptions, connect
from exporter.probes.net.dialogue import MESSAGES_PER_STEP, Dialogue, DialogueStep
from exporter.probes.net.http_client import read_token
from exporter.probes.net.http_request import Headers, TokenAuth, format_authorization, with_server_name
from exporter.probes.net.tls_contexts import ProbeTls
from exporter.probes.net.urls import check_host, connectable_host, request_target, without_zone
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import check_url
from runtime.addresses import NAME_LIMIT, has_long_host

MESSAGE_LIMIT = 1024 * 1024
RESPONSE_LIMIT = 10  # of one handshake, interim ones included
FRAME_LIMIT = 10_000  # of a connection: fragments of messages, pings and pongs, too


def _check_websocket_url(url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise ValueError("must be a WebSocket URL (write ws://host:port/path)")
    check_host(check_url(url.replace("ws", "http", 1)))
    return url


class WebsocketProbeOptions(DialOptions):
    url: Annotated[str, AfterValidator(_check_websocket_url)]
    headers: Headers = Field(default_factory=dict)
    auth: TokenAuth | None = None
    tls: ProbeTls = ProbeTls()
    dialogue: list[DialogueStep] = []

    @property
    def host_header(self) -> str | None:
        """The configured `Host` header."""
        return next((value.get_secret_value() for name, value in self.headers.items() if name.lower() == "host"), None)

    @property
    def sends_credentials(self) -> bool:
        return self.auth is not None or any(name.lower() in ("authorization", "cookie") for name in self.headers)


class _LimitedFrames:
    """Passes the frames of a WebSocket on to aiohttp's parser, up to a limit.

    aiohttp limits the bytes of a message, but a message may have any number of empty fragments, whose parsing would
    block the event loop.
    """

    def __init__(self, parser: Any, messages: Any) -> None:
        self._parser, self._messages = parser, messages
        self._frames = 0
        self._head = bytearray()  # the beginning of a frame
        self._payload_left = 0
        self.feed_eof = parser.feed_eof

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Return whether the peer violates the protocol, as aiohttp's parser does, and nothing that is left."""
        self._count_frames(data)
        if self._frames <= FRAME_LIMIT:
            result: tuple[bool, bytes] = self._parser.feed_data(data)
            return result
        error = f"more than {FRAME_LIMIT} frames"
        self._messages.set_exception(aiohttp.WebSocketError(aiohttp.WSCloseCode.POLICY_VIOLATION, error))
        return True, b""

    def _count_frames(self, data: bytes) -> None:
        """Count the frames that begin in `data` (RFC 6455, section 5.2)."""
        at = 0
        while at < len(data) and self._frames <= FRAME_LIMIT:
            if self._payload_left:
                skipped = min(self._payload_left, len(data) - at)
                self._payload_left -= skipped
                at += skipped
                continue
            self._head.append(data[at])
            at += 1
            size = self._head[1] & 0x7F if len(self._head) > 1 else 0
            extra = {126: 2, 127: 8}.get(size, 0)  # bytes of a length that does not fit into seven bits
            masked = 4 if len(self._head) > 1 and self._head[1] & 0x80 else 0
            if len(self._head) == 2 + extra + masked:
                self._payload_left = int.from_bytes(self._head[2 : 2 + extra]) if extra else size
                self._head.clear()
                self._frames += 1


class _ProbeProtocol(ResponseHandler):
    """Refuses a handshake with many responses: aiohttp passes over interim ones, however many there are."""

    _responses = 0

    def feed_data(self, data: Any, size: int = 0) -> None:
        self._responses += 1
        if self._responses <= RESPONSE_LIMIT:
            super().feed_data(data, size)
        elif self._exception is None:
            message = f"more than {RESPONSE_LIMIT} responses to one request"
            self.set_exception(HttpProcessingError(code=HTTPStatus.BAD_GATEWAY, message=message))
            if isinstance(self.transport, asyncio.Transport):
                self.transport.abort()

    def set_parser(self, parser: Any, payload: Any, data_received_cb: Any = None) -> None:
        super().set_parser(_LimitedFrames(parser, payload), payload, data_received_cb)


class _ProbeConnector(aiohttp.BaseConnector):
    """Makes aiohttp use the connections of probes, which record phases and reasons."""

    def __init__(self, options: WebsocketProbeOptions, details: ProbeDetails) -> None:
        super().__init__(force_close=True)
        self._options, self._details = options, details
        self.transport: asyncio.Transport | None = None

    async def _create_connection(
        self,
        req: ClientRequest,
        traces: Any,  # noqa: ARG002 - part of aiohttp's signature
        timeout: Any,  # noqa: ARG002 - part of aiohttp's signature
    ) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        url = req.url
        if _origin(url) != _origin(URL(self._options.url)):
            # The configured headers may be credentials.
            raise ProbeFailure("protocol", f"redirected to another server, {url.origin()}, which is not followed")
        tls = with_server_name(self._options.tls, self._options.host_header) if req.is_ssl() else None
        self.transport, protocol, _ = await connect(
            connectable_host(url),
            url.port or 0,
            lambda: _ProbeProtocol(loop),
            self._details,
            dial=self._options,
            tls=tls,
        )
        if tls:
            protocol.connection_made(self.transport)  # so far it has the transport below TLS
        return protocol


async def _check_redirect(request: ClientRequest, handle: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Check where a response redirects to, before aiohttp parses it. Raises ProbeFailure."""
    response = await handle(request)
    if has_long_host(response.headers.get("Location") or response.headers.get("URI") or ""):
        raise ProbeFailure("protocol", f"redirected to a host whose name is longer than {NAME_LIMIT} characters")
    return response


def _origin(url: URL) -> tuple[str | None, int | None, bool]:
    return url.host, url.port, url.scheme in ("wss", "https")


async def probe_websocket(options: WebsocketProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    url = URL(options.url)
    written_url = URL(f"{url.scheme}://{url.raw_authority}{request_target(options.url)}", encoded=True)
    headers = await _build_headers(options, details)
    if options.host_header is None:
        headers["Host"] = without_zone(url.host_port_subcomponent or "")
    connector = _ProbeConnector(options, details)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, middlewares=[_check_redirect]) as session:
        started = time.perf_counter()
        try:
            socket = await session.ws_connect(written_url, headers=headers, max_msg_size=MESSAGE_LIMIT, autoping=False)
        except aiohttp.WSServerHandshakeError as error:
            raise _handshake_failure(error, options) from error
        except aiohttp.ClientResponseError as error:
            raise ProbeFailure("protocol", f"WebSocket handshake failed: {_first_line(error.message)}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ProbeFailure("protocol", f"WebSocket handshake failed: {_first_line(str(error))}") from error
        finally:
            details.add_phase("processing", time.perf_counter() - started - sum(details.phases.values()))
        started = time.perf_counter()
        try:
            await _converse(options, socket, details)
        finally:
            details.add_phase("transfer", time.perf_counter() - started)
            if connector.transport is not None:
                connector.transport.abort()  # does not wait for the peer's close frame


async def _build_headers(options: WebsocketProbeOptions, details: ProbeDetails) -> dict[str, str]:
    """Return the headers to send; configured ones replace that of `auth`. Raises ProbeFailure."""
    headers = {name: value.get_secret_value() for name, value in options.headers.items()}
    if options.auth is None or any(name.lower() == "authorization" for name in headers):
        return headers
    if options.auth.bearer_file is None:
        return {**headers, "Authorization": format_authorization(options.auth)}
    token = await asyncio.to_thread(read_token, options.auth.bearer_file)
    details.redact = details.redact.with_secret(token)
    return {**headers, "Authorization": f"Bearer {token}"}


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "the connection was closed").rstrip(":")


def _handshake_failure(error: aiohttp.WSServerHandshakeError, options: WebsocketProbeOptions) -> ProbeFailure:
    if error.status == 101:  # noqa: PLR2004 - HTTP status code
        return ProbeFailure("protocol", f"WebSocket handshake failed: {error.message}")
    reason: FailureReason = "auth" if error.status in (401, 403) and options.sends_credentials else "status"
    return ProbeFailure(reason, f"answered {error.status}, expected 101")


async def _receive_message(socket: aiohttp.ClientWebSocketResponse) -> aiohttp.WSMessage:
    """Return the next message, and answer pings before it. Raises ValueError."""
    for _ in range(MESSAGES_PER_STEP):
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.PING:
            await socket.pong(message.data)
        elif message.type is not aiohttp.WSMsgType.PONG:
            return message
        await asyncio.sleep(0)
    raise ValueError(f"more than {MESSAGES_PER_STEP} pings without a message")


async def _converse(
    options: WebsocketProbeOptions, socket: aiohttp.ClientWebSocketResponse, details: ProbeDetails
) -> None:
    async def receive(_on_partial: object) -> bytes | None:
        message = await _receive_message(socket)
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data).encode()
        if message.type is aiohttp.WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is aiohttp.WSMsgType.ERROR:
            raise ValueError(f"{message.data}")
        return None

    dialogue = Dialogue(receive, details)
    for step in options.dialogue:
        step_name = dialogue.next_step()
        data = dialogue.data_of(step)
        if data is None:
            await dialogue.await_step(step)
            continue
        try:
            if step.send_bytes is not None:
                await socket.send_bytes(data)
            else:
                await socket.send_str(data.decode("utf-8", "replace"))
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeFailure("protocol", f"{step_name}: the peer closed the connection") from error


WEBSOCKET = ProbeKind(WebsocketProbeOptions, probe_websocket)
