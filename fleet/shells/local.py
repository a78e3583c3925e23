"""Commands as processes of our own."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from fleet.shells import KILL_AFTER, REST_WITHIN, Completed, Heard, Kept
from runtime.tasks import cancel

NOT_FOUND = 127
NOT_EXECUTABLE = 126


class LocalShell:
    """Runs commands on the machine that we run on.

    With `looking`, commands only look: at the deadline they are killed, and what they leave running ends with them.
    """

    wrapped = False

    def __init__(self, *, looking: bool = False) -> None:
        self._looking = looking

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", heard: Heard | None = None
    ) -> Completed:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError:
            return Completed(NOT_FOUND, "", f"{argv[0]}: not found")
        except (OSError, ValueError) as error:
            return Completed(NOT_EXECUTABLE, "", f"{argv[0]}: {getattr(error, 'strerror', None) or error}")
        assert process.stdout is not None  # noqa: S101 - asked for above
        assert process.stderr is not None  # noqa: S101
        out, err = Kept(heard), Kept()
        reading = [asyncio.create_task(_read(process.stdout, out)), asyncio.create_task(_read(process.stderr, err))]
        try:
            async with asyncio.timeout(timeout):
                if process.stdin:
                    await _feed(process.stdin, stdin)
                status = await process.wait()
            await asyncio.wait(reading, timeout=REST_WITHIN)
            return Completed(status, out.text, err.text)
        except TimeoutError:
            return Completed(None, out.text, err.text, f"it did not end within {timeout:g} s", late=True)
        finally:
            if self._looking:
                _kill(process)
            await _end(process)
            await cancel(reading)
            # What the command left running may hold our ends of its pipes open for as long as it runs.
            process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way

    async def close(self) -> None:
        """Nothing is held."""


async def _read(stream: asyncio.StreamReader, kept: Kept) -> None:
    while chunk := await stream.read(65536):
        kept.add(chunk)


async def _feed(writer: asyncio.StreamWriter, text: bytes) -> None:
    """Write all of the standard input, unless the command has ended without reading it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if not writer.transport.is_closing():
            writer.write(text)
            await writer.drain()
    writer.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End what is left of a command's process group, politely at first; whatever interrupts us, it is ended."""
    if process.returncode is not None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_AFTER):
                await process.wait()
    finally:
        _kill(process)
    await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
