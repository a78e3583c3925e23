"""What the record says in English, in the reader's language. Messages of servers, names and reasons of people stay."""

import re
from collections.abc import Mapping
from typing import Any

from fleet.inventory.model import is_host_alert
from remediator.notifications.phrases import name_kind, translate, translate_failure

Words = Mapping[str, Any]
_CLAIMED = re.compile(r"local \((.*), unverified\)")  # `Identity.label`
_TOKEN = re.compile(r"(.*) \(token\)")


def translate_person(texts: Words, label: str) -> str:
    """Return the name of who did something, with its marks in words."""
    people: Mapping[str, str] = texts["people"]
    if (claimed := _CLAIMED.fullmatch(label)) is not None:
        return people["local"].format(claimed[1])
    if (token := _TOKEN.fullmatch(label)) is not None:
        return people["token"].format(token[1])
    return label


def translate_detail(texts: Words, words: Words, detail: str) -> str:
    """Return the detail of a decision or the outcome of an action."""
    if detail.startswith("by "):
        who, separator, reason = detail[3:].partition(": ")
        by: str = texts["banners"]["by"]
        return f"{by.format(translate_person(texts, who))}{separator}{reason}"
    return translate(words, detail)


def translate_entry(texts: Words, words: Words, detail: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details of an entry of an incident's timeline."""
    people = {name: translate_person(texts, detail[name]) for name in ("by", "who", "approved_by") if detail.get(name)}
    translated = {**detail, **people}
    if (verb := detail.get("verb")) is not None:
        translated["verb"] = texts["service"]["verbs"].get(verb, verb)
    for name in ("detail", "why", "message"):
        if detail.get(name):
            translated[name] = translate_detail(texts, words, detail[name])
    return translated


def translate_event(texts: Words, words: Words, event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event of the timeline with its texts in words."""
    labels, scopes, kind = texts["events"], texts["settings"]["scopes"], event["kind"]
    operation, name, detail, by = (str(event[each]) for each in ("operation", "name", "detail", "by"))
    if kind == "operation":
        if " " in name:  # otherwise it is only a name
            name = _translate_head(name, " ", {**labels["kinds"], **scopes})
    elif kind == "maintenance":
        detail = _translate_head(detail, ": ", scopes)
    elif kind == "action":
        detail = _translate_head(detail, " ", {"component": texts["components"]["name"]})
    elif kind in ("service", "incident"):
        detail = translate_failure(words, detail)
    if kind == "incident" and is_host_alert(name):
        words = {**words, "recovered_by": words["host_alerts"]["recovered_by"]}
    by = words["recovered_by"].get(by, by) if kind == "incident" else translate_person(texts, by)
    operation = labels["operations"].get(operation) or name_kind(words, operation)
    return {**event, "operation": operation, "name": name, "detail": detail, "by": by}


def _translate_head(text: str, separator: str, names: Mapping[str, str]) -> str:
    """Return a text whose part before the separator is translated if it has a name."""
    head, found, rest = text.partition(separator)
    return f"{names.get(head, head)}{found}{rest}"
