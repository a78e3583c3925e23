"""What we know of systemd: what to ask, and how its answers read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.sections import Section
from fleet.managers.guarded_scripts import ManagerMessages, build_script, echo_to_stderr, quote_command

_SUFFIXES = ("service", "socket", "timer", "mount", "automount", "swap", "target", "path", "slice", "scope", "device")
# systemctl would expand *, ? and [ itself.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,200}")


def _unit(name: str) -> str:
    if _NAME.fullmatch(name) is None or name.endswith("@") or "@." in name:
        raise ValueError("is not a unit of systemd (write name.service, or name)")
    return name if name.rpartition(".")[2] in _SUFFIXES else f"{name}.service"


UnitName = Annotated[str, AfterValidator(_unit)]


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """A unit as `systemctl show` tells of it."""

    load: str
    active: str
    sub: str
    result: str

    @property
    def is_active(self) -> bool:
        return self.active in ("active", "reloading")


MESSAGES = ManagerMessages(
    not_run=(
        r"System has not been booted with systemd .*", r"Failed to (connect to|get D-Bus connection).*",
        r"Failed to (start|stop|restart) .*: (Access denied|Interactive authentication required|Unit .* is masked)\.?",
    ),
    gone=(r"the unit .*: .*LoadState=not-found.*", r"Failed to (start|stop|restart) .*: Unit .* not (loaded|found)\.?"),
)  # fmt: skip


def build_action(name: str, unit: str) -> list[str]:
    """`systemctl start|stop|restart UNIT` of a unit that is there, perhaps by an alias.

    What was started too often is not started by systemd, by anybody, until its failures are forgotten.
    """
    look = quote_command(["systemctl", "show", "--property=Names,LoadState,ActiveState", "--", unit])
    refuse = f"{{ {echo_to_stderr(f'the unit {unit}: $seen')}; halt; }}"
    notice = (
        'if test "$word" = "$unit" || test "$word" = "Names=$unit"; then named=yes; fi; '
        'if test "$word" = LoadState=loaded; then loaded=yes; fi'
    )
    steps = [
        f"seen=$({look}) || halt", "seen=$(echo $seen)", f"unit={quote_command([unit])} named= loaded=",
        f"for word in $seen; do {notice}; done", f'test "$named" = yes || {refuse}',
    ]  # fmt: skip
    if name != "stop":  # what has lost its file may still run
        steps.append(f'test "$loaded" = yes || {refuse}')
        steps.append(f"{quote_command(['systemctl', 'reset-failed', '--', unit])} >/dev/null 2>&1")
    return build_script(*steps, f"exec {quote_command(['systemctl', name, '--', unit])}")


def build_logs(unit: str, lines: int) -> list[str]:
    return ["journalctl", "--no-pager", "--output=short-iso", f"--lines={lines}", f"--unit={unit}"]


_FACTS = (
    "LoadState,ActiveState,SubState,Result,MainPID,NRestarts,ExecMainStatus,ExecMainStartTimestamp,Restart,WantedBy,RequiredBy"
    ",ActiveEnterTimestampMonotonic,InactiveEnterTimestampMonotonic,ExecMainStartTimestampMonotonic"
)
UPTIME_COMMAND = ["cat", "/proc/uptime"]  # the clock of the monotonic timestamps, on a machine that never sleeps


def build_show(unit: str) -> list[str]:
    """Asks for what `parse_properties` reads."""
    return ["systemctl", "show", f"--property={_FACTS}", "--", unit]


def parse_properties(output: str) -> dict[str, str]:
    """Properties by name, from what `systemctl show` printed."""
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


def parse_uptime(output: str) -> float | None:
    """What `UPTIME_COMMAND` printed first: seconds since the host's start."""
    words = output.split()
    try:
        return float(words[0]) if words else None
    except ValueError:
        return None


def parse_timestamp(told: Mapping[str, str], name: str) -> float | None:
    """A monotonic timestamp in seconds; None of what has not happened since the host's start."""
    text = told.get(f"{name}TimestampMonotonic", "")
    return int(text) / 1e6 if re.fullmatch("[0-9]{1,19}", text) and int(text) > 0 else None


def is_masked(told: Mapping[str, str]) -> bool:
    return told.get("LoadState") == "masked"


def explain_manual_stop(told: Mapping[str, str]) -> str:
    """Why a unit that does not run was stopped on purpose, or nothing.

    systemd does not record that somebody stopped a unit. It restarts one that has ended well where `Restart=` is
    `always` or `on-success`: such a unit that has run, is inactive, and has not failed, was stopped. It forgets that a
    unit has run when it unloads it, which it does where no other unit wants it; what is enabled is wanted.
    """
    ended_well = told.get("ActiveState") == "inactive" and told.get("Result") == "success"
    restarted = told.get("Restart") in ("always", "on-success")
    if is_masked(told) or not ended_well or not restarted:
        return ""
    if parse_timestamp(told, "InactiveEnter") is not None:
        return f"it was stopped (systemctl stop): systemd would have restarted it otherwise (Restart={told['Restart']})"
    if told.get("WantedBy") or told.get("RequiredBy"):
        return ""  # it has not run since the host's start
    return "it was stopped, or never started: no unit wants it (systemctl enable)"


SECTION_NAME = "systemd"
SECTION_SCRIPT = """
for unit; do
    echo "unit: $unit"
    systemctl show --property=LoadState,ActiveState,SubState,Result -- "$unit"
done
"""


def build_section(*units: str) -> Section:
    """These units; several such are one section."""
    return Section(SECTION_NAME, SECTION_SCRIPT, units, rank=2)


def parse_units(output: str) -> dict[str, UnitStatus | str]:
    """Units by name, from what a reading printed; of one that systemd did not tell of, what it said instead."""
    found: dict[str, UnitStatus | str] = {}
    for block in output.split("unit: ")[1:]:
        name, _, rest = block.partition("\n")
        of = parse_properties(rest)
        if "ActiveState" in of:
            found[name.strip()] = UnitStatus(
                of.get("LoadState", ""), of["ActiveState"], of.get("SubState", ""), of.get("Result", "")
            )
        else:
            found[name.strip()] = rest.strip() or "it said nothing"
    return found


FAILED_SECTION = Section("failed-units", "systemctl list-units --state=failed --plain --no-legend --no-pager", rank=2)


def parse_failed_units(output: str) -> list[str]:
    """The units that have failed, from what `FAILED_SECTION` printed."""
    return [words[0] for line in output.splitlines() if len(words := line.split()) > 3]  # noqa: PLR2004 - unit, load, active, sub
