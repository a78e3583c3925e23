"""Which messages people get: the routing of `alerts/alertmanager.yml`, then the rules by which the remediator notifies.

Alertmanager, as it is shipped, groups nothing and mutes by its `inhibit_rules`: an alert that is muted when it begins is
sent when it no longer is, if it still fires. The remediator has one card for each incident of a service, and one for
each alert that is not to be acted on. While ExporterDown fires, and until Prometheus was seen to work afterwards, the
end of an alert is held: if it fires again in this time, it is the same alert.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from fleet.inventory.model import Inventory
from tests.simulated_week.evaluation import Episode

ALERTMANAGER = Path(__file__).parents[2] / "alerts" / "alertmanager.yml"
ALWAYS_FIRES = "Watchdog"
CONFIRMED_WITHIN = 2  # minutes after the end of ExporterDown until Prometheus was seen to work
HELD_BY = "ExporterDown"
_MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*("?)(.*?)\3\s*')
_TESTS: Mapping[str, Callable[[str, str], bool]] = {
    "=": lambda value, wanted: value == wanted,
    "!=": lambda value, wanted: value != wanted,
    "=~": lambda value, wanted: re.fullmatch(wanted, value) is not None,
    "!~": lambda value, wanted: re.fullmatch(wanted, value) is None,
}


@dataclass(frozen=True)
class Notification:
    """A new message at `minute` of the week."""

    minute: int
    labels: Mapping[str, str]

    @property
    def alert(self) -> str:
        return self.labels["alertname"]


def list_notifications(episodes: Sequence[Episode], inventory: Inventory) -> list[Notification]:
    """Return the messages about these alerts, oldest first."""
    own = [each for each in episodes if each.name != ALWAYS_FIRES]
    merged = _merge_held(own)
    sent = sorted(
        ((minute, each) for each in merged if (minute := _find_sent(each, merged)) is not None),
        key=lambda pair: pair[0],
    )
    return list(_without_open_incidents(sent, inventory))


def _merge_held(episodes: Sequence[Episode]) -> list[Episode]:
    """Join the episodes of an alert between which its end was held."""
    holds = [(each.begin, each.end + CONFIRMED_WITHIN) for each in episodes if each.name == HELD_BY]
    merged: list[Episode] = []
    for each in sorted(episodes, key=lambda each: (sorted(each.labels.items()), each.begin)):
        last = merged[-1] if merged else None
        if last is not None and last.labels == each.labels and each.name != HELD_BY and any(
            begin <= last.end <= end and each.begin <= end for begin, end in holds
        ):  # fmt: skip
            last.end = each.end
        else:
            merged.append(Episode(each.labels, each.begin, each.end))
    return merged


def _find_sent(episode: Episode, episodes: Sequence[Episode]) -> int | None:
    """Return the first minute in which the alert fires and is not muted; None if it always is."""
    mutes = [(each.begin, each.end) for each in episodes if _mutes(each.labels, episode.labels)]
    return next(
        (
            minute for minute in range(episode.begin, episode.end)
            if not any(begin <= minute < end for begin, end in mutes)
        ),
        None,
    )  # fmt: skip


def _mutes(source: Mapping[str, str], target: Mapping[str, str]) -> bool:
    if source == target:
        return False
    return any(
        all(_matches(matcher, source) for matcher in rule["source_matchers"])
        and all(_matches(matcher, target) for matcher in rule["target_matchers"])
        and all(source.get(name, "") == target.get(name, "") for name in rule["equal"])
        for rule in _inhibit_rules()
    )


@cache
def _inhibit_rules() -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]
    return found


def _matches(matcher: str, labels: Mapping[str, str]) -> bool:
    match = _MATCHER.fullmatch(matcher)
    assert match is not None, matcher
    name, operator, _, wanted = match.groups()
    return _TESTS[operator](labels.get(name, ""), wanted)


def _without_open_incidents(sent: Sequence[tuple[int, Episode]], inventory: Inventory) -> Iterator[Notification]:
    """Yield the messages; an alert to act on for which an incident is open changes the incident's card only.

    An incident is closed when the service has been up for `hold`.
    """
    open_until: dict[str, float] = {}
    for minute, episode in sent:
        service = inventory.services.get(episode.labels.get("service", ""))
        remediation = inventory.remediation.for_service(service)
        if service is not None and episode.name in remediation.alerts:
            is_open = minute < open_until.get(service.id, 0.0)
            open_until[service.id] = episode.end + remediation.hold / 60
            if is_open:
                continue
        yield Notification(minute, episode.labels)
