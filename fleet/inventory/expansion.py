"""Expand what the configuration abbreviates: ranges, defaults of hosts, templates, targets, thresholds of services.

Everything after this works on hosts and services as if each had been written out.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fleet.inventory.documents import Document, as_map, as_maps
from fleet.inventory.host_selector import matches_host
from fleet.inventory.model import ProbeSettings, Service
from fleet.inventory.problems import ConfigProblem, Location
from fleet.inventory.references import map_texts, unmark_data
from fleet.inventory.targets import Target, make_id
from fleet.inventory.validation_errors import suggest_key
from fleet.inventory.yaml_files import TextWithBase

MOST = 100_000  # hosts of all ranges, and services of all templates
ERRORS_OF_SOURCE = 10  # that are reported
_RANGE = re.compile(r"(.*)\[(\d{1,6})-(\d{1,6})\](.*)", re.DOTALL)
# `${n}` is no placeholder, but a reference.
_NUMBER = re.compile(r"(?<!\$)\{n(?:([+-])(\d{1,6}))?\}")
_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_][A-Za-z0-9_.-]*)\}")
_FILE = re.compile(r"\$\$\{|\$\{file:([^}]*)\}")
_HOST_IN_ALL_SERVICES = ("host.name", "host.address")
_LATER = ("probe", "control")  # whose placeholders of the host and the service are filled in later, as for all services
_ONLY_IN_SERVICES = {
    "template": "a template cannot use another template",
    "parameters": "belongs beside `service`, not in it",
}
_RESERVED = {  # names of other placeholders
    "service": "the ID of the service",
    "component": "a component of the http control",
    "n": "the number of a host in a range",
    "target": "the address of a target",
}
Raw = dict[str, Any]


def expand(document: Document, targets: Mapping[str, Sequence[Target]]) -> list[ConfigProblem]:
    """Expand the sections `hosts` and `services` of a document in place; returns the problems.

    `targets` has those of each source in `services_from`.
    """
    expansion = _Expansion(document, targets)
    expansion.expand_ranges()
    expansion.inherit_host_defaults()
    expansion.apply_templates()
    expansion.inherit_service_thresholds()
    expansion.drop_disabled()
    return expansion.problems


class _Expansion:
    def __init__(self, document: Document, targets: Mapping[str, Sequence[Target]]) -> None:
        self._document, self._targets = document, targets
        self.problems: list[ConfigProblem] = []
        self._made: dict[str, str] = {}  # by service that a template made: of what
        for section in ("hosts", "services"):
            document.value[section] = _copy_entries(document.value.get(section, {}))
        self._hosts: Raw = document.value["hosts"]
        self._services: Raw = document.value["services"]

    def _add_problem(self, location: Location, message: str) -> None:
        self.problems.append(self._document.problem_at(location, message))

    def expand_ranges(self) -> None:
        """Replace `gpu-[01-20]` by gpu-01 to gpu-20; a host that is written out, too, overrides that of the range."""
        ranges = {name: match for name in self._hosts if (match := _RANGE.fullmatch(name)) is not None}
        made: dict[str, str] = {}  # by host: its range
        for name, match in ranges.items():
            body, (before, first, last, after) = self._hosts.pop(name), match.groups()
            if _RANGE.fullmatch(before) is not None:
                self._add_problem(("hosts", name), "a name may have only one range")
                continue
            numbers = range(int(first), int(last) + 1)
            if not numbers or len(made) + len(numbers) > MOST:
                message = (
                    f"all ranges together have more than {MOST} hosts" if numbers else "the range ends before it begins"
                )
                self._add_problem(("hosts", name), message)
                continue
            for number in numbers:
                host = f"{before}{number:0{len(first)}d}{after}"
                if host in made:
                    self._add_problem(("hosts", name), f"the range {made[host]} has the host {host}, too")
                    break
                made[host] = name
                own = self._hosts.get(host, {})
                self._hosts[host] = merge(map_texts(body, partial(_fill_numbers, number)), own)
                self._document.inherit(("hosts", host), ("hosts", name))

    def inherit_host_defaults(self) -> None:
        """Fill in `defaults.host`, and before that the defaults of each host's group."""
        written = as_map(self._document.value.get("defaults"))
        defaults, of_groups = as_map(written.get("host")), as_map(written.get("groups"))
        for name, host in self._hosts.items():
            if not isinstance(host, dict):
                continue
            group = host.get("group", defaults.get("group"))
            own_group = as_map(of_groups.get(group)) if isinstance(group, str) else {}
            inherited = merge(defaults, own_group)
            if host.get("shell", inherited.get("shell")) == "local":  # SSH settings are for other hosts
                inherited = {key: value for key, value in inherited.items() if key not in ("ssh", "control_ssh")}
            if inherited:
                self._hosts[name] = drop_empty(merge(inherited, host))
            if own_group:
                self._document.inherit(("hosts", name), ("defaults", "groups", str(group)))
            if defaults:
                self._document.inherit(("hosts", name), ("defaults", "host"))

    def apply_templates(self) -> None:
        """Add the services that templates make for hosts, and fill in services that name their template."""
        templates = as_maps(self._document.value.get("templates"))
        for name, template in templates.items():
            self._check_template(name, template)
        named: set[str] = set()
        for name, service in self._services.items():
            if _is_map(service) and "template" in service:
                named.add(str(service["template"]))
                self._fill_service(name, service, templates)
        sources = as_maps(self._document.value.get("services_from"))
        named |= {str(source.get("template")) for source in sources.values()}
        for name, template in templates.items():
            hosts = list(self._find_hosts(name, template))
            for host, parameters in hosts:
                self._add_service_of_host(name, template, host, parameters)
            if not hosts and name not in named:
                self._check_unused(name, template)
        for name, source in sources.items():
            self._apply_source(name, source, templates)
        if sources:
            self._drop_without_target()
        self._drop_choices(templates)

    def _drop_without_target(self) -> None:
        """Drop the keys that are written for the service of a target that is no longer there."""
        for name, service in list(self._services.items()):
            if name in self._made or not _is_map(service) or not service.get("enabled", True):
                continue
            if "probe" not in service and service.keys() <= Service.model_fields.keys():
                del self._services[name]
                message = "has no probe, and no target makes this service: it is left out"
                self._document.warnings.append(self._document.problem_at(("services", name), message))

    def _drop_choices(self, templates: Mapping[str, Raw]) -> None:
        """Drop the key `templates` of hosts; the model reports those that are no map."""
        for host, body in self._hosts.items():
            if not _is_map(as_map(body).get("templates")):
                continue
            for name in body.pop("templates"):
                if name not in templates:
                    self._add_problem(("hosts", host, "templates", name), f"there is no template {name!r}")

    def _check_template(self, name: str, template: Raw) -> None:
        for key, message in _ONLY_IN_SERVICES.items():
            if key in as_map(template.get("service")):
                self._add_problem(("templates", name, "service", key), message)
        for parameter, meaning in _RESERVED.items():
            if parameter in as_map(template.get("parameters")):
                message = f"{{{parameter}}} is {meaning}; choose another name"
                self._add_problem(("templates", name, "parameters", parameter), message)

    def _check_unused(self, name: str, template: Raw) -> None:
        """Warn of a template without services, and check the keys of its service, which nothing else does."""
        where: Location = ("templates", name, "for_hosts") if "for_hosts" in template else ("templates", name)
        reason = "no host matches" if "for_hosts" in template else "nothing uses it"
        message = f"{reason}: the template makes no services"
        self._document.warnings.append(self._document.problem_at(where, message))
        for key in as_map(template.get("service")):
            if key not in Service.model_fields:
                message = f"unknown key{suggest_key(Service, (key,))}"
                self._add_problem(("templates", name, "service", key), message)

    def _fill_service(self, name: str, service: Raw, templates: Mapping[str, Raw]) -> None:
        """Fill in a service from the template that it names."""
        where = ("services", name)
        wanted, parameters = service.pop("template"), service.pop("parameters", {})
        template = templates.get(wanted) if isinstance(wanted, str) else None
        if template is None:
            self._add_problem((*where, "template"), f"there is no template {wanted!r}")
            return
        values = self._find_values(str(wanted), template, parameters, (*where, "parameters"))
        if values is not None:
            host = service.get("host", as_map(template.get("service")).get("host", ""))
            filled = self._fill_template(template, values, str(host), name)
            self._services[name] = merge(filled, service)
            self._document.inherit(where, ("templates", str(wanted), "service"))
            self._check_placeholders(where, filled)

    def _find_hosts(self, name: str, template: Raw) -> Iterator[tuple[str, Any]]:
        """Yield the hosts of a template, which match or name it, with the parameters that each sets."""
        selector = template.get("for_hosts")
        for host, body in self._hosts.items():
            chosen = as_map(as_map(body).get("templates")).get(name)
            if chosen is False or not _is_map(body):
                continue
            group, labels = body.get("group", ""), as_map(body.get("labels"))
            if chosen is not None or (isinstance(selector, dict) and matches_host(selector, host, group, labels)):
                yield host, {} if chosen in (None, True) else chosen

    def _add_service_of_host(self, name: str, template: Raw, host: str, parameters: Any) -> None:
        values = self._find_values(name, template, parameters, ("hosts", host, "templates", name))
        if values is None:
            return
        pattern = template.get("id", f"{name}-{{host.name}}")
        id_ = _fill_text(str(pattern), self._host_values(host, "") | values)
        where: Location = ("templates", name, "id") if "id" in template else ("templates", name)
        if self._claim(id_, f"the template {name}", self._document.problem_at(where, "")):
            service = {**self._fill_template(template, values, host, id_), "host": host}
            self._make_service(id_, name, service)
            self._check_placeholders(("services", id_), service)

    def _claim(self, id_: str, maker: str, problem: ConfigProblem) -> bool:
        """Note who makes a service; adds the problem if it exists already, or if there are too many."""
        if id_ not in self._made and len(self._made) < MOST:
            self._made[id_] = maker
            return True
        message = f"all templates together make more than {MOST} services"
        if id_ in self._made:
            message = f"{self._made[id_]} makes the service {id_}, too"
        self.problems.append(replace(problem, message=message))
        return False

    def _make_service(self, id_: str, template: str, service: Raw) -> None:
        """Add a service that a template makes; keys of a service with this ID that is written out come first."""
        self._services[id_] = merge(service, self._services.get(id_, {}))
        self._document.inherit(("services", id_), ("templates", template, "service"))

    def _apply_source(self, name: str, source: Raw, templates: Mapping[str, Raw]) -> None:
        """Add the services that the targets of a source make with its template."""
        where: Location = ("services_from", name)
        wanted, targets = source.get("template"), self._targets.get(name, ())
        template = templates.get(wanted) if isinstance(wanted, str) else None
        if template is None:
            if wanted is not None:  # the model reports that it is missing
                self._add_problem((*where, "template"), f"there is no template {wanted!r}")
            return
        if not targets:
            message = "it has no targets and makes no services"
            self._document.warnings.append(self._document.problem_at(where, message))
        declared, given = as_map(template.get("parameters")), source.get("parameters", {})
        from_labels = {"parameters": dict.fromkeys(declared, "")}
        if self._find_values(str(wanted), from_labels, given, (*where, "parameters")) is None:
            return
        base = wanted.base if isinstance(wanted, TextWithBase) else Path()
        incomplete = 0
        for target in targets:
            values = {**declared, **target.find_values(declared, base), **given}
            if missing := [key for key, value in values.items() if value is None]:
                message = f"the target {target.address} has no label {missing[0]}, which the template {wanted} needs"
                self.problems.append(ConfigProblem(target.file, target.line, "", message))
                incomplete += 1
                if incomplete == ERRORS_OF_SOURCE:
                    return
            else:
                self._add_service_of_target(str(wanted), template, target, values)

    def _add_service_of_target(self, name: str, template: Raw, target: Target, values: Raw) -> None:
        id_ = make_id(_fill_text(str(template.get("id", f"{name}-{{target}}")), values))
        problem = ConfigProblem(target.file, target.line, "", "")
        own = as_map(as_map(self._services.get(id_)).get("probe")) if id_ not in self._made else {}
        if own.keys() - ProbeSettings.model_fields.keys():
            # What is written for the service of a target changes settings of that. A target changes no other service.
            written = self._document.find_origin(("services", id_))
            message = f"the target {target.address} would change the service {id_}, which has its own probe ({written})"
            self.problems.append(replace(problem, message=message))
        elif self._claim(id_, f"the target {target.address}", problem):
            host = unmark_data(_fill_text(str(as_map(template.get("service")).get("host", "")), values))
            host = host or self._host_of_address.get(target.host, "")
            service = self._fill_template(template, values, host, id_)
            self._make_service(id_, name, {**service, "host": host} if host else service)
            self._document.add_place(("services", id_), f"{target.file}:{target.line}")
            self._check_placeholders(("services", id_), service)

    def _find_values(self, name: str, template: Raw, given: Any, where: Location) -> Raw | None:
        """Return the values of a template's parameters; None if some are missing or unknown."""
        declared = as_map(template.get("parameters"))
        if not _is_map(given):
            flag = ", or true or false" if where[0] == "hosts" else ""
            self._add_problem(where, f"must be a map of parameters{flag}{' (it is empty)' if given is None else ''}")
            return None
        if unknown := [each for each in given if each not in declared]:
            known = ", ".join(declared) or "none"
            self._add_problem((*where, unknown[0]), f"the template {name} has no such parameter (known: {known})")
            return None
        values = {**declared, **given}
        if missing := [each for each, value in values.items() if value is None]:
            self._add_problem(where, f"the parameter {missing[0]} of the template {name} has no value")
            return None
        return values

    def _fill_template(self, template: Raw, values: Raw, host: str, service: str) -> Raw:
        """Return the service of a template with its placeholders filled in."""
        known = self._host_values(host, service) | values
        later = {key: value for key, value in known.items() if key not in ("service", *_HOST_IN_ALL_SERVICES)}
        return {
            key: _fill(value, later if key in _LATER else known)
            for key, value in as_map(template.get("service")).items()
        }

    def _check_placeholders(self, where: Location, value: Any) -> None:
        """Report placeholders of a host that it has no value for, and which would stay as they are written."""
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._check_placeholders((*where, key), item)
        elif isinstance(value, TextWithBase) and "{host." in value:
            for match in _PLACEHOLDER.finditer(value):
                if match[1].startswith("host.") and match[1] not in _HOST_IN_ALL_SERVICES:
                    self._add_problem(where, f"the host has no value for {match[0]}")

    @cached_property
    def _host_of_address(self) -> Mapping[str, str]:
        """The hosts by name and by address, those with an address of their own."""
        addresses = [(str(as_map(body).get("address", "")).lower(), name) for name, body in self._hosts.items()]
        count = Counter(address for address, _ in addresses)
        return {address: name for address, name in addresses if count[address] == 1} | {
            name: name for name in self._hosts
        }

    def _host_values(self, host: str, service: str) -> Raw:
        body = as_map(self._hosts.get(host))
        values = {"service": service, "host.name": host}
        values |= {f"host.{key}": body[key] for key in ("address", "group") if key in body}
        return values | {f"host.labels.{key}": value for key, value in as_map(body.get("labels")).items()}

    def inherit_service_thresholds(self) -> None:
        """Fill in `defaults.thresholds`; the other defaults of services are filled in after their placeholders."""
        thresholds = as_map(self._document.value.get("defaults")).get("thresholds")
        for name, service in self._services.items() if _is_map(thresholds) else ():
            if _is_map(service):
                self._services[name] = {**service, "thresholds": merge(thresholds, service.get("thresholds", {}))}
                self._document.inherit(("services", name, "thresholds"), ("defaults", "thresholds"))

    def drop_disabled(self) -> None:
        """Drop hosts and services with `enabled: false`, the services of such hosts, and what refers to them.

        Dependencies and maintenance windows do; a jump host that is not enabled is an error.
        """
        hosts = self._drop(self._hosts, "hosts")
        for service in self._services.values():
            if _is_map(service) and str(service.get("host")) in hosts:
                service["enabled"] = False
        services = self._drop(self._services, "services")
        groups = _find_groups(hosts.values()) - _find_groups(self._hosts.values())
        self._document.disabled = {"host": hosts.keys(), "service": services.keys(), "group": groups}
        for name, service in self._services.items():
            if _is_map(service) and isinstance(service.get("depends_on"), list):
                service["depends_on"] = self._document.remove_items(
                    ("services", name, "depends_on"), service["depends_on"], remove=lambda each: str(each) in services
                )
        remediation = as_map(self._document.value.get("remediation"))
        if isinstance(remediation.get("maintenance"), list):
            windows = self._document.remove_items(
                ("remediation", "maintenance"), remediation["maintenance"], remove=self._is_disabled
            )
            self._document.value["remediation"] = {**remediation, "maintenance": windows}

    def _is_disabled(self, window: Any) -> bool:
        """Whether a maintenance window is of a host, group or service that is not enabled."""
        return any(str(as_map(window).get(scope)) in names for scope, names in self._document.disabled.items())

    def _drop(self, entries: Raw, section: str) -> Raw:
        """Drop the entries that are not enabled, and return them."""
        dropped = {}
        for name, body in list(entries.items()):
            enabled = as_map(body).pop("enabled", True)
            if not isinstance(enabled, bool):
                self._add_problem((section, name, "enabled"), "must be true or false")
            elif not enabled:
                dropped[name] = entries.pop(name)
        return dropped


