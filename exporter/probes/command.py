"""The `command` probe: runs a command on the service's host and checks its exit status and output."""

from typing import Annotated, ClassVar

from pydantic import Field

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import EXAMINED, check_lacks, check_matches, quote_excerpt
from exporter.probes.values import TextValues, note_text_values
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.inventory.units import Patterns
from fleet.shells import ShellError

CANNOT_RUN = (126, 127)  # exit statuses of a POSIX shell: program not executable, program not found


class CommandExpect(ConfigModel):
    exit: int = Field(0, ge=0, le=255)
    stdout_matches: Patterns = []
    stdout_lacks: Patterns = []


Argument = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class CommandProbeOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    needs_plain_shell: ClassVar[bool] = True
    run: Annotated[list[Argument], Field(min_length=1), REFERENCES_ARE_SECRET]
    values: TextValues = Field(default_factory=dict)
    expect: CommandExpect = CommandExpect()


async def probe_command(options: CommandProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    try:
        completed = await context.shell().run(options.run, timeout=context.timeout)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    program = options.run[0]
    if completed.status is None:
        raise ProbeFailure("timeout" if completed.late else "shell", f"{program}: {completed.why}")
    details.evidence.update(
        exit=completed.status, stdout=completed.stdout[:EXAMINED], stderr=completed.stderr[:EXAMINED]
    )
    stdout = completed.stdout.rstrip("\n").encode()  # as in $(…), so that `$` matches the end of the last line
    note_text_values(options.values, stdout, details)
    expect = options.expect
    if completed.status != expect.exit:
        reason: FailureReason = "shell" if completed.status in CANNOT_RUN else "exit"
        _, _, shown = (completed.stderr.strip() or completed.stdout.strip()).rpartition("\n")
        last_line = f": {quote_excerpt(shown.encode(), details)}" if shown else ""
        raise ProbeFailure(
            reason, f"{program} exited with status {completed.status}, expected {expect.exit}{last_line}"
        )
    check_matches(expect.stdout_matches, stdout, "stdout", details)
    check_lacks(expect.stdout_lacks, stdout, "stdout", details)


COMMAND = ProbeKind(CommandProbeOptions, probe_command)
