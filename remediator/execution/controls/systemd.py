"""The `systemd` control: one unit."""

import re
from collections.abc import Mapping
from typing import ClassVar

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import systemd
from fleet.shells import Completed
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded


class SystemdOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    unit: systemd.UnitName

    @property
    def target(self) -> str:
        return f"systemd:{self.unit}"


async def control_systemd(verb: Verb, options: SystemdOptions, runner: ControlRunner) -> Completed:
    target = f"unit {options.unit}"
    if verb == "logs":
        return await runner.run(systemd.build_logs(options.unit, LOG_LINES))
    if verb != "status":
        return await runner.run_manager(systemd.build_action(verb, options.unit), target, systemd.MESSAGES)
    done = await runner.run_manager(systemd.build_show(options.unit), target, systemd.MESSAGES)
    told = systemd.parse_properties(done.stdout)
    if told.get("LoadState") == "not-found" and told.get("ActiveState") == "inactive":
        raise runner.not_found(target)
    running = succeeded(done) and told.get("ActiveState") in ("active", "reloading")
    return done if running or not succeeded(done) else Completed(3, done.stdout, done.stderr)


async def facts_systemd(options: SystemdOptions, runner: ControlRunner) -> TargetState | None:
    done = await runner.run(systemd.build_show(options.unit))
    told = systemd.parse_properties(done.stdout)
    if not succeeded(done):
        return None
    now = systemd.parse_uptime((await runner.run(systemd.UPTIME_COMMAND)).stdout)
    if "ActiveState" not in told:
        return None
    active, sub = told["ActiveState"], told.get("SubState", "")
    return TargetState(
        state=f"{active} ({sub}), result {told.get('Result', '')}",
        started=told.get("ExecMainStartTimestamp", ""),
        pid=_number(told.get("MainPID")) or None,
        restarts=_number(told.get("NRestarts")),
        exit_status=_number(told.get("ExecMainStatus")),
        out_of_memory=told.get("Result") == "oom-kill",
        healing=f"systemd starts it itself ({active}, {sub})" if active == "activating" else "",
        age=_since(told, "ExecMainStart", now) or _since(told, "ActiveEnter", now) if active == "active" else None,
        withheld="it is masked (systemctl mask)" if systemd.is_masked(told) else "",
        stopped=systemd.explain_manual_stop(told),
        stopped_for=_since(told, "InactiveEnter", now) if active == "inactive" else None,
    )


def _since(told: Mapping[str, str], name: str, now: float | None) -> float | None:
    at = systemd.parse_timestamp(told, name)
    return None if at is None or now is None else max(0.0, now - at)


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,19}", text) else None


SYSTEMD = ControlKind(SystemdOptions, control_systemd, facts_systemd)
