"""What a probe has besides its own options."""

from collections.abc import Callable
from dataclasses import dataclass

from fleet.host.sections import HostReading
from fleet.shells import Shell


@dataclass(frozen=True, slots=True)
class Means:
    """The service's and its host's name, the seconds until the deadline, and ways to ask the host.

    `shell` and `reading` raise ShellError.
    """

    service: str
    host: str
    timeout: float
    shell: Callable[[], Shell]
    reading: Callable[[], HostReading]
