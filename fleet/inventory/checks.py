"""Whether the names that parts of the configuration call each other by exist.

Works on the raw maps, so that a mistake elsewhere does not hide these.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from fleet.inventory.documents import ConfigProblem, Document, Location
from fleet.inventory.kinds import KindTables
from fleet.inventory.model import Inventory

Raw = Mapping[str, Any]
CARRIES = re.compile(r"[A-Za-z0-9@:._/-]+")  # what the wrapper of a host takes as a name
FEW = 20_000  # names among which a near one is looked for


def check_references(document: Document, raw: Raw, kinds: KindTables) -> list[ConfigProblem]:
    """Unknown hosts, services and channels; commands without a host to run on; circles."""
    hosts, services = _maps(raw.get("hosts")), _maps(raw.get("services"))
    notify = raw.get("notify")
    notify = notify if isinstance(notify, dict) else {}
    return [
        *_hosts(document, hosts),
        *_services(document, services, hosts, kinds),
        *_recreated(document, services, hosts, _maps({"all": raw.get("remediation")}).get("all", {})),
        *_maintenance(document, raw.get("remediation"), hosts, services),
        *_routes(document, notify, _maps(notify.get("channels"))),
        *_circles(document, "hosts", ("ssh", "via"), {name: _via(host) for name, host in hosts.items()}),
        *_circles(document, "services", ("depends_on",), {name: _needs(each) for name, each in services.items()}),
    ]


def shared_targets(document: Document, inventory: Inventory) -> Iterator[ConfigProblem]:
    """Services whose controls act on what another one's does."""
    first: dict[tuple[str, str], str] = {}
    for name, service in inventory.services.items():
        other = first.setdefault((service.host, service.target), name)
        if other != name and service.control is not None:
            where = f" on {service.host}" if service.host else ""
            what = (
                f"acts on the same target as that of {other} ({service.target}{where}): one action at a time for both"
            )
            yield document.problem_at(("services", name, "control"), what)


def _maps(value: Any) -> dict[str, Raw]:
    return {str(key): item for key, item in value.items() if isinstance(item, dict)} if isinstance(value, dict) else {}


def _via(host: Raw) -> list[str]:
    ssh = host.get("ssh")
    via = ssh.get("via") if isinstance(ssh, dict) else None
    return [via] if isinstance(via, str) else []


def _needs(service: Raw) -> list[str]:
    needs = service.get("depends_on")
    return [name for name in needs if isinstance(name, str)] if isinstance(needs, list) else []


def _unknown(
    document: Document, where: Location, name: str, known: Mapping[str, Raw], what: str
) -> Iterator[ConfigProblem]:
    if name not in known:
        hint = _hint(name, tuple(known)) if len(known) <= FEW else ""
        yield document.problem_at(where, f"there is no {what} {str(name)!r}{hint}")


