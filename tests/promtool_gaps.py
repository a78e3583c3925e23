"""Makes promtool tests out of those in which alerts fire.

An alert must not end because data is missing for a moment, or because a second exporter publishes the same; it must end
for a service that was renamed.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fleet.inventory.units import parse_duration

Values = Sequence[float | None]  # one for each interval; None: none
_REPEATED = re.compile(r"(-?[0-9.e]*[0-9])(?:([+-])([0-9.e]*[0-9]))?(?:x(\d+))?")
_NEVER_MISSING = ("up",)  # Prometheus itself records 0 for a scrape that fails
_LOST_SCRAPES = 1
_RESTART = 60.0  # seconds for which a program that is restarted has no metrics
_AFTERWARDS = 3  # intervals after a gap in which an alert must still fire
_RENAMED_FOR = 900.0  # seconds after which no alert of the former name fires


@dataclass(frozen=True)
class Firing:
    """An alert with these labels that fires at a time of a promtool test."""

    alert: str
    labels: Mapping[str, str]
    at: float
    file: Path
    test: Mapping[str, Any]
    evaluation_interval: str


def list_firing(files: Sequence[Path]) -> Iterator[Firing]:
    """Yield every alert that a case of these files expects to fire."""
    for path in files:
        content = yaml.safe_load(path.read_text())
        for test in content["tests"]:
            for alert, labels, at in _list_expected(test):
                yield Firing(alert, labels, at, path, test, content["evaluation_interval"])


def _list_expected(test: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for case in test.get("promql_expr_test", []):
        for sample in case.get("exp_samples") or []:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', sample.get("labels", "")))
            if labels.pop("alertstate", "") == "firing":
                yield labels.pop("alertname"), labels, parse_duration(case["eval_time"])
    for case in test.get("alert_rule_test", []):
        for expected in case.get("exp_alerts") or []:
            yield case["alertname"], expected.get("exp_labels", {}), parse_duration(case["eval_time"])


def with_lost_scrape(firing: Firing) -> dict[str, Any]:
    """Return a promtool file in which one scrape is lost after the alert has fired."""
    return _with_gap(firing, _LOST_SCRAPES, lambda values: values)


def with_restart(firing: Firing) -> dict[str, Any]:
    """Return a promtool file in which all programs restart after the alert has fired, so that counters begin anew."""
    interval = parse_duration(firing.test["interval"])
    return _with_gap(firing, max(1, round(_RESTART / interval)), lambda values: [0.0] * len(values))


def with_two_exporters(firing: Firing) -> dict[str, Any]:
    """Return a promtool file in which a second exporter publishes the same, but for what an exporter says of itself."""
    series: list[Mapping[str, str]] = []
    for each in firing.test["input_series"]:
        name = each["series"]
        series.append(each)
        if 'job="defib-exporter"' in name and not name.startswith(("up{", "defib_")):
            other = re.sub(r', instance="\w+"|instance="\w+", ', "", name).replace("}", ', instance="second"}')
            series.append({"series": other, "values": each["values"]})
    return _file_of(firing, series, [firing.at], 1)


def with_rename(firing: Firing) -> dict[str, Any]:
    """Return a promtool file in which the alert's service gets another name after the alert has fired."""
    interval = parse_duration(firing.test["interval"])
    number = int(firing.at // interval) + 1
    length = max(1, round(_RENAMED_FOR / interval))
    former = f'service="{firing.labels["service"]}"'
    series: list[Mapping[str, str]] = []
    for each in firing.test["input_series"]:
        values = _extend(each, number, 0, list, length)
        if former not in each["series"]:
            series.append({"series": each["series"], "values": _write(values)})
            continue
        series.append({"series": each["series"], "values": _write([*values[:number], None])})
        renamed = each["series"].replace(former, 'service="renamed"')
        series.append({"series": renamed, "values": _write([*[None] * number, *values[number:]])})
    return _file_of(firing, series, [(number + length - 1) * interval], 0)


def _with_gap(firing: Firing, length: int, restart: Callable[[Values], Values]) -> dict[str, Any]:
    interval = parse_duration(firing.test["interval"])
    number = int(firing.at // interval) + 1  # of the samples until the alert fires
    checked = [(number + index) * interval for index in range(length + _AFTERWARDS)]
    series = [
        {"series": each["series"], "values": _write(_extend(each, number, length, restart))}
        for each in firing.test["input_series"]
    ]
    return _file_of(firing, series, checked, 1)


def _file_of(
    firing: Firing, series: Sequence[Mapping[str, str]], checked: Sequence[float], expected: int
) -> dict[str, Any]:
    """Return a promtool file that expects so many of the alert to fire at these times."""
    selector = "".join(f', {name}="{value}"' for name, value in firing.labels.items())
    case = {
        "expr": f'count(ALERTS{{alertname="{firing.alert}", alertstate="firing"{selector}}})',
        "exp_samples": [{"value": expected}] if expected else [],
    }
    return {
        "rule_files": [str((firing.file.parent / name).resolve()) for name in _rule_files(firing.file)],
        "evaluation_interval": firing.evaluation_interval,
        "tests": [{
            "name": f"{firing.alert} {dict(firing.labels)}: {firing.test.get('name', '')}",
            "interval": firing.test["interval"],
            "input_series": list(series),
            "promql_expr_test": [{**case, "eval_time": f"{at:g}s"} for at in checked],
        }],
    }  # fmt: skip


def _rule_files(path: Path) -> Sequence[str]:
    return list(yaml.safe_load(path.read_text())["rule_files"])


def _extend(
    series: Mapping[str, str],
    number: int,
    length: int,
    restart: Callable[[Values], Values],
    afterwards: int = _AFTERWARDS,
) -> Values:
    """Return the values up to a time, a gap, and how they go on: a counter by what it grew last, all others as they are."""
    name = re.split("[{ ]", series["series"])[0]
    before = list(_expand(series["values"]))[:number]
    before += [before[-1] if before else None] * (number - len(before))
    last = before[-1] if before else None
    if name in _NEVER_MISSING or last is None:
        return [*before, *[last] * (length + afterwards)]
    is_counter = re.search("_(total|bucket|sum|count)$", name) is not None
    previous = before[-2] if len(before) > 1 else None
    growth = last - previous if is_counter and previous is not None else 0.0
    after: Values = [last + growth * (length + index) for index in range(1, afterwards + 1)]
    return [*before, *[None] * length, *(restart(after) if is_counter else after)]


def _expand(notation: str) -> Iterator[float | None]:
    """Yield the values of promtool's notation, such as `1x3 _x2 5+10x2 stale`."""
    for part in notation.split():
        if part.startswith(("_", "stale")):
            yield from [None] * int(part.partition("x")[2] or 1)
            continue
        match = _REPEATED.fullmatch(part)
        assert match is not None, f"{part}: not understood"
        start, sign, step, times = match.groups()
        growth = float(f"{sign}{step}") if sign else 0.0
        yield from (float(start) + growth * index for index in range(int(times or 0) + 1))


def _write(values: Values) -> str:
    """Return promtool's notation of values; the first one that is missing is a stale marker, as after a lost scrape."""
    parts, previous = [], None
    for value in values:
        parts.append(
            ("stale" if previous is not None else "_") if value is None else f"{value:.17g}".replace("inf", "Inf")
        )
        previous = value
    return " ".join(parts)
