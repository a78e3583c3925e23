"""The data of a report. Times are Unix times, durations seconds; what is unknown is None."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["availability", "gpus", "certificates", "disks", "incidents"]


@dataclass(frozen=True)
class Counts:
    """Incidents and restarts of a span, of one service or of several.

    An incident counts if it was open within the span, however long before that it began; `began` are those that began
    in it, and `open` those that were open at its end. `unobserved` are those of services that were removed meanwhile.
    The times to recover are those of incidents that ended in the span, from their beginning.
    """

    incidents: int = 0
    began: int = 0
    open: int = 0
    recovered_by: Mapping[str, int] = field(default_factory=dict)  # defib, person, self
    unobserved: int = 0
    person_needed: int = 0  # incidents in which a person was needed
    recovery_median: float | None = None
    recovery_longest: float | None = None
    restarts: int = 0
    restarts_helped: int = 0
    automatic_restarts: int = 0
    automatic_restarts_helped: int = 0


@dataclass(frozen=True)
class ServiceReport:
    id: str
    name: str
    team: str
    host: str
    removed: bool  # it is no longer in the inventory
    availability: float | None
    observed: float
    maintenance: float
    counts: Counts

    @property
    def down(self) -> float | None:
        """For how long the service was down; None if it was observed too shortly to say."""
        return None if self.availability is None or not self.observed else (1 - self.availability) * self.observed


@dataclass(frozen=True)
class TeamReport:
    """A team, or the services without one if `team` is empty.

    `observed` is the number of services whose availability is known; it is the one of these together.
    """

    team: str
    services: int
    observed: int
    availability: float | None
    counts: Counts


@dataclass(frozen=True)
class GpuUse:
    """What a container used of a host's GPUs while it had memory of them; `host` is what ran outside of containers."""

    host: str
    container: str
    gpus: int
    hours: float  # of all its GPUs together
    memory: float  # bytes, of all its GPUs together
    utilization: float | None


@dataclass(frozen=True)
class Certificate:
    service: str
    name: str
    expires: float


@dataclass(frozen=True)
class Disk:
    """A filesystem with a firing alert, or one that is full soon if it is filled as in the last days."""

    host: str
    mountpoint: str
    used: float | None  # ratio
    available: float | None  # bytes
    full_in: float | None
    alerts: Sequence[str]
    severity: str  # of the alerts, empty without one


@dataclass(frozen=True)
class Report:
    """What happened between two times, and what to watch after them.

    `missing` says by part why it is not known. The lists have the most important entries first; `omitted` is how many
    more there are. Incidents with other alerts than those of an outage, and those of services that an operator
    stopped, count only in `alerts_only` and `stopped`.
    """

    start: float
    end: float
    total: TeamReport
    teams: Sequence[TeamReport] = ()
    services: Sequence[ServiceReport] = ()
    alerts_only: int = 0
    stopped: int = 0
    gpu_count: int = 0
    gpu_utilization: float | None = None
    gpus: Sequence[GpuUse] = ()
    certificates: Sequence[Certificate] = ()
    disks: Sequence[Disk] = ()
    missing: Mapping[Part, str] = field(default_factory=dict)
    omitted: Mapping[str, int] = field(default_factory=dict)
