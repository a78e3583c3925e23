"""The secrets of a configuration: the values that are masked in all output.

These are the values of secret fields, such as passwords and tokens, and the references in fields that often contain
credentials, such as the arguments of a command. References elsewhere, such as in an address or a path, are no secrets:
masking them would make links and messages useless.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from pydantic import BaseModel, SecretStr

from fleet.inventory.digests import is_secret_type
from fleet.inventory.endpoints import BasicAuth, ReferencesAreSecret
from fleet.inventory.yaml_files import TextWithBase

# Names of headers and variables whose values are secret also where they are written literally.
_SUGGESTS_CREDENTIALS = re.compile(
    r"auth|cookie|token|secret|key|passw|passphrase|pwd|credential|session|signature|jwt", re.IGNORECASE
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9-]* (\S+)")  # as in `Bearer …`


def find_secrets(written: Any, model: Any) -> Iterator[str]:
    """Yield every secret of a part of the configuration, which is `written` so, with its references resolved."""
    if isinstance(model, BaseModel):
        yield from _in_model(written, model)
    elif isinstance(model, Mapping):
        for name, item in model.items():
            yield from find_secrets(_get(written, name), item)
    elif isinstance(model, list | tuple):
        items = written if isinstance(written, list) and len(written) == len(model) else [None] * len(model)
        for pair in zip(items, model, strict=True):
            yield from find_secrets(*pair)
    else:
        yield from _in_query(written)


def _in_model(written: Any, model: BaseModel) -> Iterator[str]:
    # Where this program leaves the password unresolved, it is no SecretStr.
    if isinstance(model, BasicAuth) and isinstance(model.password, SecretStr):
        yield model.encoded
    for field in _list_fields(type(model)):
        part, value = _get(written, field.key), getattr(model, field.name)
        if field.is_secret:
            yield from _in_secret_field(part, value)
        elif field.references_are_secret:
            yield from _references(part)
        elif part is not None or isinstance(value, BaseModel | Mapping | list):
            yield from find_secrets(part, value)
    yield from _in_query(written)  # in a short form, such as a URL


class _Field(NamedTuple):
    name: str
    key: str  # in the configuration
    is_secret: bool
    references_are_secret: bool


@cache
def _list_fields(model: type[BaseModel]) -> Sequence[_Field]:
    return [
        _Field(
            name,
            info.alias or name,
            is_secret_type(info.annotation),
            any(isinstance(each, ReferencesAreSecret) for each in info.metadata),
        )
        for name, info in model.model_fields.items()
    ]


def _get(written: Any, name: str) -> Any:
    return written.get(name) if isinstance(written, Mapping) else None


def _in_secret_field(written: Any, value: Any) -> Iterator[str]:
    yield from _references(written)
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, SecretStr) and _SUGGESTS_CREDENTIALS.search(name):
                yield from _credentials(item.get_secret_value())


def _credentials(text: str) -> Iterator[str]:
    """Yield a value, and its credentials alone where it begins with a scheme."""
    yield text
    if (match := _SCHEME.fullmatch(text)) is not None:
        yield match[1]


def _references(written: Any) -> Iterator[str]:
    """Yield the values of all references."""
    if isinstance(written, TextWithBase):
        for start, end in written.references:
            yield written[start:end]
    elif isinstance(written, Mapping):
        for item in written.values():
            yield from _references(item)
    elif isinstance(written, list):
        for item in written:
            yield from _references(item)


def _in_query(written: Any) -> Iterator[str]:
    """Yield the values of the references in the query of a URL."""
    if not isinstance(written, TextWithBase) or "://" not in written:
        return
    query = written.find("?") + 1 or len(written)
    for start, end in written.references:
        if end > query:
            yield written[max(start, query) : end]
        if start < query < end:  # the reference has the whole query
            yield from (value for _name, value in parse_qsl(written[query:end]))
