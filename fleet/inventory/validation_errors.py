"""Explanations of pydantic's validation errors: file and line, the key, the value and what would be right."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fleet.inventory.digests import is_secret_type
from fleet.inventory.documents import Document
from fleet.inventory.kinds import KindOptions
from fleet.inventory.problems import ConfigProblem, Location
from fleet.inventory.units import format_value
from fleet.inventory.yaml_files import TextWithBase
from runtime.validation_messages import EMPTY, MESSAGES, describe

_WITHOUT_VALUE = ("missing", "too_short", "too_long")


def explain(document: Document, model: type[BaseModel], error: Mapping[str, Any]) -> ConfigProblem:
    """Return the problem for one of pydantic's errors."""
    location: Location = [part for part in error["loc"] if part != "[key]"]
    kind = error["type"]
    if kind == "extra_forbidden":
        return document.problem_at(location, f"unknown key{suggest_key(model, location)}")
    if "[key]" in error["loc"] and "pattern" in error.get("ctx", {}):
        message = f"{format_value(location[-1])} is not a valid name; it must match {error['ctx']['pattern']}"
        return document.problem_at(location, message)
    message = describe(error)
    if kind not in MESSAGES:
        return document.problem_at(location, message[:1].lower() + message[1:])
    if kind in _WITHOUT_VALUE or message == EMPTY:
        return document.problem_at(location, message)
    return document.problem_at(location, f"{message}{_show_value(model, location, error['input'])}")


def _show_value(model: type[BaseModel], location: Location, value: Any) -> str:
    """Return the value for the message, unless it may be secret, and the mistake that it suggests."""
    if isinstance(value, dict) and (placeholder := re.match(r"(service|host\.\w+)$", str(next(iter(value), "")))):
        return f"; a value that starts with {{{placeholder[1]}}} must be in quotes"
    if value is None:
        return " (it is empty)"
    if isinstance(value, list | dict):
        return ", not a list" if isinstance(value, list) else ", not a map"
    if not isinstance(value, str | int | float) or _may_be_secret(model, location):
        return ""
    if isinstance(value, TextWithBase) and (key := re.match(r"([A-Za-z_][\w.-]*):(?!/)\S", value)) is not None:
        return f"; a space is missing after the colon of {key[1]!r}"
    return f", not {format_value(value)}"


def _may_be_secret(model: type[BaseModel], location: Location) -> bool:
    return any(
        (info := _model_at(model, location[:depth]).get(str(part))) is not None and is_secret_type(info.annotation)
        for depth, part in enumerate(location)
    )


def suggest_key(model: type[BaseModel], location: Location) -> str:
    """Return what an unknown key may have been meant to be, or else the known ones."""
    keys = list(_model_at(model, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(keys)})"


def _model_at(model: type[BaseModel], location: Location) -> Mapping[str, FieldInfo]:
    """Return the fields of the model that `location` leads to, by their keys."""
    here: type[BaseModel] | None = model
    is_key = False  # the next part is a key or an index of the same field
    for part in location:
        if is_key:
            is_key = False
        elif here is not None:
            found = {info.alias or name: info for name, info in here.model_fields.items()}.get(str(part))
            here = _model_of(found) if found else None
            types = _alternatives(found.annotation) if found is not None else ()
            is_key = any(get_origin(each) in (dict, list) for each in types)
    return {info.alias or name: info for name, info in here.model_fields.items()} if here is not None else {}


def _model_of(info: FieldInfo) -> type[BaseModel] | None:
    kind = next((each for each in info.metadata if isinstance(each, KindOptions)), None)
    return kind.model if kind is not None else _inner(info.annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *get_args(annotation))


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside `X | None`, `dict[str, X]` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part)) is not None), None)
