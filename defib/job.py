"""Run a job: its output is passed on unchanged, with the end of it remembered, and signals go to the job."""

import contextlib
import os
import select
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, cast

TAIL_LIMIT = 10_000  # bytes of the output that are remembered
STDOUT, STDERR = 1, 2
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_OF_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # which a terminal sends to all processes in its foreground
_PART = 64 * 1024
_MOST_PARTS = 32  # that are read of what was written before the job has ended


@dataclass(frozen=True)
class EndedJob:
    """A job that has ended: its exit status as in shells, 128 + N after the signal N, and the end of its output."""

    exit_status: int
    output: bytes


class OutputTail:
    """The end of an output."""

    def __init__(self) -> None:
        self._tail, self._is_cut = bytearray(), False

    def add(self, part: bytes) -> None:
        self._tail += part
        if len(self._tail) > TAIL_LIMIT:
            self._is_cut = True
            del self._tail[:-TAIL_LIMIT]

    def read(self) -> bytes:
        """Return at most `TAIL_LIMIT` bytes; of an output that is longer, from the beginning of a line if there is one.

        Half a secret would not be recognized where secrets are masked.
        """
        begin = self._tail.find(b"\n", 0, -1) + 1 if self._is_cut else 0
        return bytes(self._tail[begin:])


class Job:
    """A command that runs in this process's place, as far as others can see."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []  # signals that came before the process was started
        self._tail = OutputTail()
        self._selector = selectors.PollSelector()  # which has no file

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command. Raises OSError."""
        _fill_standard_files()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise the exit status would be lost
        handle_signals(self._forward)
        # Into one file, through one pipe: in the order in which the job writes.
        stderr = subprocess.STDOUT if os.path.samestat(os.fstat(STDOUT), os.fstat(STDERR)) else subprocess.PIPE
        self._process = process = subprocess.Popen(
            command, bufsize=0, stdout=subprocess.PIPE, stderr=stderr, env=environment
        )
        for number in self._early:
            process.send_signal(number)
        for pipe, target in ((process.stdout, STDOUT), (process.stderr, STDERR)):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ, target)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if number in _OF_TERMINAL and _is_in_foreground():
            return  # the job has received it, too
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)

    def wait(self) -> EndedJob:
        """Pass the output on until the job has ended."""
        process = self._process
        assert process is not None  # noqa: S101 - it was started
        has_ended, ending = os.pipe()
        signals, waking = os.pipe()  # a signal just before the selector waits would not interrupt it
        for file in (signals, waking):
            os.set_blocking(file, False)

        def wait() -> None:
            process.wait()
            os.close(ending)

        threading.Thread(target=wait, daemon=True).start()
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        for file in (has_ended, signals):
            self._selector.register(file, selectors.EVENT_READ)
        while has_ended not in self._copy(None):
            with contextlib.suppress(BlockingIOError):
                os.read(signals, _PART)
        signal.set_wakeup_fd(-1)
        for file in (has_ended, signals):
            self._selector.unregister(file)
        for file in (has_ended, signals, waking):
            os.close(file)
        for _ in range(_MOST_PARTS):
            if not self._selector.get_map() or not self._selector.select(0):
                break
            self._copy(0)
        if self._selector.get_map():
            self._copy_in_background()
        status = process.returncode
        return EndedJob(status if status >= 0 else 128 - status, self._tail.read())

    def _copy(self, timeout: float | None) -> set[int]:
        """Pass on what can be read within some seconds; returns the files that can be read and are no output."""
        others = set()
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                others.add(key.fd)
            else:
                self._copy_part(cast("IO[bytes]", key.fileobj), key.data)
        return others

    def _copy_part(self, pipe: IO[bytes], target: int) -> None:
        part = os.read(pipe.fileno(), _PART)
        self._tail.add(part)
        try:
            _write(target, part)
        except OSError:  # nobody reads it: the job's next write fails, as it would without us
            part = b""
        if not part:
            self._selector.unregister(pipe)
            pipe.close()

    def _copy_in_background(self) -> None:
        """Leave the pipes to another process: what the job has started in the background may write to them for long."""
        if os.fork():
            return
        try:
            os.setsid()
            _close_others(pipe.fd for pipe in self._selector.get_map().values())
            while self._selector.get_map():
                self._copy(None)
        finally:
            os._exit(0)


def _write(target: int, part: bytes) -> None:
    """Write all of a part, also to a file that another program has made non-blocking. Raises OSError."""
    written = 0
    while written < len(part):
        try:
            written += os.write(target, part[written:])
        except BlockingIOError:
            room = select.poll()
            room.register(target, select.POLLOUT)
            room.poll()


def handle_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """Handle the signals that end a job, except those that are ignored, as with nohup."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _fill_standard_files() -> None:
    """Open /dev/null for those of stdin, stdout and stderr that are closed: a pipe would get their number."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(file, True)
    os.close(file)


def _close_others(files: Iterable[int]) -> None:
    """Close all files but these and the standard ones, such as connections that another thread had open."""
    first = STDERR + 1
    for file in sorted(files):
        os.closerange(first, file)
        first = file + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _is_in_foreground() -> bool:
    """Whether this process is one of those to which its terminal sends signals."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False  # it has no terminal
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
