"""Values that a probe keeps of one response and sends in later requests: `{kept.NAME}` stands for one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, SecretStr

from exporter.probes.net.http_request import HttpBodyOptions
from exporter.results import ProbeFailure

_KEPT = re.compile(r"\{kept\.([A-Za-z_][A-Za-z0-9_]*)\}")
_BODIES = ("body", "json_", "form")  # fields of the options
_PLACES = ("url", "headers", *_BODIES)
_CACHED = ("request", "content", "token_options")  # of the options, which depend on what is filled in
OptionsT = TypeVar("OptionsT", bound=HttpBodyOptions)


def find_names(options: HttpBodyOptions) -> set[str]:
    """Return the names of the values that a request needs. URLs have no placeholders in the host's place."""
    places = [getattr(options, name) for name in _PLACES]
    return {match[1] for text in _texts(places) for match in _KEPT.finditer(text)}


def check_places(options: HttpBodyOptions) -> None:
    """Raise ValueError if a value stands where it would not be filled in, or would choose the server."""
    fields = {name: value for name, value in options if name not in (*_PLACES, "before")}
    if any(_KEPT.search(text) for text in _texts(fields)):
        raise ValueError("{kept.…} is possible in url, headers, body, json and form only")
    hosts = [value for name, value in options.headers.items() if name.lower() == "host"]
    if any(_KEPT.search(text) for text in _texts(hosts)):
        raise ValueError("{kept.…} is not possible in the header Host: TLS would verify the name that a server chose")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, str):
        yield value
    elif isinstance(value, BaseModel):
        yield from _texts(dict(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def fill(options: OptionsT, kept: Mapping[str, str]) -> OptionsT:
    """Return the options of a request with the values in it: percent-encoded in the URL, as they are elsewhere.

    Raises ProbeFailure if a value cannot be sent.
    """
    if not find_names(options):
        return options
    filled = {
        "url": _KEPT.sub(lambda match: quote(kept[match[1]], safe=""), options.url),
        "headers": {name: _fill_header(name, value, kept) for name, value in options.headers.items()},
        **{name: _fill(getattr(options, name), kept) for name in _BODIES if name in options.model_fields_set},
    }
    copy = options.model_copy(update=filled)
    for name in _CACHED:
        copy.__dict__.pop(name, None)
    return copy


def _fill(value: Any, kept: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _KEPT.sub(lambda match: kept[match[1]], value)
    if isinstance(value, Mapping):
        return {key: _fill(item, kept) for key, item in value.items()}
    return [_fill(item, kept) for item in value] if isinstance(value, list) else value


def _fill_header(name: str, value: SecretStr, kept: Mapping[str, str]) -> SecretStr:
    text = _fill(value.get_secret_value(), kept)
    if any(character in text for character in "\r\n\0"):
        raise ProbeFailure("protocol", f"a kept value for the header {name} is not a single line")
    return SecretStr(text)
