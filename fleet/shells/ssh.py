"""Commands over SSH: one pooled connection per host, pinned host keys, timeouts on both ends."""

import asyncio
import contextlib
import hashlib
import math
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import asyncssh

from fleet.shells import (
    CONNECT_TIMEOUT,
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
from fleet.shells.connecting import Connector, format_error, list_algorithms
from fleet.shells.host_keys import LEGACY_ALGORITHMS, BadLine, Pins, find_pins, read_known_hosts
from fleet.shells.proof import CommandMarkers, CommandOutputs, build_script
from fleet.shells.sessions import SESSION_LIMIT, PooledConnection, Slot

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
    """Address, user and credentials of a login.

    Without `certificate_file`, a certificate beside the key (`KEY-cert.pub`) is used, as by ssh. `passphrase` is the
    key's. `password` is for the methods `password` and `keyboard-interactive`. With `legacy`, outdated algorithms are
    accepted.
    """

    address: str
    port: int
    user: str | None
    key_file: Path | None
    known_hosts: Path
    wrapper: WrapperMode | None = None  # the key may only run deploy/ssh/defib-shell in this mode
    certificate_file: Path | None = None
    passphrase: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    legacy: bool = False


BadLinesCallback = Callable[[Path, Sequence[BadLine]], None]


class SshShell:
    """Runs commands on one host over one connection, opened at the first use and again when it is lost."""

    def __init__(
        self,
        login: Login,
        tunnel: Callable[[], Awaitable[asyncssh.SSHClientConnection]] | None = None,
        *,
        control: bool = False,
        on_bad_lines: BadLinesCallback | None = None,
    ) -> None:
        """With `control`, processes that a command leaves running keep their outputs after the session.

        Otherwise a command is ended after `READ_LIMIT` bytes of output. `on_bad_lines` is called with the lines of
        known_hosts that are ignored, at each connection.
        """
        self._on_bad_lines = on_bad_lines
        self._login = login
        self._control = control
        self._tunnel = tunnel
        self._connection: PooledConnection | None = None
        self._connecting: asyncio.Task[PooledConnection] | None = None
        self._dropped: set[PooledConnection] = set()  # connections that may still have sessions
        self._sessions = asyncio.Semaphore(SESSION_LIMIT)

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> CompletedCommand:
        request = self._request(argv, timeout, stdin, on_output)
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._sessions.acquire()
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no free SSH session within {timeout:g} s") from None
        slot = Slot(self._sessions.release)
        try:
            while True:
                connection = await self._acquire(timeout, deadline)
                slot.on_release(connection.release)
                if connection.is_usable:
                    try:
                        return await self._run(connection, request, timeout, slot)
                    except _SessionRefusedError:
                        connection.lower_limit()
                slot.undo()
        finally:
            slot.release()

    async def _acquire(self, timeout: float, deadline: float) -> PooledConnection:
        """Return the connection once it has a session for the caller. Raises ShellError after the deadline."""
        connection = await self._connected(deadline - time.monotonic())
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                if left > 0:
                    await connection.acquire()
                    return connection
        except TimeoutError:
            pass
        accepted = f"; on a connection, the server accepts {connection.limit} at the same time, see its MaxSessions"
        limit = accepted if connection.limit < SESSION_LIMIT else ""
        raise ShellError(f"{self._login.address}: no free SSH session within {timeout:g} s{limit}")

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
        if self._connection is not None and not self._connection.ssh.is_closed():
            return "connected"
        return "connecting" if self._connecting is not None and not self._connecting.done() else "closed"

    async def _run(
        self, connection: PooledConnection, request: "_Request", timeout: float, slot: Slot
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
            return CompletedCommand(None, "", "", f"the connection was lost: {format_error(error)}")
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

    async def _wait_closed(self, connection: PooledConnection, session: "_Session", timeout: float) -> None:
        """Wait until a session is closed: until then it counts against sshd's limit."""
        try:
            async with asyncio.timeout(timeout + KILL_DELAY + ANSWER_GRACE):
                await session.closed.wait()
        except TimeoutError:
            self._drop(connection)

    async def connection(self) -> asyncssh.SSHClientConnection:
        """Return the connection, after opening it if needed; callers share one attempt. Raises ShellError."""
        return (await self._connected(CONNECT_TIMEOUT)).ssh

    async def _connected(self, within: float) -> PooledConnection:
        if self._connection is not None and self._connection.is_usable:
            return self._connection
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._establish())
            self._connecting.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(max(within, 0.0)):
                return await asyncio.shield(self._connecting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._connecting.cancelled() and not (task and task.cancelling()):  # the shell was closed, not this call
                raise ShellError(f"{self._login.address}: the shell was closed") from None
            raise
        except TimeoutError:
            raise ShellError(f"{self._login.address}: no SSH connection within {within:.3g} s") from None

    async def _establish(self) -> PooledConnection:
        """Connect for later callers too: the first ones may have stopped waiting."""
        self._connection = PooledConnection(await self._connect())
        return self._connection

    async def _connect(self) -> asyncssh.SSHClientConnection:
        login = self._login
        where = f"{login.address}:{login.port}"
        pins = Pins(())
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                known, bad = await asyncio.to_thread(read_known_hosts, login.known_hosts)
                pins = find_pins(known, login.address, login.port)
                if bad and self._on_bad_lines is not None:
                    self._on_bad_lines(login.known_hosts, bad)
                keys = await asyncio.to_thread(_read_keys, login)
                tunnel = await self._tunnel() if self._tunnel else Connector()
                return await asyncssh.connect(
                    login.address,
                    login.port,
                    username=login.user or (),
                    client_keys=keys,
                    known_hosts=pins.known_hosts,  # asyncssh would also search for the peer's IP address
                    x509_trusted_certs=[],  # by default those of ~/.ssh/ca-bundle.crt
                    x509_trusted_cert_paths=[],
                    config=None,
                    agent_path=None,
                    tunnel=tunnel,
                    client_factory=lambda: _Client(login.password),
                    password=login.password,
                    preferred_auth="publickey,password,keyboard-interactive" if login.password else "publickey",
                    **_select_algorithms(login, pins),
                    compression_algs=["none"],  # a few bytes from the host could expand to gigabytes
                    keepalive_interval=15,
                    keepalive_count_max=3,
                    login_timeout=CONNECT_TIMEOUT,
                )
        except TimeoutError:
            raise ShellError(f"{where}: no SSH connection within {CONNECT_TIMEOUT:g} s") from None
        except asyncssh.HostKeyNotVerifiable as error:
            problem = "HOST KEY CHANGED: the host's key is not the one" if pins else "the host's key is not"
            raise HostKeyError(f"{where}: {problem} pinned in {login.known_hosts}", changed=bool(pins)) from error
        except (asyncssh.PermissionDenied, asyncssh.KeyImportError) as error:
            raise LoginError(f"{where}: {format_error(error)}") from error
        except (asyncssh.Error, OSError, ValueError) as error:
            raise ShellError(f"{where}: {format_error(error)}") from error

    def _drop(self, connection: PooledConnection) -> None:
        """Stop using a connection; it is closed after its last session."""
        if self._connection is connection:
            self._connection = None
        connection.drop()
        self._dropped = {each for each in (*self._dropped, connection) if not each.ssh.is_closed()}

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        connections = {*self._dropped, *([self._connection] if self._connection else [])}
        self._connection = None
        for connection in connections:
            connection.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(connection.ssh.wait_closed() for connection in connections))


class _SessionRefusedError(Exception):
    """The server accepts no more sessions on the connection than it has."""


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
    connection: PooledConnection, request: _Request, tried: list[_Session]
) -> "tuple[asyncssh.SSHClientChannel[bytes], _Session]":
    """Start a command, with retries: sshd may not have cleaned up an earlier session yet.

    Every session that was started is added to `tried`. Raises _SessionRefusedError and asyncssh.ChannelOpenError.
    """

    def create_session() -> _Session:
        connection.has_accepted = True
        tried.append(_Session(request))
        return tried[-1]

    for pause in SESSION_RETRY_DELAYS:
        try:
            channel, _ = await connection.ssh.create_session(create_session, request.command, encoding=None)
        except asyncssh.ChannelOpenError:
            await asyncio.sleep(pause)
        else:
            return channel, tried[-1]
    try:
        channel, _ = await connection.ssh.create_session(create_session, request.command, encoding=None)
    except asyncssh.ChannelOpenError as error:
        if tried or not connection.has_accepted or not connection.is_usable:
            raise
        raise _SessionRefusedError from error
    return channel, tried[-1]


