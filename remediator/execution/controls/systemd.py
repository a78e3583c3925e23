"""The `systemd` control: one unit."""

import re
from collections.abc import Mapping
from typing import ClassVar

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import systemd
from fleet.shells import Completed
from remediator.execution.controls import Kind
from remediator.execution.controls.context import LOG_LINES, VERBS, Facts, Hands, Verb, good


class SystemdOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    unit: systemd.UnitName

    @property
    def target(self) -> str:
        return f"systemd:{self.unit}"


async def control_systemd(verb: Verb, options: SystemdOptions, hands: Hands) -> Completed:
    target = f"unit {options.unit}"
    if verb == "logs":
        return await hands.run(systemd.build_logs(options.unit, LOG_LINES))
    if verb != "status":
        return await hands.ask(systemd.build_action(verb, options.unit), target, systemd.MESSAGES)
    done = await hands.ask(systemd.build_show(options.unit), target, systemd.MESSAGES)
    told = systemd.parse_properties(done.stdout)
    if told.get("LoadState") == "not-found" and told.get("ActiveState") == "inactive":
        raise hands.gone(target)
    running = good(done) and told.get("ActiveState") in ("active", "reloading")
    return done if running or not good(done) else Completed(3, done.stdout, done.stderr)


async def facts_systemd(options: SystemdOptions, hands: Hands) -> Facts | None:
    done = await hands.run(systemd.build_show(options.unit))
    told = systemd.parse_properties(done.stdout)
    if not good(done):
        return None
    now = systemd.parse_uptime((await hands.run(systemd.UPTIME_COMMAND)).stdout)
    if "ActiveState" not in told:
        return None
    active, sub = told["ActiveState"], told.get("SubState", "")
    return Facts(
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


SYSTEMD = Kind(SystemdOptions, control_systemd, facts_systemd)
