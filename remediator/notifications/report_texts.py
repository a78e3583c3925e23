"""Reports in the language of a reader: the texts of a card, and the tables of `defib report`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

from remediator.notifications.durations import format_duration
from remediator.notifications.phrases import translate
from remediator.reports.availability import format_availability

Described = Mapping[str, Any]  # a report, or a part of it, as the API has it
Cell = Callable[[Described], str]


@dataclass(frozen=True)
class Table:
    """A table; `omitted` is how many more entries there are that the report does not have."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    omitted: int


@dataclass(frozen=True)
class ReportTexts:
    title: str
    period: str
    headline: Sequence[tuple[str, str]]
    missing: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    explanations: Sequence[str]


def describe_report(words: Mapping[str, Any], report: Described, zone: tzinfo | None) -> ReportTexts:
    """Return the texts of a report, with times in a time zone."""
    own, (start, end) = words["report"], (_parse_time(report[name], zone) for name in ("from", "to"))
    lasted = format_duration(words, end.timestamp() - start.timestamp())
    return ReportTexts(
        own["title"],
        own["from_to"].format(_format_time(start), _format_time(end), lasted),
        describe_headline(words, report),
        [
            (own["missing"].format(own["parts"].get(each["part"], each["part"])), translate(words, each["text"]))
            for each in report["missing"]
        ],
        _Tables(words, report, zone).describe(),
        own["explanations"],
    )


def describe_headline(words: Mapping[str, Any], report: Described) -> list[tuple[str, str]]:
    """Return the numbers of a report, each with its label."""
    own, total = words["report"], report["total"]
    lines = [
        (own["availability"], _describe_availability(own, total)),
        (own["label_incidents"], _describe_incidents(own, total)),
    ]
    if recovered := sum(total["recovered_by"].values()):
        times = [format_duration(words, total[f"recovery_{name}_seconds"]) for name in ("median", "longest")]
        parts = [own["by"][by].format(number) for by, number in total["recovered_by"].items() if number]
        lines.append((own["label_recovered"], _with_parts(own, str(recovered), parts)))
        lines.append((own["label_recovery"], own["times"].format(*times)))
    if total["restarts"]:
        lines.append((own["label_restarts"], _describe_restarts(own, total)))
    if total["person_needed"]:
        lines.append((own["label_person_needed"], _format_incidents(own, total["person_needed"])))
    if total["gpus"] and total["gpu_utilization_ratio"] is not None:
        ratio = _format_ratio(total["gpu_utilization_ratio"])
        lines.append((own["label_gpus"], own["utilized"].format(total["gpus"], ratio)))
    not_counted = [own[name].format(total[name]) for name in ("alerts_only", "stopped") if total[name]]
    if not_counted:
        lines.append((own["label_not_counted"], own["comma"].join(not_counted)))
    return lines


def _describe_availability(own: Mapping[str, Any], total: Described) -> str:
    if total["availability"] is None:
        return str(own["unknown_of"].format(total["services"]))
    ratio, unobserved = format_availability(total["availability"]), total["services"] - total["observed"]
    if unobserved:
        return str(own["of_observed"].format(ratio, total["observed"], unobserved))
    return str(own["of_services"].format(ratio, total["services"]))


def _describe_incidents(own: Mapping[str, Any], total: Described) -> str:
    before = total["incidents"] - total["began"]
    parts = [
        own[name].format(number)
        for name, number in (("before", before), ("open", total["open"]), ("unobserved", total["unobserved"]))
        if number
    ]
    return _with_parts(own, str(total["incidents"]), parts)


def _format_incidents(own: Mapping[str, Any], number: int) -> str:
    return str(own["incident"] if number == 1 else own["incidents"].format(number))


def _describe_restarts(own: Mapping[str, Any], total: Described) -> str:
    text = str(own["helped"].format(total["restarts_helped"], total["restarts"]))
    if total["automatic_restarts"] == total["restarts"]:
        return text
    automatic = own["automatic"].format(total["automatic_restarts_helped"], total["automatic_restarts"])
    return f"{text}{own['semicolon']}{automatic}"


def _with_parts(own: Mapping[str, Any], text: str, parts: Sequence[str]) -> str:
    return f"{text}{own['colon']}{own['comma'].join(parts)}" if parts else text


def describe_highlights(words: Mapping[str, Any], summary: Described) -> list[tuple[str, list[str]]]:
    """Return the lists of a card, each with its label: the services that were down longest, and what to watch."""
    own = words["report"]
    lists = [
        (own["worst"], [_describe_service(words, each) for each in summary["worst"]]),
        (own["certificates"], [_describe_certificate(words, each, summary["to"]) for each in summary["certificates"]]),
        (own["disks"], [_describe_disk(words, each) for each in summary["disks"]]),
    ]
    for (_, lines), name in zip(lists[1:], ("certificate_count", "disk_count"), strict=True):
        if summary[name] > len(lines):
            lines.append(own["and_more"].format(summary[name] - len(lines)))
    return [(label, lines) for label, lines in lists if lines]


