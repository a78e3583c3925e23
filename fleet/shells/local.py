"""Commands as processes of our own."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from fleet.shells import KILL_AFTER, REST_WITHIN, Completed, Tail, cancelled

NOT_FOUND = 127
NOT_EXECUTABLE = 126


class LocalShell:
    """Runs commands on the machine that we run on."""

    async def run(self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"") -> Completed:
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
        except OSError as error:
            return Completed(NOT_EXECUTABLE, "", f"{argv[0]}: {error.strerror}")
        assert process.stdout is not None  # noqa: S101 - asked for above
        assert process.stderr is not None  # noqa: S101
        tails = out, err = Tail(process.stdout), Tail(process.stderr)
        try:
            async with asyncio.timeout(timeout):
                if process.stdin:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        process.stdin.write(stdin)
                        await process.stdin.drain()
                    process.stdin.close()
                status = await process.wait()
            await asyncio.wait([tail.task for tail in tails], timeout=REST_WITHIN)
            return Completed(status, out.text, err.text)
        except TimeoutError:
            return Completed(None, out.text, err.text, f"it did not end within {timeout:g} s")
        finally:
            await _end(process)
            await cancelled(*tails)
            # What the command left running may hold our ends of its pipes open for as long as it runs.
            process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way

    async def close(self) -> None:
        """Nothing is held."""


async def _end(process: asyncio.subprocess.Process) -> None:
    """End what is left of the command's process group."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(KILL_AFTER):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
