"""The `command` probe: a command on the service's host, judged by its exit status and output."""

from typing import Annotated, ClassVar

from pydantic import Field

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.probes.expectations import EXAMINED, lacks, matches, quote_excerpt
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Part
from fleet.inventory.units import Patterns
from fleet.shells import ShellError

CANNOT_RUN = (126, 127)  # a shell's exit statuses of a program that may not be run, or is not there


class CommandExpect(Part):
    exit: int = Field(0, ge=0, le=255)
    stdout_matches: Patterns = []
    stdout_lacks: Patterns = []


Argument = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class CommandProbeOptions(Part):
    needs_host: ClassVar[bool] = True
    needs_plain_shell: ClassVar[bool] = True
    run: Annotated[list[Argument], Field(min_length=1)]
    expect: CommandExpect = CommandExpect()


async def probe_command(options: CommandProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    try:
        done = await context.shell().run(options.run, timeout=context.timeout)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    if done.status is None:
        raise ProbeFailure("timeout" if done.late else "shell", f"{options.run[0]}: {done.why}")
    details.evidence.update(exit=done.status, stdout=done.stdout[:EXAMINED], stderr=done.stderr[:EXAMINED])
    expect = options.expect
    if done.status != expect.exit:
        reason: FailureReason = "shell" if done.status in CANNOT_RUN else "exit"
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        tail = f": {quote_excerpt(said[-1].encode(), details)}" if said else ""
        raise ProbeFailure(reason, f"{options.run[0]} exited {done.status}, expected {expect.exit}{tail}")
    text = done.stdout.rstrip("\n").encode()  # as $(…) has it, so that `$` means the end of the last line
    matches(expect.stdout_matches, text, "stdout", details)
    lacks(expect.stdout_lacks, text, "stdout", details)


COMMAND = ProbeKind(CommandProbeOptions, probe_command)
