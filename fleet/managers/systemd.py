"""systemd: command lines, and parsers of their output."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.sections import Section
from fleet.managers.guarded_scripts import ManagerMessages, build_script, echo_to_stderr, quote_command

_SUFFIXES = ("service", "socket", "timer", "mount", "automount", "swap", "target", "path", "slice", "scope", "device")
# systemctl expands *, ? and [ itself.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,200}")


def _check_unit(name: str) -> str:
    if _NAME.fullmatch(name) is None or name.endswith("@") or "@." in name:
        raise ValueError(f"{str(name)!r} is not the name of a systemd unit; write name.service or name")
    return name if name.rpartition(".")[2] in _SUFFIXES else f"{name}.service"


UnitName = Annotated[str, AfterValidator(_check_unit)]


_DOWN = ("inactive", "failed", "activating", "deactivating", "maintenance")  # values of ActiveState
_DOWN_SUBSTATES = ("dead", "failed")


def is_active_state(active: str, sub: str) -> bool:
    """Whether a unit serves: `active`, `reloading`, `refreshing`, or a state that later versions of systemd add.

    Those before were variants of `active`; a unit of such a state is down if its substate says so.
    """
    return active not in ("", *_DOWN) and (active == "active" or sub not in _DOWN_SUBSTATES)


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """A unit's state, from `systemctl show`."""

    load: str
    active: str
    sub: str
    result: str
    type: str = ""
    restarts: str = ""

    @property
    def is_active(self) -> bool:
        return is_active_state(self.active, self.sub)

    @property
    def is_running_once(self) -> bool:
        """Whether the unit is of the type oneshot, and its command is running."""
        return self.type == "oneshot" and self.active == "activating"

    @property
    def is_finished(self) -> bool:
        """Whether the unit is of the type oneshot, and its command has succeeded, or has not run since boot."""
        return self.type == "oneshot" and self.active == "inactive" and self.result == "success"


_SHOW = ["systemctl", "show", "--no-pager"]  # a pager on a terminal would run commands as root
MESSAGES = ManagerMessages(
    not_run=(
        r"System has not been booted with systemd .*", r"Failed to (connect to|get D-Bus connection).*",
        r"Failed to (start|stop|restart) .*: (Access denied|Interactive authentication required|Unit .* is masked)\.?",
    ),
    gone=(r"the unit .*: .*LoadState=not-found.*", r"Failed to (start|stop|restart) .*: Unit .* not (loaded|found)\.?"),
)  # fmt: skip


def build_action(name: str, unit: str) -> list[str]:
    """Return the argv of `systemctl start|stop|restart UNIT`, for a unit that exists under this name or alias.

    Its failure counter is reset first: systemd refuses to start a unit that was started too often.
    """
    show = quote_command([*_SHOW, "--property=Names,LoadState,ActiveState", "--", unit])
    refuse = f"{{ {echo_to_stderr(f'the unit {unit}: $seen')}; halt; }}"
    check_word = (
        'if test "$word" = "$unit" || test "$word" = "Names=$unit"; then named=yes; fi; '
        'if test "$word" = LoadState=loaded; then loaded=yes; fi'
    )
    steps = [
        f"seen=$({show}) || halt", "seen=$(echo $seen)", f"unit={quote_command([unit])} named= loaded=",
        f"for word in $seen; do {check_word}; done", f'test "$named" = yes || {refuse}',
    ]  # fmt: skip
    if name != "stop":  # a unit without its file may still run
        steps.append(f'test "$loaded" = yes || {refuse}')
        steps.append(f"{quote_command(['systemctl', 'reset-failed', '--', unit])} >/dev/null 2>&1")
    return build_script(*steps, f"exec {quote_command(['systemctl', name, '--', unit])}")


def build_logs(unit: str, lines: int) -> list[str]:
    return ["journalctl", "--no-pager", "--output=short-iso", f"--lines={lines}", f"--unit={unit}"]