def _find_groups(hosts: Iterable[Any]) -> set[str]:
    return {str(body["group"]) for body in hosts if _is_map(body) and "group" in body}


def merge(base: Any, own: Any) -> Any:
    """Return `base` with what `own` has: maps are merged key by key, everything else is replaced."""
    if not _is_map(base) or not _is_map(own):
        return own
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in own.items()}}


def drop_empty(host: Raw) -> Raw:
    """Return a host without the defaults that it has replaced by nothing."""
    return {
        key: {name: each for name, each in value.items() if each is not None} if key == "collect" else value
        for key, value in host.items()
        if value is not None
    }


def _copy_entries(section: Raw) -> Raw:
    """Return a section whose entries can be changed one by one: entries of YAML aliases are the same map."""
    return {name: dict(body) if _is_map(body) else body for name, body in section.items()}


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def fill_number(number: int, text: str) -> str:
    """Return a text of a range with the number of a host, for which it has `{n}`, `{n+10}` or `{n-10}`."""

    def replace(match: re.Match[str]) -> str:
        return str(number + (int(f"{match[1]}{match[2]}") if match[1] else 0))

    return _NUMBER.sub(replace, text)


def _fill_numbers(number: int, text: TextWithBase) -> TextWithBase:
    return TextWithBase(fill_number(number, text), text.base) if "{n" in text else text


