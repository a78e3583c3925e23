"""The `websocket` probe: a handshake (RFC 6455) and a dialogue message by message, carried by aiohttp."""

import asyncio
import time
from typing import Annotated, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from pydantic import AfterValidator, Field
from yarl import URL

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.probes.net.connections import DialOptions, ProbeTls, connect
from exporter.probes.net.dialogue import HEARD_LIMIT, Dialogue, DialogueStep
from exporter.probes.net.http_request import Headers
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import check_url

MESSAGE_LIMIT = 1024 * 1024


def _websocket_url(url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise ValueError("is not a URL of a WebSocket (write ws://host:port/path)")
    check_url(url.replace("ws", "http", 1))
    return url


class WebsocketProbeOptions(DialOptions):
    url: Annotated[str, AfterValidator(_websocket_url)]
    headers: Headers = Field(default_factory=dict)
    tls: ProbeTls = ProbeTls()
    dialogue: list[DialogueStep] = []


class _ProbeConnector(aiohttp.BaseConnector):
    """Has aiohttp speak over a connection of ours, with its phases and its reasons."""

    def __init__(self, options: WebsocketProbeOptions, details: ProbeDetails) -> None:
        super().__init__(force_close=True)
        self._options, self._details = options, details
        self.transport: asyncio.Transport | None = None

    async def _create_connection(self, req: ClientRequest, traces: Any, timeout: Any) -> ResponseHandler:  # noqa: ARG002
        loop = asyncio.get_running_loop()
        url = req.url
        if _server(url) != _server(URL(self._options.url)):
            # Headers of the user's may be credentials.
            raise ProbeFailure("protocol", f"redirected to {url.origin()}, which is another server")
        tls = self._options.tls if req.is_ssl() else None
        self.transport, protocol = await connect(
            url.raw_host or "", url.port or 0, lambda: ResponseHandler(loop), self._details, dial=self._options, tls=tls
        )
        if tls:
            protocol.connection_made(self.transport)  # the one that it was made with is below TLS
        return protocol


def _server(url: URL) -> tuple[str | None, int | None, bool]:
    return url.host, url.port, url.scheme in ("wss", "https")


async def probe_websocket(options: WebsocketProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    headers = {name: value.get_secret_value() for name, value in options.headers.items()}
    connector = _ProbeConnector(options, details)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        started = time.perf_counter()
        try:
            socket = await session.ws_connect(options.url, headers=headers, max_msg_size=MESSAGE_LIMIT, autoping=False)
        except aiohttp.WSServerHandshakeError as error:
            raise _refused(error, options) from error
        except aiohttp.ClientResponseError as error:
            raise ProbeFailure("protocol", f"no WebSocket handshake: {_first_line(error.message)}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ProbeFailure("protocol", f"no WebSocket handshake: {_first_line(str(error))}") from error
        finally:
            details.add_phase("processing", time.perf_counter() - started - sum(details.phases.values()))
        started = time.perf_counter()
        try:
            await _converse(options, socket, details)
        finally:
            details.add_phase("transfer", time.perf_counter() - started)
            if connector.transport is not None:
                connector.transport.abort()  # nobody waits for the peer's goodbye


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "the connection was closed").rstrip(":")


def _refused(error: aiohttp.WSServerHandshakeError, options: WebsocketProbeOptions) -> ProbeFailure:
    if error.status == 101:  # noqa: PLR2004
        return ProbeFailure("protocol", f"no WebSocket handshake: {error.message}")
    sends_credentials = any(name.lower() in ("authorization", "cookie") for name in options.headers)
    reason: FailureReason = "auth" if error.status in (401, 403) and sends_credentials else "status"
    return ProbeFailure(reason, f"answered {error.status}, expected 101")


async def _message(socket: aiohttp.ClientWebSocketResponse) -> aiohttp.WSMessage:
    """The next message that is not about the connection itself. Raises ValueError."""
    for _ in range(HEARD_LIMIT):
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.PING:
            await socket.pong(message.data)
        elif message.type is not aiohttp.WSMsgType.PONG:
            return message
        await asyncio.sleep(0)
    raise ValueError("pings without end")


async def _converse(
    options: WebsocketProbeOptions, socket: aiohttp.ClientWebSocketResponse, details: ProbeDetails
) -> None:
    async def hear(_unfinished: object) -> bytes | None:
        message = await _message(socket)
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data).encode()
        if message.type is aiohttp.WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is aiohttp.WSMsgType.ERROR:
            raise ValueError(f"{message.data}")
        return None

    dialogue = Dialogue(hear, details)
    for step in options.dialogue:
        where = dialogue.next()
        if step.expect is not None:
            await dialogue.expect(step.expect)
        elif step.send is not None:
            try:
                await socket.send_str(dialogue.filled(step.send).decode("utf-8", "replace"))
            except (aiohttp.ClientError, OSError) as error:
                raise ProbeFailure("protocol", f"{where}: the peer closed the connection") from error


WEBSOCKET = ProbeKind(WebsocketProbeOptions, probe_websocket)
