"""Cancellation of tasks, and an event that thousands of tasks wait for, each for its own."""

import asyncio
from collections.abc import Iterable
from typing import Any


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended; their results and errors are dropped."""
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


class SmallEvent:
    """As asyncio.Event, for one waiting task: an event has space for 64 of them."""

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._waiter is not None:
            _end_waiting(self._waiter)

    def clear(self) -> None:
        self._is_set = False

    async def wait_until(self, at: float) -> bool:
        """Wait until it is set, or until a time of the event loop's clock; return whether it is set."""
        if not self._is_set:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_at(at, _end_waiting, self._waiter)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return self._is_set


def _end_waiting(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
