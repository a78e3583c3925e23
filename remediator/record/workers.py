"""Threads that execute transactions. Work that waits at the same time shares one transaction (group commit)."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from sqlalchemy import Connection, Engine

GROUP_LIMIT = 16  # works in one transaction
TURN_TIMEOUT = 0.02  # seconds

Work = Callable[[Connection], Any]
_Outcome = tuple[asyncio.Future[Any], Any, BaseException | None]
TransactionMode = Literal["BEGIN", "BEGIN IMMEDIATE"]


class TransactionWorkers:
    """Runs work on an engine's connections, in the order in which it was submitted.

    Work that fails takes nothing else with it: the transaction is rolled back, and each work of its group is executed
    again in a transaction of its own. So work may be executed twice, and must change nothing but the database. Workers
    with the same `turn` avoid executing statements at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        mode: TransactionMode,
        name: str,
        turn: threading.Lock,
        *,
        threads: int = 1,
        group_limit: int = GROUP_LIMIT,
    ) -> None:
        self._engine, self._mode, self._threads, self._turn = engine, mode, threads, turn
        self._group_limit = group_limit
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._busy = 0  # threads
        self._is_scheduled = False

    def run_blocking(self, call: Callable[[], Any]) -> Any:
        """Run `call` in one of the threads, and return its result."""
        return self._pool.submit(call).result()

    async def execute(self, work: Work) -> Any:
        """Return the result of `work`, whose changes are durable then.

        Work that has begun is completed even if its caller is cancelled.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((work, future))
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._dispatch)  # with what else is submitted in this iteration of the loop
        return await future

    def close(self) -> None:
        """Execute what still waits, and end the threads. Not to be called in the event loop."""
        while self._waiting:
            self.run_blocking(self._execute_waiting)
        self._pool.shutdown()

    def _dispatch(self) -> None:
        self._is_scheduled = False
        groups = -(-len(self._waiting) // self._group_limit)
        for _ in range(min(groups, self._threads - self._busy)):
            self._busy += 1
            executed = asyncio.get_running_loop().run_in_executor(self._pool, self._execute_waiting)
            executed.add_done_callback(self._finish)

    def _finish(self, executed: asyncio.Future[list[_Outcome]]) -> None:
        self._busy -= 1
        for future, result, error in executed.result():
            if future.done():
                continue  # its caller was cancelled
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._dispatch()

    def _execute_waiting(self) -> list[_Outcome]:
        group: list[tuple[Work, asyncio.Future[Any]]] = []
        with contextlib.suppress(IndexError):
            while len(group) < self._group_limit:
                work, future = self._waiting.popleft()
                if not future.cancelled():
                    group.append((work, future))
        outcomes = self._execute_group([work for work, _ in group])
        return [(future, *outcome) for (_, future), outcome in zip(group, outcomes, strict=True)]

    def _execute_group(self, group: Sequence[Work]) -> list[tuple[Any, BaseException | None]]:
        """Return the result or the error of each work."""
        try:
            with begin(self._engine, self._mode) as connection, self._take_turn():
                return [(work(connection), None) for work in group]
        except BaseException as error:  # noqa: BLE001 - raised to the caller of the work
            if len(group) == 1:
                return [(None, error)]
        return [self._execute_group([work])[0] for work in group]

    @contextlib.contextmanager
    def _take_turn(self) -> Iterator[None]:
        """Wait until no other thread executes statements, unless one takes long.

        The sqlite3 module releases the GIL in each statement. Threads that execute statements at the same time hand it
        to each other at each of them, which takes more time than most statements.
        """
        has_turn = self._turn.acquire(timeout=TURN_TIMEOUT)
        try:
            yield
        finally:
            if has_turn:
                self._turn.release()


@contextlib.contextmanager
def begin(engine: Engine, mode: TransactionMode) -> Iterator[Connection]:
    """Begin a transaction, which is committed at the end of the block."""
    # Not by a listener for SQLAlchemy's `begin` event: with any listener, every statement looks for more of them.
    with engine.begin() as connection:
        connection.exec_driver_sql(mode)
        yield connection
