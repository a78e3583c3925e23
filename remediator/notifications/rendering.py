"""Render notifications with Jinja2 templates: the shipped ones, or a user's instead of them.

A user's directory (`notify.templates`) may contain any of NAMES. `{% include "defib/card.j2" %}` includes the shipped
one, and words that a user's file omits are taken from the shipped file.

Templates do not know how a channel formats text: `bold` and every printed value are marked, and become spans that the
channel formats and escapes.
"""

import re
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import (
    ChoiceLoader,
    FileSystemLoader,
    PackageLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Language
from remediator.notifications.cards import Line, Span, to_single_line
from remediator.notifications.content import Notification, NotificationState, Restart
from remediator.notifications.durations import format_duration
from remediator.notifications.outbox import MessageForm
from remediator.notifications.phrases import name_kind, translate, translate_failure
from remediator.notifications.report_texts import describe_headline, describe_highlights
from remediator.record.notifications import severity_rank
from remediator.reports.availability import format_availability

HOSTS_SHOWN = 5
SIMILAR = 2.0  # times whose ratio is smaller are shown as one
TITLE_LIMIT, LABEL_LIMIT, OUTPUT_LINE_LIMIT = 150, 60, 200  # characters
NAMES = ("title.j2", "card.j2", "report.j2", "group.j2", "summary.j2", "en.j2", "zh.j2")
# Control characters, which no printed value contains, around labels and values.
_LABEL, _VALUE, _END = "\x01", "\x02", "\x03"
_MARKED = re.compile(f"{_LABEL}([^{_LABEL}-{_END}]*){_END}|{_VALUE}([^{_LABEL}-{_END}]*){_END}")


class Templates:
    """The templates of one language."""

    def __init__(self, language: Language, own: Path | None = None) -> None:
        shipped = PackageLoader("remediator.notifications")
        loaders = [FileSystemLoader(own)] if own is not None else []
        loader = ChoiceLoader([*loaders, shipped, PrefixLoader({"defib": shipped})])
        # `autoescape` makes strings that `_mark_value` has marked distinguishable from others.
        self._environment = environment = SandboxedEnvironment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_mark_value
        )
        environment.globals |= {
            "bold": _mark_label, "shared_labels": _shared_labels, "count_states": _count_states,
            "counted": _count_states,  # its former name
            "busiest_hosts": _busiest_hosts, "count_names": _count_names,
        }  # fmt: skip
        environment.filters |= {
            "time": _format_time, "clock": _format_clock, "duration": self._format_duration, "lines": _last_lines,
            "translated": self._translate, "failure": self._translate_failure,
            "restarts": self._describe_restarts, "availability": format_availability,
            "headline": self._describe_headline, "highlights": self._describe_highlights,
            "kind_name": self._name_kind,
        }  # fmt: skip
        self.words = _merge(self._read_words(f"defib/{language}.j2"), self._read_words(f"{language}.j2"))
        # What incidents of hosts' alerts are called differently.
        self.host_alert_words = _merge(self.words, self.words["host_alerts"])
        # And those of agents that are alive.
        self.stuck_agent_words = _merge(self.words, self.words["stuck_agents"])
        # And those of agents that are down, and are woken first.
        self.woken_agent_words = _merge(self.words, self.words["woken_agents"])
        environment.globals |= {
            "words": self.words, "host_alert_words": self.host_alert_words, "stuck_agent_words": self.stuck_agent_words,
            "woken_agent_words": self.woken_agent_words,
        }  # fmt: skip

    def _read_words(self, name: str) -> Mapping[str, Any]:
        words = getattr(self._environment.get_template(name).module, "words", None)
        if not isinstance(words, dict):
            raise TemplateError(f"{name} does not set `words`")
        return words

    def _format_duration(self, seconds: float) -> str:
        return format_duration(self.words, seconds)

    def _translate(self, text: Any) -> str:
        return translate(self.words, str(text or ""))

    def _translate_failure(self, failure: Any) -> str:
        return translate_failure(self.words, str(failure or ""))

    def _name_kind(self, kind: Any) -> str:
        return name_kind(self.words, str(kind))

    def _describe_restarts(self, restarts: Sequence[Restart]) -> str:
        return describe_restarts(self.words, restarts)

    def _describe_headline(self, report: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
        return describe_headline(self.words, report)

    def _describe_highlights(self, report: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[str]]]:
        return describe_highlights(self.words, report)

    def render_title(self, notifications: Sequence[Notification], form: MessageForm) -> str:
        text = " ".join(line.plain for line in self._render("title.j2", notifications, form))
        return to_single_line(" ".join(text.split()), TITLE_LIMIT)

    def render_body(self, notifications: Sequence[Notification], form: MessageForm) -> list[Line]:
        if form == "one":
            name = "report.j2" if notifications[0].state == "report" else "card.j2"
            return self._render(name, notifications, form)
        return self._render(f"{form}.j2", notifications, form)

    def _render(self, name: str, notifications: Sequence[Notification], form: MessageForm) -> list[Line]:
        each = _with_lenient_maps(notifications)
        text = self._environment.get_template(name).render(
            notifications=each, notification=each[0], form=form,
            stories=each, story=each[0],  # their former names
        )  # fmt: skip
        lines = (_parse_line(line.rstrip()) for line in text.splitlines())
        return [line for line in lines if line.plain.strip()]


