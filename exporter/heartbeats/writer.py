"""Stores pings durably, before they are answered. Pings that arrive while others are stored share one transaction."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from exporter.heartbeats.state import HeartbeatState
from exporter.heartbeats.store import HeartbeatStore, ReceivedPing
from runtime.clock import StoredClock

P = ParamSpec("P")
T = TypeVar("T")
GROUP_LIMIT = 500  # pings in one transaction
States = Mapping[str, HeartbeatState]  # by service


class PingWriter:
    """Stores pings with the states that they lead to, one transaction after another."""

    def __init__(
        self,
        store: HeartbeatStore,
        clock: Callable[[], StoredClock],
        states_after: Callable[[Sequence[ReceivedPing]], States],
        on_stored: Callable[[States], None],
    ) -> None:
        """`states_after` returns the states after some pings, and `on_stored` is called once they are durable."""
        self._store, self._clock, self._states_after, self._on_stored = store, clock, states_after, on_stored
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heartbeats")
        self._turn = asyncio.Lock()
        self._waiting: list[tuple[ReceivedPing, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(self, ping: ReceivedPing) -> None:
        """Store a ping; it is durable when this returns. Raises HeartbeatStoreError."""
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append((ping, stored))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting(), name="store pings")
        await stored

    async def change(self, compute: Callable[[], States]) -> None:
        """Store the states that `compute` returns, and the time. Raises HeartbeatStoreError."""
        async with self._turn:
            await self._commit((), compute())

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on the store, in the thread that uses it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **kwargs))

    async def close(self) -> None:
        """Store what still waits."""
        while self._writing is not None:
            await asyncio.wait([self._writing])
        self._thread.shutdown()

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(0)  # with what else arrives in this turn of the event loop
                async with self._turn:
                    group, self._waiting = self._waiting[:GROUP_LIMIT], self._waiting[GROUP_LIMIT:]
                    await self._write_group(group)
        finally:
            self._writing = None

    async def _write_group(self, group: Sequence[tuple[ReceivedPing, asyncio.Future[None]]]) -> None:
        pings = [ping for ping, _ in group]
        fault: Exception | None = None
        try:
            await self._commit(pings, self._states_after(pings))
        except Exception as error:  # noqa: BLE001 - raised to the senders of the pings
            fault = error
        for _, stored in group:
            if stored.done():
                continue  # its client has gone
            if fault is None:
                stored.set_result(None)
            else:
                stored.set_exception(fault)

    async def _commit(self, pings: Sequence[ReceivedPing], states: States) -> None:
        await self.run(self._store.commit, pings, states, self._clock())
        self._on_stored(states)