_PROPERTIES = (
    "LoadState,ActiveState,SubState,Result,MainPID,NRestarts,ExecMainStatus,ExecMainStartTimestamp,Restart,WantedBy,RequiredBy"
    ",ActiveEnterTimestampMonotonic,InactiveEnterTimestampMonotonic,ExecMainStartTimestampMonotonic"
)
UPTIME_COMMAND = ["cat", "/proc/uptime"]  # the clock of the monotonic timestamps, unless the machine was suspended


def build_show(unit: str) -> list[str]:
    """Return the argv that prints what `parse_properties` reads."""
    return [*_SHOW, f"--property={_PROPERTIES}", "--", unit]


def parse_properties(output: str) -> dict[str, str]:
    """Parse the output of `systemctl show`: properties by name."""
    return dict(line.split("=", 1) for line in output.split("\n") if "=" in line)


def parse_uptime(output: str) -> float | None:
    """Parse the output of `UPTIME_COMMAND`: seconds since boot."""
    words = output.split()
    try:
        return float(words[0]) if words else None
    except ValueError:
        return None


def parse_timestamp(properties: Mapping[str, str], name: str) -> float | None:
    """Return a monotonic timestamp in seconds since boot; None where it has not happened since."""
    text = properties.get(f"{name}TimestampMonotonic", "")
    return int(text) / 1e6 if re.fullmatch("[0-9]{1,19}", text) and int(text) > 0 else None


def is_masked(properties: Mapping[str, str]) -> bool:
    return properties.get("LoadState") == "masked"


def explain_manual_stop(properties: Mapping[str, str]) -> str:
    """Return why a unit that does not run was stopped on purpose; empty where it was not, or where that is unknown.

    systemd does not record manual stops. But with `Restart=always` or `on-success` it restarts a unit that exits
    successfully: where such a unit has run, is inactive and has not failed, somebody stopped it. systemd forgets that
    a unit has run when it unloads it, which it does where no other unit wants it; an enabled unit is wanted.
    """
    succeeded = properties.get("ActiveState") == "inactive" and properties.get("Result") == "success"
    restart = properties.get("Restart")
    if is_masked(properties) or not succeeded or restart not in ("always", "on-success"):
        return ""
    if parse_timestamp(properties, "InactiveEnter") is not None:
        return f"it was stopped (systemctl stop): systemd would have restarted it otherwise (Restart={restart})"
    if properties.get("WantedBy") or properties.get("RequiredBy"):
        return ""  # it has not run since boot
    return "it was stopped, or never started: no unit wants it (systemctl enable)"


SECTION_NAME = "systemd"
SECTION_SCRIPT = """
for unit; do
    echo "unit: $unit"
    systemctl show --no-pager --property=LoadState,ActiveState,SubState,Result,Type,NRestarts -- "$unit"
done
"""


def build_section(*units: str) -> Section:
    """Return the section that reads these units."""
    return Section(SECTION_NAME, SECTION_SCRIPT, units, rank=2)


def parse_units(output: str) -> dict[str, UnitStatus | str]:
    """Parse a section's output: units by name, or systemd's message where it printed no state."""
    found: dict[str, UnitStatus | str] = {}
    for block in f"\n{output}".split("\nunit: ")[1:]:
        name, _, rest = block.partition("\n")
        values = parse_properties(rest)
        if "ActiveState" in values:
            names = ("LoadState", "ActiveState", "SubState", "Result", "Type", "NRestarts")
            found[name.strip()] = UnitStatus(*(values.get(each, "") for each in names))
        else:
            found[name.strip()] = rest.strip() or "no output"
    return found


FAILED_SECTION = Section("failed-units", "systemctl list-units --state=failed --plain --no-legend --no-pager", rank=2)


def parse_failed_units(output: str) -> list[str]:
    """Parse the output of `FAILED_SECTION`: the names of failed units."""
    return [words[0] for line in output.split("\n") if len(words := line.split()) > 3]  # noqa: PLR2004 - unit, load, active, sub
