"""TLS handshakes with peers that may be hostile: their bytes are limited, and come in small parts."""

import asyncio
import ssl
from typing import Any

LIMIT = 256 * 1024  # bytes of a handshake; of certificates, OpenSSL accepts 100 KiB
PART = 16 * 1024  # bytes that are given to OpenSSL at once: it passes over any number of empty messages


async def perform_handshake(
    transport: asyncio.Transport, protocol: asyncio.BaseProtocol, context: ssl.SSLContext, server_name: str
) -> asyncio.Transport | None:
    """Perform a TLS handshake as `loop.start_tls` does. Raises what that raises, and ssl.SSLError beyond the limit.

    It has no time limit of its own.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(
        loop.start_tls(transport, protocol, context, server_hostname=server_name, ssl_handshake_timeout=3600.0)
    )
    try:
        await asyncio.sleep(0)  # now the transport has the protocol of TLS, which has received nothing
        inner: Any = transport.get_protocol()
        if task.done() or inner is protocol:
            return await task
        return await _limit(task, transport, inner)
    finally:
        task.cancel()  # a probe that ends before, at whatever moment, leaves no handshake behind


async def _limit(
    handshake: asyncio.Task[asyncio.Transport | None], transport: asyncio.Transport, inner: Any
) -> asyncio.Transport | None:
    """Wait for a handshake, with a limit on what the peer sends to the protocol of TLS, `inner`."""
    limiter = _Limiter(transport, inner)
    transport.set_protocol(limiter)
    try:
        secured = await handshake
    except OSError:  # as ssl.SSLError is one
        limiter.check()
        raise
    finally:
        if not transport.is_closing():
            transport.set_protocol(inner)
    limiter.check()
    return secured


class _Limiter(asyncio.BufferedProtocol):
    """Passes on what a peer sends, one part for each turn of the event loop, and aborts the connection at the limit."""

    def __init__(self, transport: asyncio.Transport, inner: Any) -> None:
        self._transport, self._inner = transport, inner  # uvloop's class is no subclass of asyncio's
        self._buffer = bytearray(PART)
        self.left = LIMIT

    def check(self) -> None:
        """Raise ssl.SSLError if the limit was exceeded: uvloop returns from a handshake that was aborted."""
        if self.left < 0:
            error = ssl.SSLError()
            error.reason = f"the server has sent more than {LIMIT // 1024} KiB"
            raise error

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        kept: bool | None = self._inner.eof_received()
        return kept

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def get_buffer(self, _sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            self._transport.abort()
            return
        self._pass_on(nbytes)
        if self._transport.is_reading() and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _pass_on(self, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            target = memoryview(self._inner.get_buffer(nbytes - done))
            size = min(len(target), nbytes - done)
            target[:size] = self._buffer[done : done + size]
            self._inner.buffer_updated(size)
            done += size

    def _go_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
