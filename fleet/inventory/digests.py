"""A digest of what the configuration says of a service's probe and host, to compare two programs' configurations.

It is made from the text as written: references such as `${TOKEN}` are not resolved, so that every program computes the
same. Secrets that are written out are replaced by a constant. It does not depend on the defaults of this version for
the options of a kind, so that two versions give the same digest for the same text.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from fleet.inventory.model import Host, ProbeDefaults, Service
from fleet.inventory.units import parse_duration

DIGEST_VERSION = "1"  # of the canonical form; digests of different versions are not compared
SECRET = "<secret>"  # noqa: S105 - stands for one
_DURATIONS = ("every", "retry_every", "timeout", "slow_after")
_OF_PROBES = ("every", "retry_every", "timeout", "fail_after", "recover_after", "slow_after")
_OF_HOSTS = ("address", "shell", "ssh")

Written = Mapping[str, Any]


def compute_digest(service: Service, probe: Written, hosts: Mapping[str, Host], written: Mapping[str, Written]) -> str:
    """The digest of a service: `probe` and `written` hosts are as in the files, with the fleet's defaults filled in."""
    canonical = {
        "probe": _probe(service, probe),
        "hosts": [_host(name, hosts[name], written[name]) for name in _way_to(service.host, hosts)],
    }
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return f"{DIGEST_VERSION}:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def digests_differ(one: str | None, other: str | None) -> bool:
    """Whether two digests show different configurations; where one is missing or of another form they do not."""
    if not one or not other:
        return False
    return one.partition(":")[0] == other.partition(":")[0] and one != other


def _probe(service: Service, written: Written) -> dict[str, Any]:
    """A probe without its secrets; what only says the default is left out."""
    defaults = ProbeDefaults().model_dump()
    canonical = {}
    for name, value in _without_secrets(written, service.probe).items():
        said = _seconds(value) if name in _DURATIONS else value
        if said is not None and not (name in _OF_PROBES and name != "retry_every" and said == defaults[name]):
            canonical[name] = said
    return canonical


def _host(name: str, host: Host, written: Written) -> dict[str, Any]:
    canonical = _without_secrets({key: written[key] for key in _OF_HOSTS if written.get(key) is not None}, host)
    return {"name": name, "shell": host.shell, **canonical}


def _way_to(name: str, hosts: Mapping[str, Host]) -> list[str]:
    """A service's host and those that lead to it by `via`, the nearest to it first."""
    way: list[str] = []
    while name in hosts and name not in way:
        way.append(name)
        ssh = hosts[name].ssh
        name = (ssh.via or "") if ssh is not None else ""
    return way


def _seconds(value: Any) -> Any:
    try:
        return parse_duration(value)
    except ValueError:
        return value  # a reference


def _without_secrets(written: Any, model: Any) -> Any:
    """`written` with a constant in the place of all that its model calls secret."""
    if isinstance(written, Mapping) and isinstance(model, BaseModel):
        fields = {info.alias or name: (name, info) for name, info in type(model).model_fields.items()}
        return {key: _of_field(value, model, *fields[key]) for key, value in written.items() if key in fields}
    if isinstance(written, Mapping) and isinstance(model, Mapping):
        return {key: _without_secrets(value, model.get(key)) for key, value in written.items()}
    if isinstance(written, list) and isinstance(model, list | tuple) and len(written) == len(model):
        return [_without_secrets(*pair) for pair in zip(written, model, strict=True)]
    return written


def _of_field(written: Any, model: BaseModel, name: str, info: FieldInfo) -> Any:
    return _masked(written) if _holds_secret(info.annotation) else _without_secrets(written, getattr(model, name))


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_holds_secret, get_args(annotation)))


def _masked(written: Any) -> Any:
    if isinstance(written, Mapping):
        return {key: _masked(value) for key, value in written.items()}
    if isinstance(written, list):
        return [_masked(value) for value in written]
    return None if written is None else SECRET
