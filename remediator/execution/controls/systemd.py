"""The `systemd` control: one unit."""

import re
from collections.abc import Mapping
from typing import ClassVar

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import systemd
from fleet.shells import CompletedCommand
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded

NOT_RUNNING = 3  # the exit status of `systemctl status`


class SystemdControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    needs_root: ClassVar[bool] = True  # unless a rule of polkit permits it
    verbs: ClassVar[frozenset[Verb]] = VERBS
    unit: systemd.UnitName

    @property
    def target(self) -> str:
        return f"systemd:{self.unit}"


async def run_systemd(verb: Verb, options: SystemdControlOptions, runner: ControlRunner) -> CompletedCommand:
    target = f"unit {options.unit}"
    if verb == "logs":
        return await runner.run(systemd.build_logs(options.unit, LOG_LINES))
    if verb != "status":
        return await runner.run_manager(systemd.build_action(verb, options.unit), target, systemd.MESSAGES)
    completed = await runner.run_manager(systemd.build_show(options.unit), target, systemd.MESSAGES)
    properties = systemd.parse_properties(completed.stdout)
    if properties.get("LoadState") == "not-found" and properties.get("ActiveState") == "inactive":
        raise runner.not_found(target)
    active, sub = properties.get("ActiveState", ""), properties.get("SubState", "")
    if succeeded(completed) and not systemd.is_active_state(active, sub):
        return CompletedCommand(NOT_RUNNING, completed.stdout, completed.stderr)
    return completed


async def read_systemd_state(options: SystemdControlOptions, runner: ControlRunner) -> TargetState | None:
    completed = await runner.run(systemd.build_show(options.unit))
    properties = systemd.parse_properties(completed.stdout)
    if not succeeded(completed):
        return None
    now = systemd.parse_uptime((await runner.run(systemd.UPTIME_COMMAND)).stdout)
    if "ActiveState" not in properties:
        return None
    active, sub = properties["ActiveState"], properties.get("SubState", "")
    age = _seconds_since(properties, "ExecMainStart", now) or _seconds_since(properties, "ActiveEnter", now)
    return TargetState(
        state=f"{active} ({sub}), result {properties.get('Result', '')}",
        started=properties.get("ExecMainStartTimestamp", ""),
        pid=_parse_number(properties.get("MainPID")) or None,
        restarts=_parse_number(properties.get("NRestarts")),
        exit_status=_parse_number(properties.get("ExecMainStatus")),
        out_of_memory=properties.get("Result") == "oom-kill",
        healing=f"systemd is starting it ({active}, {sub})" if active == "activating" else "",
        exited=active == "failed",  # `inactive` may be the normal end of a unit that only starts something
        age=age if active == "active" else None,
        withheld="it is masked (systemctl mask)" if systemd.is_masked(properties) else "",
        stopped=systemd.explain_manual_stop(properties),
        stopped_for=_seconds_since(properties, "InactiveEnter", now) if active == "inactive" else None,
    )


def _seconds_since(properties: Mapping[str, str], name: str, now: float | None) -> float | None:
    """Return the seconds since a timestamp property, by the host's clock; None if one of them is unknown."""
    at = systemd.parse_timestamp(properties, name)
    return None if at is None or now is None else max(0.0, now - at)


def _parse_number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,19}", text) else None


SYSTEMD = ControlKind(
    SystemdControlOptions, run_systemd, read_systemd_state,
    exited_at_start=r"^Job for \S+ failed because (the control process exited|a fatal signal)",
)  # fmt: skip
