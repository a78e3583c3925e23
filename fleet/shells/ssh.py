"""Commands over SSH: one pooled connection per host, pinned host keys, timeouts on both ends."""

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
from typing import Any, Literal

import asyncssh

from fleet.shells import (
    ENDED_BY_TIMEOUT,
    KILL_DELAY,
    READ_LIMIT,
    TRAILING_OUTPUT_TIMEOUT,
    WRAPPER_REFUSED,
    CommandNotRunError,
    CompletedCommand,
    HostKeyError,
    LoginError,
    OutputCallback,
    ShellError,
    WrapperOutdatedError,
)
from fleet.shells.proof import CommandMarkers, CommandOutputs, build_script
from runtime.pacing import PacedProtocol

CONNECT_TIMEOUT = 10.0
SESSION_LIMIT = 8  # sshd's MaxSessions is 10
# asyncssh prefers ChaCha20, which takes twice the CPU time of AES-GCM.
CIPHERS = (
    "aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr", "aes192-ctr",
    "aes128-ctr",
)  # fmt: skip
# Without group exchange: the host would choose a prime, before its key is checked, whose size blocks the event loop for
# minutes.
KEY_EXCHANGES = (
    "curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256", "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521", "diffie-hellman-group14-sha256", "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha1",
)  # fmt: skip
ANSWER_GRACE = 2.0  # seconds after the remote timeout for the answer to arrive
SESSION_RETRY_DELAYS = (0.02, 0.1, 0.5)  # seconds before a refused session is requested again

# The refusal of a wrapper of an earlier version, which does not know marks.
_OUTDATED = "defib-shell: it takes run SECONDS DIGEST"


WrapperMode = Literal["read", "control"]


def command_digest(argv: Sequence[str], stdin: bytes = b"") -> str:
    """Return the digest by which a wrapper identifies a command and its stdin."""
    command = shlex.join(argv).encode("utf-8", "surrogateescape")
    return hashlib.sha256(b"\0".join([command, stdin] if stdin else [command])).hexdigest()[:32]


@dataclass(frozen=True)
class Login:
    """Address, user and keys of a login."""

    address: str
    port: int
    user: str | None
    key_file: Path | None
    known_hosts: Path
    wrapper: WrapperMode | None = None  # the key may only run deploy/ssh/defib-shell in this mode


