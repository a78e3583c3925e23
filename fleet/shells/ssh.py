"""Commands over SSH: one pooled connection per host, pinned keys, deadlines on both ends."""

import asyncio
import contextlib
import hashlib
import math
import shlex
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncssh

from fleet.shells import (
    ENDED_BY_TIMEOUT,
    KILL_DELAY,
    TRAILING_OUTPUT_TIMEOUT,
    WRAPPER_REFUSED,
    CommandNotRunError,
    Completed,
    HostKeyError,
    LoginError,
    OutputCallback,
    ShellError,
    WrapperOutdatedError,
)
from fleet.shells.proof import CommandOutputs, Marks, build_script

CONNECT_TIMEOUT = 10.0
SESSION_LIMIT = 8  # sshd's MaxSessions is 10
# In Python, AES-GCM costs half of what ChaCha20 does, which comes first by default.
CIPHERS = (
    "aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr", "aes192-ctr",
    "aes128-ctr",
)  # fmt: skip
ANSWER_GRACE = 2.0  # how much longer than the remote deadline an answer may travel
SESSION_RETRY_DELAYS = (0.02, 0.1, 0.5)  # pauses before a refused session is asked for again

# What a wrapper of an earlier version says of a command that it is asked to prove.
_OLDER = "defib-shell: it takes run SECONDS DIGEST"


WrapperMode = Literal["read", "control"]


def command_digest(argv: Sequence[str]) -> str:
    """What names a command where a wrapper runs it."""
    return hashlib.sha256(shlex.join(argv).encode("utf-8", "surrogateescape")).hexdigest()[:32]


@dataclass(frozen=True)
class Login:
    """Where and as whom to log in."""

    address: str
    port: int
    user: str | None
    key_file: Path | None
    known_hosts: Path
    wrapper: WrapperMode | None = None  # the key may only run deploy/ssh/defib-shell, to this end


