"""The context of a probe: what it receives besides its own options."""

from collections.abc import Callable
from dataclasses import dataclass

from fleet.host.reading import Reading
from fleet.shells import Shell


@dataclass(frozen=True, slots=True)
class ProbeContext:
    """The names of the service and its host, the timeout in seconds, and access to the host.

    `shell` and `reading` raise ShellError.
    """

    service: str
    host: str
    timeout: float
    shell: Callable[[], Shell]
    reading: Callable[[], Reading]
