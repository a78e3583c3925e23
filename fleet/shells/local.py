"""Commands as local processes."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from fleet.shells import (
    KILL_DELAY,
    READ_LIMIT,
    TRAILING_OUTPUT_TIMEOUT,
    CommandNotRunError,
    CompletedCommand,
    OutputCallback,
)
from fleet.shells.proof import CommandMarkers, CommandOutputs, MarkedOutput, build_script
from runtime.environment import child_environment
from runtime.tasks import cancel_and_wait

NOT_FOUND = 127
NOT_EXECUTABLE = 126


class LocalShell:
    """Runs commands on this machine.

    With `read_only`, commands are killed at the deadline, or after `READ_LIMIT` bytes of output, together with the
    processes that they started. Otherwise those may keep running, and their output goes on being read when this program
    has ended.
    """

    wrapped = False

    def __init__(self, *, read_only: bool = False, environ: Mapping[str, str] | None = None) -> None:
        """With `environ`, commands receive these variables instead of those of `child_environment`."""
        self._read_only = read_only
        self._environ = environ

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> CompletedCommand:
        marks = None if self._read_only else CommandMarkers()
        text = build_script(argv, marks, timeout=None, keep_output=True, read_stdin=bool(stdin)) if marks else b""
        try:
            process = await self._start(["sh", "-c", text] if marks else argv, has_input=bool(stdin))
        except FileNotFoundError:
            return CompletedCommand(NOT_FOUND, "", f"{argv[0]}: not found")
        except (OSError, ValueError) as error:
            return CompletedCommand(NOT_EXECUTABLE, "", f"{argv[0]}: {getattr(error, 'strerror', None) or error}")
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        assert process.stderr is not None  # noqa: S101 - as above
        outputs = CommandOutputs(marks, on_output, READ_LIMIT if self._read_only else None)
        out, err = outputs.out, outputs.err
        reading = [
            asyncio.create_task(_read(process.stdout, out, outputs, process)),
            asyncio.create_task(_read(process.stderr, err, outputs, process)),
        ]
        try:
            async with asyncio.timeout(timeout):
                if process.stdin:
                    await _feed(process.stdin, stdin)
                status = await process.wait()
                if marks:  # other processes pass the output on, and may end later
                    await asyncio.wait(reading)
            await asyncio.wait(reading, timeout=TRAILING_OUTPUT_TIMEOUT)
            if not outputs.started:
                raise CommandNotRunError(f"sh did not run the command: {outputs.message}")
            return outputs.build_result(outputs.status_or(status))
        except TimeoutError:
            return CompletedCommand(None, out.text, err.text, f"timed out after {timeout:g} s", late=True)
        finally:
            try:
                if self._read_only:
                    _kill(process)
                await _end(process)
                await cancel_and_wait(reading)
            finally:  # also if this is cancelled again
                _close_pipes(process)

    async def _start(self, argv: Sequence[str | bytes], *, has_input: bool) -> asyncio.subprocess.Process:
        """Start a process. Raises OSError and ValueError. If this is cancelled, the process has ended afterwards."""
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE if has_input else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**(child_environment() if self._environ is None else self._environ), "LC_ALL": "C"},
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError, ValueError):
                process = await starting
                try:
                    await _end(process)
                finally:
                    _close_pipes(process)
            raise

    async def close(self) -> None:
        """Do nothing: there is no connection."""


async def _read(
    stream: asyncio.StreamReader, output: MarkedOutput, outputs: CommandOutputs, process: asyncio.subprocess.Process
) -> None:
    while output.status is None and not outputs.too_long and (chunk := await stream.read(65536)):
        output.add(chunk)
    if outputs.too_long:
        _kill(process)


async def _feed(writer: asyncio.StreamWriter, text: bytes) -> None:
    """Write stdin, unless the command ends without reading it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if not writer.transport.is_closing():
            writer.write(text)
            await writer.drain()
    writer.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the command's process group with SIGTERM, then SIGKILL, even where this is cancelled."""
    if process.returncode is not None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_DELAY):
                await process.wait()
    finally:
        _kill(process)
    await process.wait()


def _close_pipes(process: asyncio.subprocess.Process) -> None:
    """Close the pipes, which processes that the command left running would keep open."""
    process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
