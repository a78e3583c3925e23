"""The sessions of SSH connections: how many a server accepts on each, which its refusals show."""

import asyncio
from collections.abc import Callable, Coroutine

import asyncssh

SESSION_LIMIT = 8  # sshd's MaxSessions is 10 by default


class Slot:
    """A place for one session, among those of the shell and of a connection; released once, possibly later."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._callbacks: list[Callable[[], None]] = [release]
        self._later: asyncio.Task[None] | None = None

    def on_release(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def undo(self) -> None:
        """Call the last callback now instead of at the release."""
        self._callbacks.pop()()

    def release_after(self, end: Coroutine[object, object, None]) -> None:
        self._later = asyncio.create_task(end)
        self._later.add_done_callback(lambda _task: self._release_now())

    def release(self) -> None:
        if self._later is None:
            self._release_now()

    def _release_now(self) -> None:
        for callback in self._callbacks:
            callback()


class PooledConnection:
    """A connection and its sessions, of which it has at most as many as its server accepts.

    Servers do not announce that limit (sshd's MaxSessions): each refusal lowers it, until the connection ends.
    """

    def __init__(self, ssh: asyncssh.SSHClientConnection) -> None:
        self.ssh = ssh
        self.limit = SESSION_LIMIT
        self.has_accepted = False  # whether the server has accepted any session
        self._dropped = False
        self._free = asyncio.Semaphore(SESSION_LIMIT)
        self._in_use = 0
        self._excess = 0  # sessions in use that will not be available again

    @property
    def is_usable(self) -> bool:
        """Whether it may have further sessions."""
        return not (self._dropped or self.ssh.is_closed())

    async def acquire(self) -> None:
        """Wait for a free session; also returns if the connection has become unusable meanwhile."""
        await self._free.acquire()
        self._in_use += 1

    def release(self) -> None:
        self._in_use -= 1
        if self._excess:
            self._excess -= 1
        else:
            self._free.release()
        if self._dropped and not self._in_use:
            self.abort()

    def lower_limit(self) -> None:
        """Have one session less from now on, since the server refused one; the last one remains."""
        if self.limit > 1:
            self.limit -= 1
            self._excess += 1

    def drop(self) -> None:
        """Have no further sessions; the connection is closed after its last one."""
        if not self._dropped:
            self._dropped = True
            for _ in range(SESSION_LIMIT):  # those that wait need another connection
                self._free.release()

    def abort(self) -> None:
        self.ssh.abort()  # wait_closed() hangs on a frozen peer
