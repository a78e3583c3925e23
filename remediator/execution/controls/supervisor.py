"""The `supervisor` control: one program of supervisord."""

import re
from typing import ClassVar

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import supervisor
from fleet.shells import CompletedCommand
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import VERBS, ControlRunner, TargetState, Verb, succeeded

LOG_BYTES = 20_000
NOT_RUNNING = 3  # the exit status of `supervisorctl status`


class SupervisorControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    program: supervisor.ProgramName
    config: supervisor.ConfigPath | None = None  # on the service's host

    @property
    def target(self) -> str:
        group, _, program = self.program.rpartition(":")
        # A program without a group is in a group of its own name.
        name = program if group in ("", program) else self.program
        return f"supervisor:{supervisor.config_name(self.config)}:{name}"


async def run_supervisor(verb: Verb, options: SupervisorControlOptions, runner: ControlRunner) -> CompletedCommand:
    target = f"program {options.program} in supervisor"
    if verb == "logs":
        # The log may contain messages of supervisor, so only the status shows whether the program exists.
        await runner.run_manager(
            supervisor.build_action("status", options.program, options.config), target, supervisor.MESSAGES
        )
        return await runner.run(supervisor.build_logs(options.program, options.config, LOG_BYTES))
    argv = supervisor.build_action(verb, options.program, options.config)
    completed = await runner.run_manager(argv, target, supervisor.MESSAGES)
    if not succeeded(completed):
        return completed
    if verb == "status":
        if supervisor.is_running(completed.stdout):
            return completed
        return CompletedCommand(NOT_RUNNING, completed.stdout, completed.stderr)
    # supervisorctl exits with 0 also if supervisord refuses.
    if supervisor.find_refusal(completed.stdout) is not None:
        return CompletedCommand(1, completed.stdout, completed.stderr)
    return completed


async def read_supervisor_state(options: SupervisorControlOptions, runner: ControlRunner) -> TargetState | None:
    completed = await runner.run(supervisor.build_action("status", options.program, options.config))
    now = supervisor.parse_local_time((await runner.run(supervisor.CLOCK_COMMAND)).stdout)
    _, state, description = (*completed.stdout.split(None, 2), "", "", "")[:3]
    if not state.isupper():
        return None
    pid = re.search(r"\bpid (\d+)", description)
    uptime = re.search(r"\buptime (.+)", description)
    is_stopped = state == "STOPPED" and description.strip() != "Not started"
    return TargetState(
        state=state,
        started=f"{uptime[1].strip()} ago" if uptime else "",
        pid=int(pid[1]) if pid else None,
        healing=f"supervisor is starting it ({state})" if state in ("STARTING", "BACKOFF") else "",
        exited=state in ("EXITED", "FATAL"),
        age=supervisor.parse_uptime(uptime[1]) if uptime else None,
        stopped="it was stopped with supervisorctl (STOPPED)" if is_stopped else "",
        stopped_for=supervisor.parse_seconds_since_end(description, now) if is_stopped else None,
    )


SUPERVISOR = ControlKind(
    SupervisorControlOptions, run_supervisor, read_supervisor_state,
    exited_at_start=r"^\S+: ERROR \((spawn error|abnormal termination)\)$",
)  # fmt: skip
