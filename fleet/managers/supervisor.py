"""What we know of supervisor: argv, and how its answers read."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fleet.host.sections import Section
from fleet.managers.guarded_scripts import ManagerMessages


def _program(name: str) -> str:
    group, colon, program = name.rpartition(":")
    parts = [group, program] if colon else [program]
    for part in parts:
        # `all` and `group:*` would mean more than one, and supervisorctl splits at blanks.
        if not part or part == "all" or part.startswith("-") or any(c.isspace() or c in ":*/[]" for c in part):
            raise ValueError("is not a program of supervisor (write name or group:name)")
    return name


ProgramName = Annotated[str, AfterValidator(_program)]


def _config(path: Path) -> Path:
    if not path.is_absolute() or any(character.isspace() or character == "," for character in str(path)):
        raise ValueError("is not the path of a configuration on the host (write /etc/supervisord.conf)")
    return path


ConfigPath = Annotated[Path, AfterValidator(_config)]


# supervisorctl 3 prints them with exit status 0. Anything may follow where something was done before.
MESSAGES = ManagerMessages(
    not_run=(
        r"unix:\S+ no such file", r"\S+ refused connection", r"Server requires authentication",
        r"error: <.*>, \[Errno (2|13|111)\] .*", r"error: <.*>, .*SHUTDOWN_STATE.*",
        r"error: <.*>, .* 401 Unauthorized.*",
        r"Sorry, supervisord responded but did not recognize .*", r"Error: .*",
    ),
    gone=(r"\S+: ERROR \(no such (process|group|process name)\)",),
    in_spite_of_success=True,
)  # fmt: skip


def build_action(name: str, program: str, config: Path | None) -> list[str]:
    """`supervisorctl start|stop|restart|status PROGRAM`."""
    return [*_supervisorctl(config), name, program]


def build_logs(program: str, config: Path | None, size: int) -> list[str]:
    """The last `size` bytes of what the program wrote."""
    return [*_supervisorctl(config), "tail", f"-{size}", program]


def _supervisorctl(config: Path | None) -> list[str]:
    return ["supervisorctl", *(["-c", str(config)] if config else [])]


def find_refusal(output: str) -> str | None:
    """The first refusal in the output of a verb; supervisorctl says some of them with exit status 0."""
    lines = (line.strip() for line in output.splitlines())
    return next((line for line in lines if "ERROR" in line and "(not running)" not in line), None)


def is_running(output: str) -> bool:
    """Whether `status` says that the program runs; STARTING and BACKOFF do not."""
    words = output.split()
    return len(words) > 1 and words[1] == "RUNNING"


CLOCK_COMMAND = ["date", "+%Y-%m-%dT%H:%M:%S"]


def parse_local_time(output: str) -> datetime | None:
    """What `CLOCK_COMMAND` printed: the host's time, in its own zone."""
    try:
        return datetime.fromisoformat(output.strip()).replace(tzinfo=None)
    except ValueError:
        return None


def parse_uptime(text: str) -> float | None:
    """Seconds of an uptime such as `1:02:03` or `2 days, 1:02:03`."""
    found = re.fullmatch(r"(?:([0-9]{1,6}) days?, )?([0-9]{1,6}):([0-9]{2}):([0-9]{2})", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def parse_seconds_since_end(description: str, now: datetime | None) -> float | None:
    """Seconds since the middle of the minute of a program's end, as supervisor tells of it: `Nov 29 12:31 AM`."""
    if now is None:
        return None
    try:
        at = datetime.strptime(f"{now.year} {description.strip()}", "%Y %b %d %I:%M %p")  # noqa: DTZ007 - as `now`
    except ValueError:
        return None
    if at > now:
        at = at.replace(year=now.year - 1)
    return max(0.0, (now - at).total_seconds() - 30)


SECTION_NAME = "supervisor"
SECTION_SCRIPT = """
for config; do
    echo "config: $config"
    case $config in -) supervisorctl status ;; *) supervisorctl -c "$config" status ;; esac
    case $? in 0 | 3) ;; *) echo "failed: $?" ;; esac
done
"""


def config_name(config: Path | None) -> str:
    """What stands for a supervisord: its configuration, or `-` for the one that supervisorctl finds itself."""
    return str(config or "-")


_NO_SUPERVISORD = re.compile(r"no such file|refused connection|^error: |Connection refused|HTTP error", re.IGNORECASE)


def build_section(config: Path | None) -> Section:
    """All programs of a supervisord; several are one section."""
    return Section(SECTION_NAME, SECTION_SCRIPT, (config_name(config),), rank=1)


@dataclass(slots=True)
class SupervisordStatus:
    """What one supervisord told: state and description of its programs by name, or why nothing."""

    programs: dict[str, tuple[str, str]] = field(default_factory=dict)
    failed: str = ""


def parse_status(output: str) -> dict[str, SupervisordStatus]:
    """What each supervisord told, by configuration file, from what a reading printed."""
    found: dict[str, SupervisordStatus] = {}
    here, last = SupervisordStatus(), ""
    for line in output.splitlines():
        if line.startswith("config: "):
            here = found[line.removeprefix("config: ")] = SupervisordStatus()
        elif line.startswith("failed: "):
            here.failed = last or f"supervisorctl ended with status {line.removeprefix('failed: ')}"
        else:
            name, state, description = (*line.split(None, 2), "", "", "")[:3]
            if state.isupper():
                here.programs[name] = (state, description)
            if not line.startswith("For help, use "):  # which follows what is wrong
                last = line.strip() or last
            # Its version 3 ends with status 0 where there is no supervisord, and says so in place of programs.
            if not here.programs and not here.failed and _NO_SUPERVISORD.search(line):
                here.failed = line.strip()
    return found