def _describe_service(words: Mapping[str, Any], service: Described) -> str:
    own, parts = words["report"], []
    if service["availability"] is not None:
        parts.append(format_availability(service["availability"]))
    if service["down_seconds"] is not None:
        parts.append(own["down"].format(format_duration(words, service["down_seconds"])))
    if service["incidents"]:
        parts.append(_format_incidents(own, service["incidents"]))
    if service["open"]:
        parts.append(own["still_open"])
    return _with_parts(own, _name_of(own, service), parts)


def _name_of(own: Mapping[str, Any], service: Described) -> str:
    return str(own["removed"].format(service["name"]) if service["removed"] else service["name"])


def _describe_certificate(words: Mapping[str, Any], certificate: Described, at: str) -> str:
    own, left = words["report"], _seconds_between(at, certificate["expires_at"])
    text = own["expires"].format(format_duration(words, left)) if left > 0 else own["expired"]
    return _with_parts(own, certificate["name"], [text])


def _describe_disk(words: Mapping[str, Any], disk: Described) -> str:
    own, parts = words["report"], []
    if disk["used_ratio"] is not None:
        parts.append(own["used"].format(_format_ratio(disk["used_ratio"])))
    if disk["full_in_seconds"] is not None:
        parts.append(own["full_in"].format(format_duration(words, disk["full_in_seconds"])))
    return _with_parts(own, f"{disk['host']} {disk['mountpoint']}", [*parts, *disk["alerts"]])


class _Tables:
    def __init__(self, words: Mapping[str, Any], report: Described, zone: tzinfo | None) -> None:
        self._words, self._own, self._report, self._zone = words, words["report"], report, zone

    def describe(self) -> list[Table]:
        """Return the tables that have rows."""
        columns = {
            "teams": self._team_columns(),
            "services": self._service_columns(),
            "gpus": self._gpu_columns(),
            "certificates": self._certificate_columns(),
            "disks": self._disk_columns(),
        }
        return [self._table(name, each) for name, each in columns.items() if self._report[name]]

    def _table(self, name: str, columns: Mapping[str, Cell]) -> Table:
        return Table(
            self._own[name],
            [self._own["head"][column] for column in columns],
            [[cell(each) for cell in columns.values()] for each in self._report[name]],
            self._report["omitted"].get(name, 0),
        )

    def _team_columns(self) -> Mapping[str, Cell]:
        return {
            "team": lambda each: each["team"] or self._own["no_team"],
            "services": lambda each: str(each["services"]),
            "availability": self._availability,
            **self._count_columns(),
        }

    def _service_columns(self) -> Mapping[str, Cell]:
        return {
            "service": lambda each: _name_of(self._own, each),
            "availability": self._availability,
            "down": lambda each: self._duration(each["down_seconds"]),
            **self._count_columns(),
            "maintenance": lambda each: self._duration(each["maintenance_seconds"] or None),
        }

    def _count_columns(self) -> Mapping[str, Cell]:
        return {
            "incidents": lambda each: str(each["incidents"]),
            "median": lambda each: self._duration(each["recovery_median_seconds"]),
            "restarts": lambda each: f"{each['restarts_helped']}/{each['restarts']}" if each["restarts"] else "0",
            "person": lambda each: str(each["person_needed"]),
        }

    def _gpu_columns(self) -> Mapping[str, Cell]:
        outside = self._own["host_processes"]
        return {
            "container": lambda each: outside if each["container"] == "host" else each["container"],
            "host": lambda each: each["host"],
            "gpus": lambda each: str(each["gpus"]),
            "hours": lambda each: f"{each['gpu_hours']:.1f}",
            "memory": lambda each: _format_bytes(each["memory_bytes"]),
            "utilization": lambda each: self._ratio(each["utilization_ratio"]),
        }

    def _certificate_columns(self) -> Mapping[str, Cell]:
        return {
            "service": lambda each: each["name"],
            "expires_at": lambda each: _format_time(_parse_time(each["expires_at"], self._zone)),
            "in": self._time_left,
        }

    def _disk_columns(self) -> Mapping[str, Cell]:
        return {
            "mountpoint": lambda each: each["mountpoint"],
            "host": lambda each: each["host"],
            "used": lambda each: self._ratio(each["used_ratio"]),
            "available": lambda each: self._bytes(each["available_bytes"]),
            "full_in": lambda each: self._duration(each["full_in_seconds"]),
            "alerts": lambda each: self._own["comma"].join(each["alerts"]),
        }

    def _availability(self, each: Described) -> str:
        ratio = each["availability"]
        return str(self._own["none"]) if ratio is None else format_availability(ratio)

    def _time_left(self, certificate: Described) -> str:
        left = _seconds_between(self._report["to"], certificate["expires_at"])
        return self._duration(left) if left > 0 else str(self._own["expired"])

    def _duration(self, seconds: float | None) -> str:
        return str(self._own["none"]) if seconds is None else format_duration(self._words, seconds)

    def _ratio(self, ratio: float | None) -> str:
        return str(self._own["none"]) if ratio is None else _format_ratio(ratio)

    def _bytes(self, size: float | None) -> str:
        return str(self._own["none"]) if size is None else _format_bytes(size)


def _parse_time(text: str, zone: tzinfo | None) -> datetime:
    return datetime.fromisoformat(text).astimezone(zone)


def _format_time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


def _seconds_between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _format_ratio(ratio: float) -> str:
    return f"{ratio * 100:.0f} %"


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
