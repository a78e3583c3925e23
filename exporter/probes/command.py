"""The `command` probe: a command on the service's host, judged by its exit status and output."""

from typing import Annotated, ClassVar

from pydantic import Field

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import EXAMINED, excerpt, lacks, matches
from exporter.results import ProbeFailure, Reason, Seen
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Patterns
from fleet.shells import ShellError

CANNOT_RUN = (126, 127)  # a shell's exit statuses of a program that may not be run, or is not there


class CommandExpect(ConfigModel):
    exit: int = Field(0, ge=0, le=255)
    stdout_matches: Patterns = []
    stdout_lacks: Patterns = []


Argument = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class CommandOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    needs_plain_shell: ClassVar[bool] = True
    run: Annotated[list[Argument], Field(min_length=1)]
    expect: CommandExpect = CommandExpect()


async def probe_command(options: CommandOptions, means: Means, seen: Seen) -> None:
    try:
        done = await means.shell().run(options.run, timeout=means.timeout)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    if done.status is None:
        raise ProbeFailure("timeout" if done.late else "shell", f"{options.run[0]}: {done.why}")
    seen.evidence.update(exit=done.status, stdout=done.stdout[:EXAMINED], stderr=done.stderr[:EXAMINED])
    expect = options.expect
    if done.status != expect.exit:
        reason: Reason = "shell" if done.status in CANNOT_RUN else "exit"
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        tail = f": {excerpt(said[-1].encode(), seen)}" if said else ""
        raise ProbeFailure(reason, f"{options.run[0]} exited {done.status}, expected {expect.exit}{tail}")
    text = done.stdout.rstrip("\n").encode()  # as $(…) has it, so that `$` means the end of the last line
    matches(expect.stdout_matches, text, "stdout", seen)
    lacks(expect.stdout_lacks, text, "stdout", seen)


COMMAND = Kind(CommandOptions, probe_command)