class _Connector:
    """Opens paced connections for asyncssh, in the place of a tunnel."""

    async def create_connection(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        loop = asyncio.get_running_loop()
        transport, paced = await loop.create_connection(lambda: PacedProtocol(factory()), host, port)
        return transport, paced.protocol


class _Slot:
    """One of the sessions that a connection may have, to be released once, possibly later."""

    def __init__(self, sessions: asyncio.Semaphore) -> None:
        self._callbacks: list[Callable[[], None]] = [sessions.release]
        self._later: asyncio.Task[None] | None = None

    def on_release(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def release_after(self, end: Coroutine[object, object, None]) -> None:
        self._later = asyncio.create_task(end)
        self._later.add_done_callback(lambda _task: self._release_now())

    def release(self) -> None:
        if self._later is None:
            self._release_now()

    def _release_now(self) -> None:
        for callback in self._callbacks:
            callback()


class SshShell:
    """Runs commands on one host over one connection, opened at the first use and again when it is lost."""

    def __init__(
        self,
        login: Login,
        tunnel: Callable[[], Awaitable[asyncssh.SSHClientConnection]] | None = None,
        *,
        control: bool = False,
    ) -> None:
        """With `control`, processes that a command leaves running keep their outputs after the session.

        Otherwise a command is ended after `READ_LIMIT` bytes of output.
        """
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
    ) -> CompletedCommand:
        request = self._request(argv, timeout, stdin, on_output)
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self._sessions.acquire()
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no free SSH session within {timeout:g} s") from None
        slot = _Slot(self._sessions)
        try:
            connection = await self.connection(timeout - (time.monotonic() - started))
            self._in_use[connection] += 1
            slot.on_release(lambda: self._end_session(connection))
            return await self._run(connection, request, timeout, slot)
        finally:
            slot.release()

    @property
    def wrapped(self) -> bool:
        return self._login.wrapper is not None

    def _request(
        self, argv: Sequence[str], timeout: float, stdin: bytes, on_output: OutputCallback | None
    ) -> "_Request":
        """Return what is sent to the host's login shell, or to its wrapper."""
        if self._login.wrapper == "read":  # its sections have marks of their own
            return _Request(shlex.join(argv), b"", stdin, None, on_output, READ_LIMIT)
        marks = CommandMarkers()
        if self._login.wrapper == "control":
            command = f"run {math.ceil(timeout)} {command_digest(argv, stdin)} {marks.first} {marks.second}"
            return _Request(command, b"", b"", marks, on_output, None)
        # On stdin, so that no login shell, of whatever kind, interprets the command. The host enforces the timeout too:
        # otherwise the command would keep running.
        text = build_script(argv, marks, timeout=timeout, keep_output=self._control, read_stdin=bool(stdin))
        return _Request("sh -s", text, stdin, marks, on_output, None if self._control else READ_LIMIT)

    @property
    def state(self) -> str:
        if self._connection is not None and not self._connection.is_closed():
            return "connected"
        return "connecting" if self._connecting is not None and not self._connecting.done() else "closed"

    async def _run(
        self, connection: asyncssh.SSHClientConnection, request: "_Request", timeout: float, slot: "_Slot"
    ) -> CompletedCommand:
        started = time.monotonic()
        tried: list[_Session] = []
        try:
            async with asyncio.timeout(timeout + KILL_DELAY + ANSWER_GRACE):
                channel, session = await _open(connection, request, tried)
                with contextlib.suppress(BrokenPipeError):  # the command may end without reading its stdin
                    await session.feed(channel, request)
                await session.wait_ended()
        except TimeoutError:
            self._drop(connection)  # it may be dead: the next command opens another
            if not any(each.channel is not None for each in tried):
                raise ShellError(f"{self._login.address}: no SSH session within {timeout:g} s") from None
            if not tried[-1].outputs.started:
                return CompletedCommand(
                    None, "", "", f"the host's shell did not start the command within {timeout:g} s"
                )
            return CompletedCommand(None, "", "", f"no answer within {timeout:g} s", late=True)
        except asyncssh.ChannelOpenError as error:
            raise ShellError(f"{self._login.address}: no SSH session: {error.reason}") from error
        except (asyncssh.Error, OSError) as error:
            self._drop(connection)
            return CompletedCommand(None, "", "", f"the connection was lost: {_format_error(error)}")
        finally:
            remaining = [each for each in tried if each.channel is not None and not each.closed.is_set()]
            for each in remaining:
                each.close()
            if remaining:
                slot.release_after(self._wait_closed(connection, remaining[-1], timeout))
        if session.exited and session.is_closed and not session.outputs.started:
            return self._not_run(session)
        outputs, status = session.outputs, session.outputs.status_or(session.status)
        if status in ENDED_BY_TIMEOUT and time.monotonic() - started >= timeout - 0.5:
            out, err = outputs.out.text, outputs.err.text
            return CompletedCommand(None, out, err, f"timed out after {timeout:g} s and was ended", late=True)
        return outputs.build_result(status)

    def _not_run(self, session: "_Session") -> CompletedCommand:
        """Return the wrapper's refusal. Raises ShellError where it was not the wrapper that answered."""
        refusal = session.outputs.refusal
        if not self.wrapped or session.status != WRAPPER_REFUSED or not refusal:
            message = session.outputs.message
            raise CommandNotRunError(f"{self._login.address}: the host's shell did not run the command: {message}")
        if refusal == _OUTDATED:
            raise WrapperOutdatedError(
                f"{self._login.address}: the host's defib-shell is outdated: run defib host setup again"
            )
        return CompletedCommand(WRAPPER_REFUSED, "", refusal)

    async def _wait_closed(self, connection: asyncssh.SSHClientConnection, session: "_Session", timeout: float) -> None:
        """Wait until a session is closed: until then it counts against sshd's limit."""
        try:
            async with asyncio.timeout(timeout + KILL_DELAY + ANSWER_GRACE):
                await session.closed.wait()
        except TimeoutError:
            self._drop(connection)

    async def connection(self, within: float = CONNECT_TIMEOUT) -> asyncssh.SSHClientConnection:
        """Return the connection, after opening it if needed; callers share one attempt. Raises ShellError."""
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._establish())
            self._connecting.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(max(within, 0.0)):
                return await asyncio.shield(self._connecting)
        except asyncio.CancelledError:
            if self._connecting.cancelled():  # the shell was closed, not this call cancelled
                raise ShellError(f"{self._login.address}: the shell was closed") from None
            raise
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no SSH connection within {within:.3g} s") from None

    async def _establish(self) -> asyncssh.SSHClientConnection:
        """Connect for later callers too: the first ones may have stopped waiting."""
        self._connection = await self._connect()
        return self._connection

    async def _connect(self) -> asyncssh.SSHClientConnection:
        login = self._login
        where = f"{login.address}:{login.port}"
        pinned = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                pinned, keys = await asyncio.to_thread(_read_keys, login)
                tunnel = await self._tunnel() if self._tunnel else _Connector()
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
                    kex_algs=KEY_EXCHANGES,
                    encryption_algs=CIPHERS,
                    compression_algs=["none"],  # a few bytes from the host could expand to gigabytes
                    keepalive_interval=15,
                    keepalive_count_max=3,
                    login_timeout=CONNECT_TIMEOUT,
                )
        except TimeoutError:
            raise ShellError(f"{where}: no SSH connection within {CONNECT_TIMEOUT:g} s") from None
        except asyncssh.HostKeyNotVerifiable as error:
            changed = self._is_pinned(pinned)
            problem = "HOST KEY CHANGED: the host's key is not the one" if changed else "the host's key is not"
            raise HostKeyError(f"{where}: {problem} pinned in {login.known_hosts}", changed=changed) from error
        except (asyncssh.PermissionDenied, asyncssh.KeyImportError) as error:
            raise LoginError(f"{where}: {_format_error(error)}") from error
        except (asyncssh.Error, OSError, ValueError) as error:
            raise ShellError(f"{where}: {_format_error(error)}") from error

    def _is_pinned(self, pinned: asyncssh.SSHKnownHosts | None) -> bool:
        """Whether any key is pinned for the host: unknown and changed keys raise the same error."""
        return pinned is not None and any(pinned.match(self._login.address, "", self._login.port))

    def _drop(self, connection: asyncssh.SSHClientConnection) -> None:
        """Stop using a connection; it is closed after its last session."""
        if self._connection is connection:
            self._connection = None
        self._dropped.add(connection)

    def _end_session(self, connection: asyncssh.SSHClientConnection) -> None:
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
        connections = {*self._dropped, *([self._connection] if self._connection else [])}
        self._connection = None
        for connection in connections:
            self._abort(connection)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(connection.wait_closed() for connection in connections))


