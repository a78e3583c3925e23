"""From a directory of YAML files to a validated inventory, or every error at once."""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fleet.inventory.checks import check_references, shared_targets
from fleet.inventory.digests import digest
from fleet.inventory.documents import ConfigurationError, Document, Location, Wrong, read
from fleet.inventory.endpoints import Basic, Part
from fleet.inventory.kinds import Kinds, OptionsOf
from fleet.inventory.model import ControlDefaults, Inventory, ProbeDefaults, inventory_model
from fleet.inventory.references import Program, Resolver, substitute
from fleet.inventory.units import parse_duration
from runtime.redaction import Redactor

PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass(frozen=True)
class Loaded:
    """An inventory, and the secrets in it, to be masked wherever text leaves the program."""

    inventory: Inventory
    secrets: frozenset[str] = field(repr=False)
    warnings: Sequence[Wrong] = ()  # what may be meant, and is more often a mistake


def load(
    path: Path, kinds: Kinds, *, programs: Iterable[Program] = PROGRAMS, environ: Mapping[str, str] = os.environ
) -> Loaded:
    """Read, resolve for `programs`, validate and check. Raises ConfigurationError with all that is wrong.

    With no programs nothing is resolved: references stay as they were written.
    """
    document = read(path)
    wrongs = _fill_in(document)
    resolver = Resolver(document, environ, frozenset(programs))
    raw = resolver.resolve()
    wrongs += [*document.wrongs, *resolver.wrongs, *check_references(document, raw, kinds)]
    model = inventory_model(kinds)
    try:
        inventory = model.model_validate(raw)
    except ValidationError as error:
        found = [_explain(document, model, item) for item in error.errors(include_input=False, include_url=False)]
        told = {(wrong.file, wrong.line, wrong.path) for wrong in wrongs}
        wrongs += (wrong for wrong in found if (wrong.file, wrong.line, wrong.path) not in told)
        raise ConfigurationError(_ordered(wrongs, Redactor(resolver.secrets))) from None
    if wrongs:
        raise ConfigurationError(_ordered(wrongs, Redactor(resolver.secrets)))
    _digest(document, inventory)
    secrets = frozenset(resolver.secrets | set(_secrets(inventory)))
    inventory.mask_targets(Redactor(secrets))
    return Loaded(inventory, secrets, _ordered([*shared_targets(document, inventory)], Redactor(secrets)))


def _digest(document: Document, inventory: Inventory) -> None:
    """Give every service the digest of its probe and host as they were written."""
    services, hosts = (document.value.get(section, {}) for section in ("services", "hosts"))
    for name, service in inventory.services.items():
        service._digest = digest(service, services[name]["probe"], inventory.hosts, hosts)  # noqa: SLF001


def _ordered(wrongs: list[Wrong], redact: Redactor) -> list[Wrong]:
    told = dict.fromkeys(replace(wrong, what=redact(wrong.what)) for wrong in wrongs)
    return sorted(told, key=lambda wrong: (wrong.file, wrong.line, wrong.path))


def _fill_in(document: Document) -> list[Wrong]:
    """Give every probe and control the fleet's defaults, and put the host's address in."""
    wrote, services, hosts = (document.value.get(section, {}) for section in ("defaults", "services", "hosts"))
    models = {"probe": ProbeDefaults(), "control": ControlDefaults()}
    own_defaults = {part: _defaults_of(model, wrote.get(part)) for part, model in models.items()}
    wrongs = []
    for name, service in services.items():
        if not isinstance(service, dict):
            continue
        host = service.get("host", "")
        known = hosts.get(host) if isinstance(host, str) else None
        address = str(known.get("address", "")) if isinstance(known, dict) else "unknown.invalid"
        for part, defaults in own_defaults.items():
            if isinstance(service.get(part), dict):
                if not host and _mentions_host(service[part]):
                    wrongs.append(document.wrong(("services", name, part), "uses {host.…} but the service has no host"))
                own = substitute(service[part], name, str(host), address)
                service[part] = _with_defaults(own, *defaults)
    return wrongs


def _mentions_host(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_mentions_host, value.values()))
    if isinstance(value, list):
        return any(map(_mentions_host, value))
    return isinstance(value, str) and ("{host.address}" in value or "{host.name}" in value)


def _defaults_of(model: Part, written: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our defaults, and what the fleet's `defaults` say of them."""
    said = written if isinstance(written, dict) else {}
    return model.model_dump(), {name: value for name, value in said.items() if name in type(model).model_fields}


def _with_defaults(part: dict[str, Any], ours: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    filled = {**ours, **written, **part}
    if "every" in filled and "retry_every" not in {**written, **part}:
        filled["retry_every"] = _smaller(filled["every"], "30s")
    return filled


def _smaller(every: Any, other: str) -> Any:
    try:
        return every if parse_duration(every) < parse_duration(other) else other
    except ValueError:
        return other  # `every` itself is reported


def _explain(document: Document, model: type[BaseModel], error: Mapping[str, Any]) -> Wrong:
    location: Location = [part for part in error["loc"] if part != "[key]"]
    kind = error["type"]
    if kind == "extra_forbidden":
        return document.wrong(location, f"unknown key{_nearest(model, location)}")
    if kind == "missing":
        return document.wrong(location, "is missing")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return document.wrong(location, "must be a map")
    if "[key]" in error["loc"] and "pattern" in error.get("ctx", {}):
        pattern = error["ctx"]["pattern"]
        return document.wrong(location, f"is not a name that may stand here (it must match {pattern})")
    message = error["msg"].removeprefix("Value error, ")
    return document.wrong(location, message[:1].lower() + message[1:])


def _nearest(model: type[BaseModel], location: Location) -> str:
    keys = [field.alias or name for name, field in _model_at(model, location[:-1]).items()]
    close = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f" (known here: {', '.join(keys)})"


def _model_at(model: type[BaseModel], location: Location) -> Mapping[str, FieldInfo]:
    """The fields of the model that `location` leads to."""
    here: type[BaseModel] | None = model
    keyed = False  # the next part is a key of a map or an index, and leads no further
    for part in location:
        if keyed:
            keyed = False
        elif here is not None:
            found = {info.alias or name: info for name, info in here.model_fields.items()}.get(str(part))
            here = _model_of(found) if found else None
            keyed = found is not None and any(get_origin(each) in (dict, list) for each in _options(found.annotation))
    return here.model_fields if here is not None else {}


def _model_of(info: FieldInfo) -> type[BaseModel] | None:
    kind = next((each for each in info.metadata if isinstance(each, OptionsOf)), None)
    return kind.model if kind is not None else _inner(info.annotation)


def _options(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *get_args(annotation))


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X | None`, `dict[str, X]` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part)) is not None), None)


def _secrets(value: Any) -> Iterator[str]:
    """Every secret in a model, wherever it stands."""
    if hasattr(value, "get_secret_value"):
        secret = value.get_secret_value()
        yield secret
        if secret.startswith(("Bearer ", "Basic ")):  # the value of a header: its credentials alone are secret, too
            yield secret.partition(" ")[2]
    elif isinstance(value, BaseModel):
        # A password that is none yet is of a section that this program does not resolve.
        if isinstance(value, Basic) and hasattr(value.password, "get_secret_value"):
            yield value.encoded
        for _name, item in value:
            yield from _secrets(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item)
