"""supervisor: command lines, and parsers of their output."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.sections import Section
from fleet.managers.guarded_scripts import ManagerMessages


def _check_program(name: str) -> str:
    group, colon, program = name.rpartition(":")
    parts = [group, program] if colon else [program]
    for part in parts:
        # `all` and `group:*` stand for several programs, and supervisorctl splits arguments at blanks.
        if not part or part == "all" or part.startswith("-") or any(c.isspace() or c in ":*/[]" for c in part):
            raise ValueError(f"{str(name)!r} is not the name of a program in supervisor; write name or group:name")
    return name


ProgramName = Annotated[str, AfterValidator(_check_program)]


def _check_config(path: Path) -> Path:
    if not path.is_absolute() or any(character.isspace() or character == "," for character in str(path)):
        raise ValueError(f"'{path}' is not an absolute path on the host; write /etc/supervisord.conf")
    return path


ConfigPath = Annotated[Path, AfterValidator(_check_config)]


# supervisorctl 3 prints these with exit status 0.
MESSAGES = ManagerMessages(
    not_run=(
        r"unix:\S+ no such file", r"\S+ refused connection", r"Server requires authentication",
        r"error: <.*>, \[Errno (2|13|111)\] .*", r"error: <.*>, .*SHUTDOWN_STATE.*",
        r"error: <.*>, .* 401 Unauthorized.*",
        r"Sorry, supervisord responded but did not recognize .*", r"Error: .*",
    ),
    gone=(r"\S+: ERROR \(no such (process|group|process name)\)",),
    even_with_status_0=True,
)  # fmt: skip


def build_action(name: str, program: str, config: Path | None) -> list[str]:
    """Return the argv of `supervisorctl start|stop|restart|status PROGRAM`."""
    return [*_supervisorctl(config), name, program]


def build_logs(program: str, config: Path | None, size: int) -> list[str]:
    """Return the argv that prints the last `size` bytes of the program's log."""
    return [*_supervisorctl(config), "tail", f"-{size}", program]


def _supervisorctl(config: Path | None) -> list[str]:
    return ["supervisorctl", *(["-c", str(config)] if config else [])]


def find_refusal(output: str) -> str | None:
    """Return the first error in the output of an action, or None; supervisorctl may print it with exit status 0."""
    lines = (line.strip() for line in output.split("\n"))
    return next((line for line in lines if "ERROR" in line and "(not running)" not in line), None)


def is_running(output: str) -> bool:
    """Whether the program is RUNNING, by the output of `status`."""
    words = output.split()
    return len(words) > 1 and words[1] == "RUNNING"


CLOCK_COMMAND = ["date", "+%Y-%m-%dT%H:%M:%S"]


def parse_local_time(output: str) -> datetime | None:
    """Parse the output of `CLOCK_COMMAND`: the host's local time, without a time zone."""
    try:
        return datetime.fromisoformat(output.strip()).replace(tzinfo=None)
    except ValueError:
        return None


def parse_uptime(text: str) -> float | None:
    """Return the seconds of an uptime such as `1:02:03` or `2 days, 1:02:03`."""
    found = re.fullmatch(r"(?:([0-9]{1,6}) days?, )?([0-9]{1,6}):([0-9]{2}):([0-9]{2})", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def parse_seconds_since_end(description: str, now: datetime | None) -> float | None:
    """Return the seconds since a program ended, of which supervisor has the minute: `Nov 29 12:31 AM`."""
    if now is None:
        return None
    try:
        at = datetime.strptime(f"{now.year} {description.strip()}", "%Y %b %d %I:%M %p")  # noqa: DTZ007 - local time, as `now`
    except ValueError:
        return None
    if at > now:
        at = at.replace(year=now.year - 1)
    return max(0.0, (now - at).total_seconds() - 30)


NOT_STARTED = "Not started"  # supervisor's description of a program that has not been started


def is_finished(state: str, description: str) -> bool:
    """Whether a program is meant not to run: it has exited as expected, or nothing has started it.

    supervisor restarts programs that exit otherwise, unless `autorestart` is `false`.
    """
    return state == "EXITED" or (state == "STOPPED" and description.strip() == NOT_STARTED)


SECTION_NAME = "supervisor"
# The wrapper adds the path that it has checked to each name, after a space.
SECTION_SCRIPT = """
for config; do
    path=${config#* } config=${config%% *}
    echo "config: $config"
    case $config in -) supervisorctl status ;; *) supervisorctl -c "$path" status ;; esac
    case $? in 0 | 3) ;; *) echo "failed: $?" ;; esac
done
"""


def config_name(config: Path | None) -> str:
    """Return the name of a supervisord: its configuration file, or `-` for supervisorctl's default."""
    return str(config or "-")


_NO_SUPERVISORD = re.compile(
    r"no such file|refused connection|^error: |Connection refused|HTTP error|requires authentication|did not recognize",
    re.IGNORECASE,
)


def build_section(config: Path | None) -> Section:
    """Return the section that reads all programs of a supervisord."""
    return Section(SECTION_NAME, SECTION_SCRIPT, (config_name(config),), rank=1)


@dataclass(slots=True)
class SupervisordStatus:
    """The programs of one supervisord, with state and description, or the error that it gave instead."""

    programs: dict[str, tuple[str, str]] = field(default_factory=dict)
    error: str = ""


def parse_supervisord_statuses(output: str) -> dict[str, SupervisordStatus]:
    """Parse a section's output: the status of each supervisord, by its configuration file."""
    by_config: dict[str, SupervisordStatus] = {}
    current, last = SupervisordStatus(), ""
    for line in output.split("\n"):
        if line.startswith("config: "):
            current = by_config[line.removeprefix("config: ")] = SupervisordStatus()
        elif line.startswith("failed: "):
            current.error = last or f"supervisorctl ended with status {line.removeprefix('failed: ')}"
        else:
            name, state, description = (*line.split(None, 2), "", "", "")[:3]
            if state.isupper():
                current.programs[name] = (state, description)
            if not line.startswith("For help, use "):  # a hint that follows an error
                last = line.strip() or last
            # Version 3 exits with status 0 even where it reaches no supervisord.
            if not current.programs and not current.error and _NO_SUPERVISORD.search(line):
                current.error = line.strip()
    return by_config