class _Slot:
    """One of the sessions that a connection may hold; given back once, perhaps later."""

    def __init__(self, sessions: asyncio.Semaphore) -> None:
        self._steps: list[Callable[[], None]] = [sessions.release]
        self._later: asyncio.Task[None] | None = None

    def at_last(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def release_after(self, end: Coroutine[object, object, None]) -> None:
        self._later = asyncio.create_task(end)
        self._later.add_done_callback(lambda _task: self._give_back())

    def release(self) -> None:
        if self._later is None:
            self._give_back()

    def _give_back(self) -> None:
        for step in self._steps:
            step()


class SshShell:
    """Runs commands on one host over one connection, made when first needed and again when it is lost."""

    def __init__(
        self,
        login: Login,
        tunnel: Callable[[], Awaitable[asyncssh.SSHClientConnection]] | None = None,
        *,
        control: bool = False,
    ) -> None:
        """With `control`, what a command leaves running keeps its outputs when the session is gone."""
        self._login = login
        self._control = control
        self._tunnel = tunnel
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._in_use: Counter[asyncssh.SSHClientConnection] = Counter()  # sessions by connection
        self._dropped: set[asyncssh.SSHClientConnection] = set()
        self._sessions = asyncio.Semaphore(SESSION_LIMIT)

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> Completed:
        request = self._request(argv, timeout, stdin, on_output)
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self._sessions.acquire()
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no free SSH session within {timeout:g} s") from None
        held = _Slot(self._sessions)
        try:
            connection = await self.connection(timeout - (time.monotonic() - started))
            self._in_use[connection] += 1
            held.at_last(lambda: self._left(connection))
            return await self._run(connection, request, timeout, held)
        finally:
            held.release()

    @property
    def wrapped(self) -> bool:
        return self._login.wrapper is not None

    def _request(
        self, argv: Sequence[str], timeout: float, stdin: bytes, on_output: OutputCallback | None
    ) -> "_Request":
        """What is sent to the host's login shell, or to its wrapper."""
        if self._login.wrapper == "read":  # its answer holds marks of its own
            return _Request(shlex.join(argv), b"", stdin, None, on_output)
        marks = Marks()
        if self._login.wrapper == "control":
            command = f"run {math.ceil(timeout)} {command_digest(argv)} {marks.first} {marks.second}"
            return _Request(command, b"", b"", marks, on_output)
        # On stdin, so that the login shell has nothing to interpret, of whatever kind it is.
        # The host keeps the deadline too, where it can: what we stop waiting for would otherwise run on.
        text = build_script(argv, marks, timeout=timeout, stays=self._control, reads=bool(stdin))
        return _Request("sh -s", text, stdin, marks, on_output)

    @property
    def state(self) -> str:
        if self._connection is not None and not self._connection.is_closed():
            return "connected"
        return "connecting" if self._connecting is not None and not self._connecting.done() else "closed"

    async def _run(
        self, connection: asyncssh.SSHClientConnection, request: "_Request", timeout: float, slot: "_Slot"
    ) -> Completed:
        started = time.monotonic()
        tried: list[_Session] = []
        try:
            async with asyncio.timeout(timeout + KILL_DELAY + ANSWER_GRACE):
                channel, session = await _open(connection, request, tried)
                with contextlib.suppress(BrokenPipeError):  # it may have ended without reading anything
                    await session.feed(channel, request)
                await session.ended()
        except TimeoutError:
            self._drop(connection)  # a peer that keeps no deadline is not asked again on this connection
            if not any(each.channel is not None for each in tried):
                raise ShellError(f"{self._login.address}: no SSH session within {timeout:g} s") from None
            if not tried[-1].outputs.begun:
                return Completed(None, "", "", f"the host's shell did not begin the command within {timeout:g} s")
            return Completed(None, "", "", f"no answer within {timeout:g} s", late=True)
        except asyncssh.ChannelOpenError as error:
            raise ShellError(f"{self._login.address}: no SSH session: {error.reason}") from error
        except (asyncssh.Error, OSError) as error:
            self._drop(connection)
            return Completed(None, "", "", f"the connection was lost: {_text(error)}")
        finally:
            left = [each for each in tried if each.channel is not None and not each.gone.is_set()]
            for each in left:
                each.close()
            if left:
                slot.release_after(self._closed(connection, left[-1], timeout))
        if session.exited and session.all_said and not session.outputs.begun:
            return self._not_run(session)
        outputs, status = session.outputs, session.outputs.status_or(session.status)
        if status in ENDED_BY_TIMEOUT and time.monotonic() - started >= timeout - 0.5:
            out, err = outputs.out.text, outputs.err.text
            return Completed(None, out, err, f"it did not end within {timeout:g} s and was ended", late=True)
        return outputs.completed(status)

    def _not_run(self, session: "_Session") -> Completed:
        """What the wrapper said in place of running the command. Raises ShellError where it was not the wrapper."""
        refusal = session.outputs.refusal
        if not self.wrapped or session.status != WRAPPER_REFUSED or not refusal:
            said = session.outputs.instead
            raise CommandNotRunError(f"{self._login.address}: the host's shell did not run the command: {said}")
        if refusal == _OLDER:
            raise WrapperOutdatedError(
                f"{self._login.address}: the host's defib-shell is of an earlier version: run defib host setup again"
            )
        return Completed(WRAPPER_REFUSED, "", refusal)

    async def _closed(self, connection: asyncssh.SSHClientConnection, session: "_Session", timeout: float) -> None:
        """Wait until a session is no more: a command that we wait for no longer still holds one of sshd's."""
        try:
            async with asyncio.timeout(timeout + KILL_DELAY + ANSWER_GRACE):
                await session.gone.wait()
        except TimeoutError:
            self._drop(connection)

    async def connection(self, within: float = CONNECT_TIMEOUT) -> asyncssh.SSHClientConnection:
        """The connection, opened if there is none; all who wait share one try. Raises ShellError."""
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._establish())
            self._connecting.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(max(within, 0.0)):
                return await asyncio.shield(self._connecting)
        except asyncio.CancelledError:
            if self._connecting.cancelled():  # not we were cancelled: the shell was closed
                raise ShellError(f"{self._login.address}: the connection is not wanted any more") from None
            raise
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no SSH connection within {within:.3g} s") from None

    async def _establish(self) -> asyncssh.SSHClientConnection:
        """Connect for whoever asks next, too: those who asked first may have stopped waiting."""
        self._connection = await self._connect()
        return self._connection

    async def _connect(self) -> asyncssh.SSHClientConnection:
        login = self._login
        where = f"{login.address}:{login.port}"
        pinned = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                pinned, keys = await asyncio.to_thread(_read, login)
                tunnel = await self._tunnel() if self._tunnel else ()
                return await asyncssh.connect(
                    login.address,
                    login.port,
                    username=login.user or (),
                    client_keys=keys,
                    known_hosts=pinned,
                    config=None,
                    agent_path=None,
                    tunnel=tunnel,
                    preferred_auth="publickey",
                    encryption_algs=CIPHERS,
                    keepalive_interval=15,
                    keepalive_count_max=3,
                    login_timeout=CONNECT_TIMEOUT,
                )
        except TimeoutError:
            raise ShellError(f"{where}: no SSH connection within {CONNECT_TIMEOUT:g} s") from None
        except asyncssh.HostKeyNotVerifiable as error:
            changed = self._is_pinned(pinned)
            what = (
                "HOST KEY CHANGED: the host's key is not the one pinned" if changed else "no host key is pinned for it"
            )
            raise HostKeyError(f"{where}: {what} in {login.known_hosts}", changed=changed) from error
        except (asyncssh.PermissionDenied, asyncssh.KeyImportError) as error:
            raise LoginError(f"{where}: {_text(error)}") from error
        except (asyncssh.Error, OSError, ValueError) as error:
            raise ShellError(f"{where}: {_text(error)}") from error

    def _is_pinned(self, pinned: asyncssh.SSHKnownHosts | None) -> bool:
        """An unknown and a changed key raise the same error; the file tells them apart."""
        return pinned is not None and any(pinned.match(self._login.address, "", self._login.port))

    def _drop(self, connection: asyncssh.SSHClientConnection) -> None:
        """Use a connection for nothing new; it goes with the last session on it, which has a deadline of its own."""
        if self._connection is connection:
            self._connection = None
        self._dropped.add(connection)

    def _left(self, connection: asyncssh.SSHClientConnection) -> None:
        self._in_use[connection] -= 1
        if not self._in_use[connection]:
            del self._in_use[connection]
            if connection in self._dropped:
                self._abort(connection)

    def _abort(self, connection: asyncssh.SSHClientConnection) -> None:
        self._dropped.discard(connection)
        connection.abort()  # wait_closed() hangs on a frozen peer

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        held = {*self._dropped, *([self._connection] if self._connection else [])}
        self._connection = None
        for connection in held:
            self._abort(connection)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(connection.wait_closed() for connection in held))


