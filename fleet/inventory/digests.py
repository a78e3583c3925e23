"""Digests of a service's probe and host, to compare the configurations of two programs.

A digest is computed from the text as written: references such as `${TOKEN}` are not resolved, since not every program
resolves the same ones, and literal secrets are replaced by a constant. Default options of a kind are not part of it,
so that two versions of Defib compute the same digest for the same text.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from fleet.inventory.model import Host, ProbeSettings, Service, find_connection_path
from fleet.inventory.units import parse_duration

DIGEST_VERSION = "2"  # of the canonical form; digests of different versions are not compared
SECRET = "<secret>"  # noqa: S105 - a placeholder
_HOST_KEYS = ("address", "shell", "ssh")

Written = Mapping[str, Any]


def compute_digest(service: Service, probe: Written, hosts: Mapping[str, Host], written: Mapping[str, Written]) -> str:
    """Return a service's digest; `probe` and the `written` hosts are as in the files, with `defaults` filled in."""
    canonical = {
        "probe": _probe(service, probe),
        "hosts": [_host(name, hosts[name], written[name]) for name in find_connection_path(service.host, hosts)],
    }
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return f"{DIGEST_VERSION}:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def digests_differ(one: str | None, other: str | None) -> bool:
    """Whether two digests show different configurations; unknown where one is missing or of another version: False."""
    if not one or not other:
        return False
    return one.partition(":")[0] == other.partition(":")[0] and one != other


def _probe(service: Service, written: Written) -> dict[str, Any]:
    """Return a probe without its secrets and without `fail_after` and `recover_after` at their defaults."""
    defaults = ProbeSettings().model_dump()
    canonical = {}
    for name, value in _without_secrets(written, service.probe).items():
        normal = _seconds(value) if name in defaults else value
        if normal is not None and (name not in defaults or normal != defaults[name]):
            canonical[name] = normal
    return canonical


def _host(name: str, host: Host, written: Written) -> dict[str, Any]:
    canonical = _without_secrets({key: written[key] for key in _HOST_KEYS if written.get(key) is not None}, host)
    return {"name": name, "shell": host.shell, **canonical}


def _seconds(value: Any) -> Any:
    try:
        return parse_duration(value)
    except ValueError:
        return value  # a reference, or not a duration


def _without_secrets(written: Any, model: Any) -> Any:
    """Return `written` with a constant in place of every value that is secret in its model."""
    if isinstance(written, Mapping) and isinstance(model, BaseModel):
        fields = {info.alias or name: (name, info) for name, info in type(model).model_fields.items()}
        return {key: _of_field(value, model, *fields[key]) for key, value in written.items() if key in fields}
    if isinstance(written, Mapping) and isinstance(model, Mapping):
        return {key: _without_secrets(value, model.get(key)) for key, value in written.items()}
    if isinstance(written, list) and isinstance(model, list | tuple) and len(written) == len(model):
        return [_without_secrets(*pair) for pair in zip(written, model, strict=True)]
    return written


def _of_field(written: Any, model: BaseModel, name: str, info: FieldInfo) -> Any:
    return _masked(written) if is_secret_type(info.annotation) else _without_secrets(written, getattr(model, name))


def is_secret_type(annotation: Any) -> bool:
    """Whether values of a type are secret, or contain secrets."""
    return annotation is SecretStr or any(map(is_secret_type, get_args(annotation)))


def _masked(written: Any) -> Any:
    if isinstance(written, Mapping):
        return {key: _masked(value) for key, value in written.items()}
    if isinstance(written, list):
        return [_masked(value) for value in written]
    return None if written is None else SECRET