class _Client(asyncssh.SSHClient):
    """Answers the first hidden prompt of keyboard-interactive authentication with the password, and no other."""

    def __init__(self, password: str | None) -> None:
        self._password = password

    def kbdint_auth_requested(self) -> str | None:
        return "" if self._password is not None else None

    def kbdint_challenge_received(
        self,
        name: str,  # noqa: ARG002 - asyncssh's interface
        instructions: str,  # noqa: ARG002 - as above
        lang: str,  # noqa: ARG002 - as above
        prompts: Sequence[tuple[str, bool]],
    ) -> Sequence[str] | None:
        if not prompts:
            return []
        is_hidden = len(prompts) == 1 and not prompts[0][1]
        password, self._password = self._password, None
        return [password] if is_hidden and password is not None else None


def _select_algorithms(login: Login, pins: Pins) -> dict[str, list[str]]:
    algorithms = list_algorithms(legacy=login.legacy)
    if login.legacy:
        kinds = {name.decode() for key in (*pins.keys, *pins.keys_of_address) for name in key.sig_algorithms}
        host_keys = [name for name in LEGACY_ALGORITHMS if name in kinds]
        algorithms |= {"server_host_key_algs": host_keys} if host_keys and not pins.authorities else {}
        algorithms["signature_algs"] = [*LEGACY_ALGORITHMS]
    return algorithms


def _read_keys(login: Login) -> list[Any]:
    """Return the client's own key, before it with its certificate. Raises OSError and asyncssh.KeyImportError."""
    if login.key_file is None:
        return []
    try:
        key = asyncssh.read_private_key(str(login.key_file), login.passphrase)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        is_about_passphrase = any(word in str(error) for word in ("assphrase", "decrypt"))
        reason = f"{error}; see ssh.passphrase" if is_about_passphrase else str(error)
        raise asyncssh.KeyImportError(f"{login.key_file}: {reason}") from error
    beside = login.key_file.with_name(f"{login.key_file.name}-cert.pub")
    path = login.certificate_file or (beside if beside.exists() else None)
    if path is None:
        return [key]
    try:
        return [(key, asyncssh.read_certificate(str(path))), key]
    except asyncssh.KeyImportError as error:
        raise asyncssh.KeyImportError(f"{path}: {error}") from error


def _retrieve(task: asyncio.Task[PooledConnection]) -> None:
    if not task.cancelled():
        task.exception()  # marks it as retrieved: there may be no caller left