def _fill(value: Any, values: Raw) -> Any:
    """Return a part of a template with placeholders filled in.

    A text that is only one placeholder becomes the value itself, which may be a list or a map, or a text of another
    directory.
    """

    def fill(text: TextWithBase) -> Any:
        whole = _PLACEHOLDER.fullmatch(text)
        if whole is not None and isinstance(values.get(whole[1]), TextWithBase | list | dict):
            return values[whole[1]]
        filled = _fill_text(text, values, text.base)
        return TextWithBase(filled, text.base) if filled != text else text

    return map_texts(value, fill)


def _fill_text(text: str, values: Raw, base: Path | None = None) -> str:
    """Return a text with its placeholders filled in; unknown ones stay.

    With `base`, files that values refer to are named relative to it.
    """

    def find(match: re.Match[str]) -> str:
        value = values.get(match[1], match[0])
        if isinstance(value, TextWithBase) and base not in (None, value.base):
            return _FILE.sub(lambda reference: _rebase(reference, value.base, base), value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    return _PLACEHOLDER.sub(find, text)


def _rebase(reference: re.Match[str], base: Path, other: Path) -> str:
    """Return a reference to a file relative to another directory, as the directories may be moved together."""
    if reference[1] is None or Path(reference[1].strip()).is_absolute():
        return reference[0]
    return f"${{file:{os.path.relpath(base / reference[1].strip(), other)}}}"
