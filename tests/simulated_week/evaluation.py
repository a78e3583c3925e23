"""The rules of `alerts/rules` over the week: recorded series, and when alerts fire.

Every expression is evaluated by `query_range`, at each minute or at the interval of its group, if that is longer.
`for` is applied here. A rule that uses its own past, a recorded series or ALERTS, is evaluated twice: without a past,
and with one that always was. Where only the second has a result, the rule depends on what it gave before.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import yaml

from fleet.inventory.units import parse_duration
from tests.metric_names import RULES, metrics_in
from tests.simulated_week.events import MINUTES, START
from tests.simulated_week.scrapes import Scrapes
from tests.simulated_week.store import Labels, Store, as_labels, with_markers

LOOKBACK = 5  # minutes: of Prometheus, and of the rules that use their own past
ALWAYS = 7.125e77  # the value of a past that always was
_OWN_PAST = re.compile(r"last_over_time\(ALERTS\{[^}]*\}\[5m\]\)")
Points = dict[int, float]  # value by minute


@dataclass(frozen=True)
class Rule:
    """An alerting or a recording rule, evaluated every `step` minutes."""

    name: str
    expression: str
    step: int
    is_alert: bool
    labels: Mapping[str, str]
    pending: float = 0.0  # seconds
    keeps_firing: float = 0.0

    @cached_property
    def uses(self) -> frozenset[str]:
        """The names of metrics and recorded series in the expression."""
        return frozenset(metrics_in(self.expression))

    @property
    def minutes(self) -> range:
        return range(0, MINUTES, self.step)


@dataclass
class Episode:
    """The time in which an alert fires, minutes since the week began; `end` is the first minute after it."""

    labels: Mapping[str, str]
    begin: int
    end: int

    @property
    def name(self) -> str:
        return self.labels["alertname"]


def read_rules() -> list[Rule]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [_read_rule(rule, group) for group in groups for rule in group["rules"]]


def _read_rule(rule: Mapping[str, Any], group: Mapping[str, Any]) -> Rule:
    step = max(1, round(parse_duration(group.get("interval", "15s")) / 60))
    return Rule(
        rule.get("alert") or rule["record"], rule["expr"], step, "alert" in rule, rule.get("labels", {}),
        *(parse_duration(rule[key]) if key in rule else 0.0 for key in ("for", "keep_firing_for")),
    )  # fmt: skip


def select_needed(rules: Sequence[Rule]) -> list[list[Rule]]:
    """Return the alerts, last, and before them the recorded series that they need, after those that these need.

    The rules of one list do not need each other.
    """
    recorded = [rule for rule in rules if not rule.is_alert]
    alerts = [rule for rule in rules if rule.is_alert]
    needed = frozenset[str]()
    while (
        more := needed.union(*(rule.uses for rule in (*alerts, *(r for r in recorded if r.name in needed))))
    ) != needed:
        needed = more
    left = [rule for rule in recorded if rule.name in needed]
    steps = []
    while left:
        names = {rule.name for rule in left}
        step = [rule for rule in left if not (rule.uses - {rule.name}) & names]
        assert step, f"{sorted(names)} need each other"
        steps.append(step)
        left = [rule for rule in left if rule not in step]
    return [*steps, alerts]


def list_scraped(rules: Iterable[Rule]) -> frozenset[str]:
    """Return the metrics that these rules need, without recorded series."""
    rules = list(rules)
    recorded = {rule.name for rule in rules if not rule.is_alert}
    return frozenset().union(*(rule.uses for rule in rules)) - recorded - {"ALERTS"}


class Evaluation:
    def __init__(self, store: Store, scrapes: Scrapes) -> None:
        self._store, self._scrapes = store, scrapes
        self._writes = Lock()
        # By alert: how many minutes one was active at most without firing, and how many it waits.
        self.nearly: dict[str, tuple[int, int]] = {}

    def record(self, rule: Rule) -> None:
        """Evaluate a recording rule, and write its series."""
        series = self._query_with_past(rule) if rule.name in rule.uses else self._query(rule.expression, rule)
        times = [self._scrapes.times[minute] for minute in rule.minutes]
        running = [self._scrapes.is_running[minute] for minute in rule.minutes]
        with self._writes:
            for labels, points in series.items():
                values = [
                    points.get(minute) if seen else None for minute, seen in zip(rule.minutes, running, strict=True)
                ]
                named = as_labels(rule.name, dict(labels) | dict(rule.labels))
                self._store.add(named, *with_markers(times, values, running))
            self._store.flush()

    def list_episodes(self, rule: Rule) -> list[Episode]:
        """Evaluate an alert, and return when it fires."""
        past = _OWN_PAST.search(rule.expression)
        first = _OWN_PAST.sub("absent_past", rule.expression)
        is_own = past is None or f'alertname="{rule.name}"' in past[0]
        uses_others = not is_own or "ALERTS" in first
        assert not uses_others, f"{rule.name} uses other alerts, which are not evaluated before it"
        without = self._query(first, rule)
        always: Mapping[Labels, Points] = {}
        if past and without:
            firing = {**rule.labels, "alertname": rule.name, "alertstate": "firing"}
            self._write_always([as_labels("ALERTS", dict(labels) | firing) for labels in without])
            always = self._query(rule.expression, rule)
        is_pending_enough = past is not None and "alertstate" not in past[0]
        return [
            episode
            for labels, points in without.items()
            for own in [{**dict(labels), **rule.labels, "alertname": rule.name}]
            for episode in self._find_episodes(rule, own, points, always.get(labels, {}), is_pending_enough)
        ]

    def _find_episodes(
        self, rule: Rule, labels: Mapping[str, str], points: Points, always: Points, is_pending_enough: bool
    ) -> Iterator[Episode]:
        """Yield the episodes of one alert. `always` has its points if it was active (or firing) before."""
        active_since: int | None = None
        last_active, episode = 0, None
        last_shown: int | None = None  # when its own past was last seen
        for minute in rule.minutes:
            if not self._scrapes.is_running[minute]:
                continue
            has_past = last_shown is not None and minute - last_shown <= LOOKBACK
            if minute in points or (has_past and minute in always):
                active_since = minute if active_since is None else active_since
                last_active = minute
            elif episode is None or (minute - last_active) * 60 >= rule.keeps_firing:
                if episode is not None:
                    episode.end = minute
                    yield episode
                elif active_since is not None:
                    self._note_nearly(rule, last_active - active_since)
                active_since, episode = None, None
                continue
            if episode is None and active_since is not None and (minute - active_since) * 60 >= rule.pending:
                episode = Episode(labels, minute, MINUTES)
            if episode is not None or is_pending_enough:
                last_shown = minute
        if episode is not None:
            yield episode

    def _note_nearly(self, rule: Rule, minutes: int) -> None:
        longest, _ = self.nearly.get(rule.name, (0, 0))
        if minutes > longest or rule.name not in self.nearly:
            self.nearly[rule.name] = minutes, round(rule.pending / 60)

    def _write_always(self, series: Iterable[Labels]) -> None:
        with self._writes:
            for labels in series:
                self._store.add(labels, self._scrapes.times, [ALWAYS] * MINUTES)
            self._store.flush()

    def _query_with_past(self, rule: Rule) -> dict[Labels, Points]:
        own_name = re.compile(rf"(?<![\w:]){re.escape(rule.name)}(?![\w:])")
        past = f"always:{rule.name}"
        without = self._query(own_name.sub("absent_past", rule.expression), rule)
        self._write_always([as_labels(past, dict(labels)) for labels in without])
        always = self._query(own_name.sub(past, rule.expression), rule)
        ignores_markers = f"last_over_time({rule.name}[" in rule.expression
        return {
            labels: self._continue(rule, without[labels], points, ignores_markers)
            for labels, points in always.items() if labels in without
        }  # fmt: skip

    def _continue(self, rule: Rule, without: Points, always: Points, ignores_markers: bool) -> Points:
        """Return the points of a series in which a value of its past is the one before it."""
        found: Points = {}
        last: int | None = None
        for minute in rule.minutes:
            if not self._scrapes.is_running[minute]:
                continue
            value = always.get(minute)
            if value == ALWAYS:
                is_known = last is not None and minute - last <= LOOKBACK
                value = found[last] if is_known and last is not None else without.get(minute)
            if value is not None:
                found[minute], last = value, minute
            elif not ignores_markers:
                last = None
        return found

    def _query(self, expression: str, rule: Rule) -> dict[Labels, Points]:
        found: dict[Labels, Points] = {}
        end = START + rule.minutes[-1] * 60
        for labels, points in self._store.query_range(expression, START, end, rule.step * 60):
            # Of two series that differ in their name only, one continues the other: `a or last_over_time(b[5m])`.
            labels.pop("__name__", None)
            of_series = found.setdefault(tuple(sorted(labels.items())), {})
            of_series.update({(at - START) // 60: float(value) for at, value in points})
        return found