@lru_cache(maxsize=8)
def _load_templates(language: Language, own: Path | None, _changed: tuple[float, ...]) -> Templates:
    return Templates(language, own)


def load_templates(inventory: Inventory) -> Templates:
    """Return the templates in force, as their files are now. Raises TemplateError."""
    notify = inventory.notify
    files = [notify.templates / name for name in NAMES] if notify.templates is not None else []
    changed = tuple(file.stat().st_mtime for file in files if file.is_file())
    return _load_templates(notify.language, notify.templates, changed)


def shipped_templates(language: Language) -> Templates:
    """Return the shipped templates, without the user's."""
    return _load_templates(language, None, ())


def describe_template_error(error: Exception, own: Path) -> str:
    """Return what is wrong with a user's templates, with file and line if they are known."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename or own}:{error.lineno}: {error.message}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"{own}/")]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(own)
    return f"{where}: {error if isinstance(error, TemplateError) else f'{type(error).__name__}: {error}'}"


def describe_restarts(words: Mapping[str, Any], restarts: Sequence[Restart]) -> str:
    """Return when a service was restarted, and for how long it was up each time."""
    sentences = words["restarted_at"]
    at = ", ".join(each.at.strftime("%H:%M:%S") for each in restarts)
    times = [each.up_for for each in restarts if each.up_for is not None]
    if not times:
        return str(sentences["none" if any(each.is_up for each in restarts) else "never"].format(at))
    shortest, longest = (format_duration(words, limit(times)) for limit in (min, max))
    if len(restarts) == 1:
        return str(sentences["once"].format(at, longest))
    if max(times) <= min(times) * SIMILAR:
        return str(sentences["about"].format(at, format_duration(words, sum(times) / len(times))))
    return str(sentences["between"].format(at, shortest, longest))


def describe_event(words: Mapping[str, Any], event: str, detail: Mapping[str, Any]) -> str:
    """Return an event of an incident's timeline as a sentence."""
    values = {name: value for name, value in detail.items() if value is not None and value != ""}
    by, reason = values.get("by"), values.get("reason")
    values |= {"by_whom": by or "?", "who": values.get("who") or by or "?"}
    if event == "incident_closed":
        values["recovered_by"] = words["recovered_by"].get(by, by)
    if event == "decision":
        values["reason_name"] = reason
    for name, translations in (
        ("reason", words["reasons"]),
        ("outcome", words["outcomes"]),
        ("state", {**words["states"], **words["outcomes"]}),
    ):
        if name in values:
            values[name] = translations.get(values[name], values[name])
    if "kind" in values:
        values["kind"] = name_kind(words, values["kind"])
    if "component" in values:
        values["kind"] = words["of_component"].format(values.get("kind", ""), values["component"])
    overruled = values.get("overruled")
    if isinstance(overruled, list):
        values["overruled"] = ", ".join(map(str, overruled))
    for name, part in words["event_parts"].items():
        value = values.get(name)
        values[name] = "" if value is None or value == "" else part.format(value)
    return str(words["events"].get(event, event).format_map(_LenientMap(values)))


