"""A second address of a server, which serves an application of its own."""

import ssl
from collections.abc import Callable
from typing import cast

from aiohttp import web

from runtime.connections.listener import Listener
from runtime.connections.registry import Connections
from runtime.errors import StartError
from runtime.lifecycle import ListenAddress
from runtime.metrics import ProgramMetrics

SHUTDOWN_TIMEOUT = 2.0  # seconds in which requests that are being answered may end


class FurtherListener:
    """Serves an application on an address that a reload may change. `setting` is the configuration key of the address.

    `get_tls` returns the TLS context of a new connection, None without TLS.
    """

    def __init__(
        self, setting: str, app: web.Application, metrics: ProgramMetrics, get_tls: Callable[[], ssl.SSLContext | None]
    ) -> None:
        self._runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_TIMEOUT, handle_signals=False)
        self._setting, self._app, self._metrics, self._get_tls = setting, app, metrics, get_tls
        self._connections: Connections | None = None
        self._listener: Listener | None = None
        self._address = ""

    async def listen(self, address: str) -> tuple[str, int] | None:
        """Listen on an address instead of the present one; on none if it is empty. Raises StartError.

        Return the address of a new listener.
        """
        if address == self._address:
            return None
        listener = await self._bind(address) if address else None
        if self._listener is not None:
            self._listener.close()
        self._listener, self._address = listener, address
        return listener.address if listener is not None else None

    async def _bind(self, address: str) -> Listener:
        if self._connections is None:
            await self._runner.setup()
            server = cast("web.Server", self._runner.server)
            self._connections = Connections(self._app, server, self._metrics)
        to = ListenAddress.parse(address)
        try:
            return await Listener.bind(to.host, to.port, self._connections, self._get_tls)
        except OSError as error:
            reason = error.strerror or error
            raise StartError(f"{self._setting}: cannot listen on {address}: {reason}") from error

    async def close(self) -> None:
        """Accept no more connections, and answer the requests that have arrived."""
        await self.listen("")
        await self._runner.cleanup()
