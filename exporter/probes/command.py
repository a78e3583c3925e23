"""The `command` probe: a command on the service's host, judged by its exit status and output."""

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from exporter.probes.matching import excerpt, lacks, matches
from exporter.results import ProbeFailure, Seen
from fleet.endpoints import Part
from fleet.shells import Shell, ShellError
from fleet.units import Patterns


class CommandExpect(Part):
    exit: int = Field(0, ge=0, le=255)
    stdout_matches: Patterns = []
    stdout_lacks: Patterns = []


class CommandOptions(Part):
    needs_host: ClassVar[bool] = True
    run: list[str] = Field(min_length=1)
    expect: CommandExpect = CommandExpect()


async def probe_command(options: CommandOptions, timeout: float, seen: Seen, shell: Callable[[], Shell]) -> None:
    try:
        done = await shell().run(options.run, timeout=timeout)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    if done.status is None:
        raise ProbeFailure("timeout" if "within" in done.why else "shell", f"{options.run[0]}: {done.why}")
    seen.evidence.update(exit=done.status, stdout=done.stdout[:1000], stderr=done.stderr[:1000])
    expect = options.expect
    if done.status != expect.exit:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        tail = f": {excerpt(said[-1].encode(), seen)}" if said else ""
        raise ProbeFailure("exit", f"{options.run[0]} exited {done.status}, expected {expect.exit}{tail}")
    text = done.stdout.rstrip("\n").encode()  # as $(…) has it, so that `$` means the end of the last line
    matches(expect.stdout_matches, text, "stdout", seen)
    lacks(expect.stdout_lacks, text, "stdout", seen)
