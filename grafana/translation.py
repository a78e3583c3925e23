"""The dashboards in Chinese: the same JSON with the texts of zh.yaml."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHINESE: Mapping[str, str] = yaml.safe_load((Path(__file__).parent / "zh.yaml").read_text(encoding="utf-8"))
# What a person reads, by the key of the JSON. `options` and `name` also hold other things.
_KEYS = {"title", "description", "label", "legendFormat", "displayName", "text", "titleFormat"}
_UNTRANSLATED = {"All", "Prometheus", "__auto"}  # Grafana translates the first itself; the second is a server's name


def translate(dashboard: Any, texts: Mapping[str, str]) -> Any:
    """Return the JSON of a dashboard with other texts. Raises KeyError with one that is not in `texts`."""
    if isinstance(dashboard, list):
        return [translate(each, texts) for each in dashboard]
    if not isinstance(dashboard, dict):
        return dashboard
    result = {key: translate(value, texts) for key, value in dashboard.items()}
    for key, value in _list_texts(dashboard):
        result[key] = texts[value]
    if "renameByName" in dashboard:
        result["renameByName"] = {name: texts[value] for name, value in dashboard["renameByName"].items()}
    return result


def _list_texts(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of an object that a person reads."""
    for key, value in part.items():
        names_column = key == "options" and part.get("id") == "byName"
        names_annotation = key == "name" and "iconColor" in part
        if isinstance(value, str) and (key in _KEYS or names_column or names_annotation) and _has_words(value):
            yield key, value


def _has_words(text: str) -> bool:
    return text not in _UNTRANSLATED and re.search(r"[A-Za-z]", re.sub(r"{{\w+}}", "", text)) is not None
