"""What changed on a host between two runs of a collector: containers, units, programs and GPUs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from exporter.exposition.collector_samples import AddedSample
from exporter.scheduler.events import EventKind

CHANGES_LIMIT = 100  # of one run: a host may report thousands
# By metric: what it is about, the label with its name, and the states for 0 and 1.
_STATES: Mapping[str, tuple[EventKind, str, tuple[str, str]]] = {
    "host_container_up": ("container", "container", ("down", "up")),
    "host_unit_active": ("unit", "unit", ("down", "up")),
    "host_program_running": ("program", "program", ("down", "up")),
    "gpu_healthy": ("gpu", "gpu", ("unhealthy", "healthy")),
}
_COUNT = "gpu_count"
States = Mapping[tuple[EventKind, str], str]


@dataclass(frozen=True)
class StateChange:
    """A change of one thing on a host. `first`: it was not there in the run before."""

    kind: EventKind
    name: str
    state: str
    detail: str = ""
    first: bool = False


def find_states(samples: Iterable[AddedSample]) -> States:
    """Return the state of everything that has one, by kind and name; the count of GPUs is of a GPU without a name."""
    states: dict[tuple[EventKind, str], str] = {}
    for metric, value, labels in samples:
        if metric in _STATES:
            kind, label, names = _STATES[metric]
            states[kind, labels[label]] = names[bool(value)]
        elif metric == _COUNT:
            states["gpu", ""] = f"{value:g}"
    return states


def list_changes(before: States, after: States) -> list[StateChange]:
    """Return the changes; beyond a limit, only how many more there are."""
    changes = list(_find_changes(before, after))
    if len(changes) <= CHANGES_LIMIT:
        return changes
    more = f"{len(changes) - CHANGES_LIMIT} further changes"
    return [*changes[:CHANGES_LIMIT], StateChange(changes[-1].kind, "", "changed", more)]


def _find_changes(before: States, after: States) -> Iterator[StateChange]:
    for (kind, name), state in after.items():
        known = before.get((kind, name))
        if known == state:
            continue
        if not name:
            if known is not None:
                yield StateChange(kind, "", "count_changed", f"{state}, before: {known}")
        else:
            yield StateChange(kind, name, state, first=known is None)
    for kind, name in before:
        if name and (kind, name) not in after:
            yield StateChange(kind, name, "gone")
