"""Frames of HTTP/2 (RFC 9113), as servers send them: well or badly."""

import asyncio
from collections.abc import Awaitable, Callable

import hpack

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS = 4
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def frame(kind: int, payload: bytes = b"", stream: int = 0, flags: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def headers(*fields: tuple[str, str], end: bool = False) -> bytes:
    return frame(HEADERS, hpack.Encoder().encode(fields), 1, END_HEADERS | (END_STREAM if end else 0))


def message(body: bytes, compressed: int = 0) -> bytes:
    """A message of gRPC, in a frame."""
    return frame(DATA, bytes([compressed]) + len(body).to_bytes(4) + body, 1)


GRPC = ((":status", "200"), ("content-type", "application/grpc"))
SERVING = b"\x08\x01"


def answer(*after_settings: bytes, body: bytes = SERVING) -> bytes:
    """What a server of gRPC sends that is well, with other frames before its answer."""
    begun = [frame(SETTINGS), *after_settings, headers(*GRPC)]
    return b"".join([*begun, message(body), headers(("grpc-status", "0"), end=True)])


def saying(text: bytes) -> Serve:
    """Return a server that says something when a request arrives, and then waits until the client is gone."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(text)
        await reader.read()

    return serve
