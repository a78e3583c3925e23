"""The `supervisor` control: one program of supervisord."""

import re
from typing import ClassVar

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import supervisor
from fleet.shells import Completed
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import VERBS, ControlRunner, TargetState, Verb, succeeded

LOG_BYTES = 20_000


class SupervisorOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    program: supervisor.ProgramName
    config: supervisor.ConfigPath | None = None  # on the service's host

    @property
    def target(self) -> str:
        group, _, program = self.program.rpartition(":")
        # A program that is in no group is one of its own name.
        name = program if group in ("", program) else self.program
        return f"supervisor:{supervisor.config_name(self.config)}:{name}"


async def control_supervisor(verb: Verb, options: SupervisorOptions, runner: ControlRunner) -> Completed:
    target = f"program {options.program} in supervisor"
    if verb == "logs":
        # What a program has written is not judged by supervisor's words: its status is.
        await runner.run_manager(
            supervisor.build_action("status", options.program, options.config), target, supervisor.MESSAGES
        )
        return await runner.run(supervisor.build_logs(options.program, options.config, LOG_BYTES))
    done = await runner.run_manager(
        supervisor.build_action(verb, options.program, options.config), target, supervisor.MESSAGES
    )
    if verb == "status":
        return (
            done
            if supervisor.is_running(done.stdout) or not succeeded(done)
            else Completed(3, done.stdout, done.stderr)
        )
    refusal = supervisor.find_refusal(done.stdout)
    if succeeded(done) and refusal is not None:
        return Completed(1, done.stdout, done.stderr)
    return done


async def facts_supervisor(options: SupervisorOptions, runner: ControlRunner) -> TargetState | None:
    done = await runner.run(supervisor.build_action("status", options.program, options.config))
    now = supervisor.parse_local_time((await runner.run(supervisor.CLOCK_COMMAND)).stdout)
    _, state, description = (*done.stdout.split(None, 2), "", "", "")[:3]
    if not state.isupper():
        return None
    pid = re.search(r"\bpid (\d+)", description)
    uptime = re.search(r"\buptime (.+)", description)
    stopped = state == "STOPPED" and description.strip() != "Not started"
    return TargetState(
        state=state,
        started=f"{uptime[1].strip()} ago" if uptime else "",
        pid=int(pid[1]) if pid else None,
        healing=f"supervisor starts it itself ({state})" if state in ("STARTING", "BACKOFF") else "",
        age=supervisor.parse_uptime(uptime[1]) if uptime else None,
        stopped="supervisor was asked to stop it (STOPPED)" if stopped else "",
        stopped_for=supervisor.parse_seconds_since_end(description, now) if stopped else None,
    )


SUPERVISOR = ControlKind(SupervisorOptions, control_supervisor, facts_supervisor)
