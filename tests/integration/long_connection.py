"""A stand-in for the server's side of the SDK's long connection: an endpoint, a WebSocket, events in frames.

A frame is the protobuf message `Frame` of the SDK (lark_oapi/ws/pb/pbbp2): 3 service, 4 method (0 control, 1 data),
5 headers of (1 key, 2 value), 8 payload.
"""

import asyncio
import base64
import json
from typing import Any

from aiohttp import WSMsgType, web

from defib.demo.feishu_app import APP_ID, APP_SECRET

TICKET = "ticket-that-is-secret"


class LongConnection:
    def __init__(self) -> None:
        self.sockets: list[web.WebSocketResponse] = []
        self.connections = 0
        self._answers: dict[str, asyncio.Future[Any]] = {}

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/callback/ws/endpoint", self._endpoint)
        app.router.add_get("/ws", self._socket)

    async def _endpoint(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if (asked["AppID"], asked["AppSecret"]) != (APP_ID, APP_SECRET):
            return web.json_response({"code": 514, "msg": "app secret is wrong", "data": {}})
        config = {"ReconnectCount": -1, "ReconnectInterval": 1, "ReconnectNonce": 1, "PingInterval": 60}
        url = f"ws://{request.host}/ws?device_id=1&service_id=1&access_key={TICKET}"
        return web.json_response({"code": 0, "msg": "ok", "data": {"URL": url, "ClientConfig": config}})

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        self.connections += 1
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                continue
            method, headers, payload = read(message.data)
            if method == 1:
                self._answers[headers["message_id"]].set_result(json.loads(payload))
        self.sockets.remove(socket)
        return socket

    async def tell(self, event: dict[str, Any]) -> Any:
        """Send an event; what it is answered with, or None."""
        number = str(len(self._answers))
        self._answers[number] = asyncio.get_running_loop().create_future()
        headers = {"type": "event", "message_id": number, "trace_id": "t", "sum": "1", "seq": "0"}
        await self.sockets[-1].send_bytes(frame(headers, json.dumps(event).encode()))
        answer = await asyncio.wait_for(self._answers[number], 15)
        assert answer["code"] == 200
        return json.loads(base64.b64decode(answer["data"])) if answer.get("data") else None

    async def cut(self) -> None:
        """Lose every connection."""
        for socket in list(self.sockets):
            if socket._req is not None and socket._req.transport is not None:
                socket._req.transport.abort()


def frame(headers: dict[str, str], payload: bytes) -> bytes:
    """A data frame."""
    said = b"".join(field(5, field(1, key.encode()) + field(2, value.encode())) for key, value in headers.items())
    return b"\x08\x00\x10\x00\x18\x01\x20\x01" + said + field(8, payload)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def read(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """(method, headers, payload) of a frame."""
    fields = parse(data)
    pairs = [dict(parse(content)) for number, content in fields if number == 5]
    return (
        next(content for number, content in fields if number == 4),
        {pair[1].decode(): pair[2].decode() for pair in pairs},
        next((content for number, content in fields if number == 8), b""),
    )


def parse(data: bytes) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = number()
        value: Any = number()
        if key & 7 == 2:
            value, at = data[at : at + value], at + value
        found.append((key >> 3, value))
    return found
