"""Requests at a steady rate over connections that are kept alive, by a client that takes little CPU itself."""

import asyncio
import time
from typing import cast


class Connection(asyncio.Protocol):
    """Sends one request at a time, and notes when the whole response has arrived, with `expected` in its body."""

    def __init__(self, expected: bytes = b"") -> None:
        self._received, self._expected = bytearray(), expected
        self._done: asyncio.Future[float] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if b"chunked" in head:
            is_complete = rest.endswith(b"0\r\n\r\n")
        else:
            is_complete = len(rest) >= int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if is_complete and self._done is not None and not self._done.done():
            body = _join_chunks(bytes(rest)) if b"chunked" in head else rest
            self._received.clear()
            if head.startswith(b"HTTP/1.1 200") and self._expected in body:
                self._done.set_result(time.perf_counter())
            else:
                self._done.set_exception(ValueError(f"not as expected: {bytes(head)!r} {bytes(body[-200:])!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("closed"))

    async def ask(self, request: bytes) -> float:
        """Return the seconds until the response was complete."""
        assert self.transport is not None
        self._done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.transport.write(request)
        return await self._done - began


def _join_chunks(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)


async def send_steadily(port: int, request: bytes, rate: float, seconds: float, expected: bytes = b"") -> list[float]:
    """Send requests at equal intervals, whatever the responses take; return the seconds that each took."""
    loop = asyncio.get_running_loop()
    idle: list[Connection] = []
    latencies: list[float] = []

    async def send() -> None:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(lambda: Connection(expected), "127.0.0.1", port)
        latencies.append(await connection.ask(request))
        idle.append(connection)

    async with asyncio.TaskGroup() as group:
        began = loop.time()
        for number in range(int(seconds * rate)):
            await asyncio.sleep(began + number / rate - loop.time())
            group.create_task(send())
    for each in idle:
        assert each.transport is not None
        each.transport.close()
    return latencies