@dataclass(frozen=True)
class _Request:
    """A command as it is sent: what the login shell gets, the script, and the command's own input."""

    command: str
    script: bytes
    stdin: bytes
    marks: Marks | None  # None: what answers proves by itself that it has run
    on_output: OutputCallback | None


class _Session(asyncssh.SSHClientSession[bytes]):
    """One command: what it prints, and how it ends. Leaner than asyncssh's own process, of which we need little."""

    def __init__(self, request: _Request) -> None:
        self.outputs = CommandOutputs(request.marks, request.on_output)
        self._raw = request.marks is None
        self.channel: asyncssh.SSHClientChannel[bytes] | None = None
        self.status: int | None = None  # None where a signal ended it, or the connection
        self.exited = False
        self.gone = asyncio.Event()
        self._begun = asyncio.Event()
        self._over = asyncio.Event()
        self._told = asyncio.Event()  # how the command ended, where there are marks to tell of it
        self._silent = asyncio.Event()

    def connection_made(self, chan: "asyncssh.SSHClientChannel[bytes]") -> None:
        self.channel = chan

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        outputs = self.outputs
        (outputs.err if datatype == asyncssh.EXTENDED_DATA_STDERR else outputs.out).add(data)
        if outputs.begun or outputs.sent_back:  # whoever sends back what comes may be waiting for the end of it
            self._begun.set()
        if outputs.ended:
            self._over.set()
            self._told.set()

    def eof_received(self) -> bool:
        self._told.set()
        self._silent.set()
        return True

    def exit_status_received(self, status: int) -> None:
        self.status = status
        self._exit()

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002
        self._exit()

    def _exit(self) -> None:
        self.exited = True
        self._over.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        for event in (self._begun, self._over, self._told, self._silent, self.gone):
            event.set()

    @property
    def all_said(self) -> bool:
        """Whether nothing more will come."""
        return self._silent.is_set()

    async def feed(self, channel: "asyncssh.SSHClientChannel[bytes]", request: _Request) -> None:
        """Send the script, and the command's own input once it is the command that reads."""
        if request.script:
            channel.write(request.script)
        if request.stdin:
            if request.script:
                await self._begun.wait()
            if self.outputs.begun:
                channel.write(request.stdin)
        channel.write_eof()

    async def ended(self) -> None:
        """Wait for the command's end, and a little for the rest of its output: it may have left something running."""
        await self._over.wait()
        if not self._raw:  # the marks travel through other processes, perhaps later
            await self._told.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRAILING_OUTPUT_TIMEOUT):
                await self._silent.wait()


async def _open(
    connection: asyncssh.SSHClientConnection, request: _Request, tried: list[_Session]
) -> "tuple[asyncssh.SSHClientChannel[bytes], _Session]":
    """Start a command; sshd may still be clearing away a session that we have seen the end of.

    Every session that was begun is in `tried`, whatever becomes of it.
    """

    def made() -> _Session:
        tried.append(_Session(request))
        return tried[-1]

    for pause in SESSION_RETRY_DELAYS:
        try:
            channel, _ = await connection.create_session(made, request.command, encoding=None)
        except asyncssh.ChannelOpenError:
            await asyncio.sleep(pause)
        else:
            return channel, tried[-1]
    channel, _ = await connection.create_session(made, request.command, encoding=None)
    return channel, tried[-1]


def _read(login: Login) -> tuple[asyncssh.SSHKnownHosts, list[asyncssh.SSHKey]]:
    """The pinned keys and our own; without a file of them no host is trusted."""
    pinned = asyncssh.read_known_hosts(str(login.known_hosts))
    return pinned, [asyncssh.read_private_key(str(login.key_file))] if login.key_file else []


def _retrieve(task: "asyncio.Task[asyncssh.SSHClientConnection]") -> None:
    if not task.cancelled():
        task.exception()  # whoever waited has it; nobody may be waiting any more


def _text(error: BaseException) -> str:
    if isinstance(error, asyncssh.Error):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