def _merge(shipped: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _merge(value, own[key])
        if isinstance(value, dict) and isinstance(own.get(key), dict)
        else own.get(key, value)
        for key, value in shipped.items()
    }


class _LenientMap(dict[str, Any]):
    """A map whose missing keys are empty."""

    def __missing__(self, _key: str) -> str:
        return ""


def _with_lenient_maps(notifications: Sequence[Notification]) -> list[Notification]:
    return [
        replace(
            each, labels=_LenientMap(each.labels), annotations=_LenientMap(each.annotations),
            details=_LenientMap(each.details),
        )
        for each in notifications
    ]  # fmt: skip


def _mark_value(value: Any) -> Any:
    if hasattr(value, "__html__"):
        return value
    text = to_single_line(str(value))
    return _mark(_VALUE, text) if text else ""


def _mark_label(name: Any) -> Markup:
    return _mark(_LABEL, to_single_line(str(name), LABEL_LIMIT))


def _mark(start: str, text: str) -> Markup:
    return Markup(f"{start}{text}{_END}")  # noqa: S704 - channels escape it


def _last_lines(text: str, count: int) -> Markup:
    lines = [line for line in text.splitlines() if line.strip()][-count:]
    marked = (f"› {_mark(_VALUE, to_single_line(line, OUTPUT_LINE_LIMIT))}" for line in lines)
    return Markup("\n".join(marked))  # noqa: S704 - channels escape it


def _parse_line(line: str) -> Line:
    spans, at = [], 0
    for match in _MARKED.finditer(line):
        spans.append(Span("template", line[at : match.start()]))
        spans.append(Span("label", match[1]) if match[1] is not None else Span("value", match[2]))
        at = match.end()
    spans.append(Span("template", line[at:]))
    return Line(tuple(span for span in spans if span.text or span.kind == "label"))


def _format_time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S %Z")


def _format_clock(at: datetime) -> str:
    return at.strftime("%H:%M:%S")


def _shared_labels(notifications: Sequence[Notification]) -> dict[str, str]:
    """Return the labels that all notifications have with the same value."""
    first = dict(notifications[0].labels)
    return {
        name: value for name, value in first.items() if all(each.labels.get(name) == value for each in notifications)
    }


def _count_states(notifications: Sequence[Notification]) -> list[tuple[NotificationState, int]]:
    return Counter(each.state for each in notifications).most_common()


def _count_names(notifications: Sequence[Notification]) -> list[tuple[str, str, int]]:
    """Return the names of alerts with the worst severity of each and their number: the worst first, then the most."""
    counts = Counter(each.alertname for each in notifications)
    worst: dict[str, str] = {}
    for each in notifications:
        worst[each.alertname] = min(worst.get(each.alertname, each.severity), each.severity, key=severity_rank)
    found = [(name, worst[name], count) for name, count in counts.items()]
    return sorted(found, key=lambda item: (severity_rank(item[1]), -item[2]))


def _busiest_hosts(notifications: Sequence[Notification]) -> list[tuple[str, int]]:
    """Return the hosts with most notifications; none if each is on another host."""
    hosts = Counter(each.host for each in notifications if each.host)
    return hosts.most_common(HOSTS_SHOWN) if len(hosts) < len(notifications) else []
