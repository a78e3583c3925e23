"""Reads for many callers: equal ones share one, few run at a time, and none is cancelled when a caller gives up."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class SharedReads:
    """At most `running` reads run, and `waiting` more wait; a result serves all callers for `shared_for` seconds.

    Results are the same objects for all callers, which must not change them.
    """

    def __init__(self, *, running: int, waiting: int, shared_for: float = 0.0) -> None:
        self._slots, self._most, self._shared_for = asyncio.Semaphore(running), running + waiting, shared_for
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}
        self._unfinished = 0

    async def read(self, key: Hashable, read: Callable[[], Awaitable[T]], patience: float) -> T:
        """Return what `read` returns, or what another caller with the same key got.

        Raises TimeoutError after `patience` seconds, or if too many reads wait, and what `read` raises.
        """
        task: asyncio.Task[T] | None = self._tasks.get(key)
        if task is None:
            if self._unfinished >= self._most:
                raise TimeoutError("too many requests at the same time")
            self._unfinished += 1
            task = self._tasks[key] = asyncio.create_task(self._run(read), name=f"read {key}")
            task.add_done_callback(partial(self._finish, key))
        async with asyncio.timeout(patience):
            return await asyncio.shield(task)

    async def _run(self, read: Callable[[], Awaitable[T]]) -> T:
        async with self._slots:
            return await read()

    def _finish(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._unfinished -= 1
        if self._shared_for and not task.cancelled() and task.exception() is None:
            asyncio.get_running_loop().call_later(self._shared_for, self._forget, key, task)
        else:
            self._forget(key, task)

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # otherwise asyncio reports one that no caller has waited for