@lru_cache(maxsize=1000)
def _hint(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _hosts(document: Document, hosts: Mapping[str, Raw]) -> Iterator[ConfigProblem]:
    for name, host in hosts.items():
        if host.get("collect"):
            yield from _shell(document, ("hosts", name, "collect"), hosts, name)
            yield from _carried(document, ("hosts", name, "collect"), host, host["collect"])
        for key in ("ssh", "control_ssh"):
            ssh = host.get(key)
            if isinstance(ssh, dict) and isinstance(ssh.get("via"), str):
                where = ("hosts", name, key, "via")
                yield from _unknown(document, where, ssh["via"], hosts, "host")
                if _is_wrapped(hosts.get(ssh["via"], {})):
                    yield document.problem_at(where, f"{ssh['via']} only runs its wrapper (ssh.wrapper)")
                if hosts.get(ssh["via"], {}).get("shell") == "local":
                    yield document.problem_at(where, f"{ssh['via']} is not reached over SSH")


def _services(
    document: Document, services: Mapping[str, Raw], hosts: Mapping[str, Raw], kinds: KindTables
) -> Iterator[ConfigProblem]:
    for name, service in services.items():
        host = service.get("host")
        if isinstance(host, str) and host:
            yield from _unknown(document, ("services", name, "host"), host, hosts, "host")
        for index, other in enumerate(_needs(service)):
            yield from _unknown(document, ("services", name, "depends_on", index), other, services, "service")
        for part, table in (("probe", kinds.probes), ("control", kinds.controls)):
            for kind in service[part] if isinstance(service.get(part), dict) else ():
                where = ("services", name, part, kind)
                options = table[kind].options if kind in table else None
                if getattr(options, "needs_host", False):
                    yield from _shell(document, where, hosts, host)
                if part == "probe" and kind in ("unit", "program"):
                    yield from _carried(document, where, hosts.get(str(host), {}), {kind: service[part][kind]})
                if part == "control" and getattr(options, "needs_host", False):
                    yield from _own_key(document, where, host, hosts.get(str(host), {}))
                if getattr(options, "needs_plain_shell", False) and _is_wrapped(hosts.get(str(host), {})):
                    yield document.problem_at(where, f"{host} takes no commands but its wrapper's (ssh.wrapper)")


def _carried(document: Document, where: Location, host: Raw, kinds: Raw) -> Iterator[ConfigProblem]:
    """Names that the wrapper of a host cannot be asked for."""
    if not _is_wrapped(host):
        return
    for kind, key in (("systemd", "units"), ("supervisor", "configs"), ("unit", "name"), ("program", "config")):
        options = kinds.get(kind)
        names = options.get(key) if isinstance(options, dict) else None
        for name in names if isinstance(names, list) else [names] if names else []:
            if CARRIES.fullmatch(str(name)) is None:
                yield document.problem_at(
                    where, f"{str(name)!r} holds what the host's wrapper does not take (ssh.wrapper)"
                )


def _recreated(
    document: Document, services: Mapping[str, Raw], hosts: Mapping[str, Raw], fleet: Raw
) -> Iterator[ConfigProblem]:
    """What makes a container anew cannot be listed beforehand, where a wrapper only runs what is."""
    for name, service in services.items():
        own = service.get("remediation")
        steps = own.get("steps") if isinstance(own, dict) and "steps" in own else fleet.get("steps")
        control, host = service.get("control"), hosts.get(str(service.get("host")), {})
        by_wrapper = isinstance(host.get("control_ssh"), dict) and host["control_ssh"].get("wrapper") is True
        if not by_wrapper or not isinstance(control, dict) or "docker" not in control or not isinstance(steps, list):
            continue
        for step in steps:
            options = step.get("recreate") if isinstance(step, dict) else {} if step == "recreate" else None
            if options is not None and not (isinstance(options, dict) and options.get("command")):
                where = ("services", name, "control", "docker")
                yield document.problem_at(where, "recreate wants a `command:` where the host's wrapper controls it")


def _maintenance(
    document: Document, remediation: Any, hosts: Mapping[str, Raw], services: Mapping[str, Raw]
) -> Iterator[ConfigProblem]:
    windows = remediation.get("maintenance") if isinstance(remediation, dict) else None
    groups: dict[str, Raw] = {str(host["group"]): {} for host in hosts.values() if host.get("group")}
    for index, window in enumerate(windows if isinstance(windows, list) else ()):
        for scope, known in (("service", services), ("host", hosts), ("group", groups)):
            name = window.get(scope) if isinstance(window, dict) else None
            if isinstance(name, str):
                yield from _unknown(document, ("remediation", "maintenance", index, scope), name, known, scope)


def _own_key(document: Document, where: Location, name: Any, host: Raw) -> Iterator[ConfigProblem]:
    """A key that only runs the wrapper controls nothing."""
    ssh, control = host.get("ssh"), host.get("control_ssh")
    own = control.get("key_file") if isinstance(control, dict) else None
    if _is_wrapped(host) and isinstance(ssh, dict) and own in (None, ssh.get("key_file")):
        yield document.problem_at(where, f"{name} needs `control_ssh: {{key_file: …}}`: its ssh.key_file only reads")


def _is_wrapped(host: Raw) -> bool:
    ssh = host.get("ssh")
    return isinstance(ssh, dict) and ssh.get("wrapper") is True


def _shell(document: Document, where: Location, hosts: Mapping[str, Raw], host: Any) -> Iterator[ConfigProblem]:
    if not host:
        yield document.problem_at(where, "runs on a host: the service needs `host:`")
        return
    known = hosts.get(host) if isinstance(host, str) else None
    if known is not None and known.get("shell") != "local" and known.get("ssh") is None:
        yield document.problem_at(where, f"runs on {host}, which has neither `ssh:` nor `shell: local`")


def _routes(document: Document, notify: Raw, channels: Mapping[str, Raw]) -> Iterator[ConfigProblem]:
    people = _maps(notify.get("people"))
    routes = notify.get("routes")
    for index, route in enumerate(routes if isinstance(routes, list) else ()):
        if not isinstance(route, dict):
            continue
        where = ("notify", "routes", index)
        yield from _named(document, (*where, "channels"), route.get("channels"), channels, "channel")
        yield from _named(document, (*where, "on_call"), route.get("on_call"), people, "person")
        further = route["escalate"].get("channels") if isinstance(route.get("escalate"), dict) else None
        yield from _named(document, (*where, "escalate", "channels"), further, channels, "channel")


def _named(
    document: Document, where: tuple[str | int, ...], names: Any, known: Mapping[str, Raw], what: str
) -> Iterator[ConfigProblem]:
    for place, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str):
            yield from _unknown(document, (*where, place), name, known, what)


def _circles(
    document: Document, section: str, key: tuple[str, ...], edges: Mapping[str, list[str]]
) -> Iterator[ConfigProblem]:
    """Names that one can walk back to: a depth-first search that tells of each circle at the edge that closes it."""
    done: set[str] = set()
    for start in edges:
        path: dict[str, None] = {}
        left: list[tuple[str, bool]] = [(start, False)]
        while left:
            name, leaving = left.pop()
            if leaving:
                path.pop(name, None)
                done.add(name)
            elif name not in done and name not in path:
                path[name] = None
                left.append((name, True))
                for other in edges.get(name, []):
                    if other in path:
                        yield document.problem_at((section, name, *key), f"leads back to itself, through {other}")
                    else:
                        left.append((other, False))