@dataclass(frozen=True)
class _Request:
    """A command as it is sent: the command line, the script for the login shell, and the command's own stdin."""

    command: str
    script: bytes
    stdin: bytes
    marks: CommandMarkers | None  # None: the answer has marks of its own
    on_output: OutputCallback | None
    output_limit: int | None  # bytes


class _Session(asyncssh.SSHClientSession[bytes]):
    """One command: its output and its end. Leaner than asyncssh's own SSHClientProcess."""

    def __init__(self, request: _Request) -> None:
        self.outputs = CommandOutputs(request.marks, request.on_output, request.output_limit)
        self._raw = request.marks is None
        self.channel: asyncssh.SSHClientChannel[bytes] | None = None
        self.status: int | None = None  # None where a signal or the connection ended it
        self.exited = False
        self.closed = asyncio.Event()
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._marks_read = asyncio.Event()  # both end marks have arrived, or never will
        self._eof = asyncio.Event()

    def connection_made(self, chan: "asyncssh.SSHClientChannel[bytes]") -> None:
        self.channel = chan

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        outputs = self.outputs
        if outputs.too_long:
            return
        (outputs.err if datatype == asyncssh.EXTENDED_DATA_STDERR else outputs.out).add(data)
        if outputs.started or outputs.is_echo:  # the peer may send back all of stdin, and wait for its end
            self._started.set()
        if outputs.ended:
            self._ended.set()
            self._marks_read.set()
        if outputs.too_long:
            self._stop_waiting()

    def eof_received(self) -> bool:
        self._marks_read.set()
        self._eof.set()
        return True

    def exit_status_received(self, status: int) -> None:
        self.status = status
        self._exit()

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002 - asyncssh's interface
        self._exit()

    def _exit(self) -> None:
        self.exited = True
        self._ended.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncssh's interface
        self._stop_waiting()
        self.closed.set()

    def _stop_waiting(self) -> None:
        for event in (self._started, self._ended, self._marks_read, self._eof):
            event.set()

    @property
    def is_closed(self) -> bool:
        """Whether there is no more output to come."""
        return self._eof.is_set()

    async def feed(self, channel: "asyncssh.SSHClientChannel[bytes]", request: _Request) -> None:
        """Send the script, and the command's stdin once the command has started."""
        if request.script:
            channel.write(request.script)
        if request.stdin:
            if request.script:
                await self._started.wait()
            if self.outputs.started:
                channel.write(request.stdin)
        channel.write_eof()

    async def wait_ended(self) -> None:
        """Wait for the command's end, and a little for further output of processes that it left running."""
        await self._ended.wait()
        if not self._raw:  # other processes pass the output on, and may end later
            await self._marks_read.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRAILING_OUTPUT_TIMEOUT):
                await self._eof.wait()


async def _open(
    connection: asyncssh.SSHClientConnection, request: _Request, tried: list[_Session]
) -> "tuple[asyncssh.SSHClientChannel[bytes], _Session]":
    """Start a command, with retries: sshd may not have cleaned up an earlier session yet.

    Every session that was started is added to `tried`.
    """

    def create_session() -> _Session:
        tried.append(_Session(request))
        return tried[-1]

    for pause in SESSION_RETRY_DELAYS:
        try:
            channel, _ = await connection.create_session(create_session, request.command, encoding=None)
        except asyncssh.ChannelOpenError:
            await asyncio.sleep(pause)
        else:
            return channel, tried[-1]
    channel, _ = await connection.create_session(create_session, request.command, encoding=None)
    return channel, tried[-1]


def _read_keys(login: Login) -> tuple[asyncssh.SSHKnownHosts, list[asyncssh.SSHKey]]:
    """Return the pinned host keys and the client's own keys. Raises OSError where a file is missing."""
    pinned = asyncssh.read_known_hosts(str(login.known_hosts))
    return pinned, [asyncssh.read_private_key(str(login.key_file))] if login.key_file else []


def _retrieve(task: "asyncio.Task[asyncssh.SSHClientConnection]") -> None:
    if not task.cancelled():
        task.exception()  # marks it as retrieved: there may be no caller left


def _format_error(error: BaseException) -> str:
    if isinstance(error, asyncssh.Error):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
