"""Checks across the configuration: names that do not exist, cycles, hosts that cannot run what they must run.

`find_errors` works on the raw maps, so that an error elsewhere does not hide these.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from fleet.inventory.documents import Document, as_map, as_maps
from fleet.inventory.gateway_warnings import find_gateway_warnings
from fleet.inventory.host_selector import matches_host
from fleet.inventory.kinds import ConfigurableKind, KindTables
from fleet.inventory.model import Host, Inventory
from fleet.inventory.problems import ConfigProblem, Location
from fleet.inventory.runbooks import HOST_ALERTS, OTHER_ALERTS, UNREACHABLE_ALERTS
from fleet.inventory.units import as_list, format_duration
from fleet.inventory.yaml_files import TextWithBase

Raw = Mapping[str, Any]
WRAPPER_ARGUMENT = re.compile(r"[A-Za-z0-9@:._/-]+")  # the names that a host's wrapper accepts
SUGGESTION_LIMIT = 20_000  # names among which a similar one is searched for


def find_errors(document: Document, raw: Raw, kinds: KindTables) -> list[ConfigProblem]:
    """Return unknown hosts, services and channels, commands without a host to run on, and cycles."""
    hosts, services = as_maps(raw.get("hosts")), as_maps(raw.get("services"))
    checker = _Checker(document, hosts, services, kinds)
    notify, remediation = as_map(raw.get("notify")), as_map(raw.get("remediation"))
    return [
        *checker.check_hosts(),
        *checker.check_services(),
        *checker.check_unique(),
        *checker.check_recreate(remediation),
        *checker.check_maintenance(remediation),
        *checker.check_runbooks(as_maps(raw.get("runbooks"))),
        *checker.check_routes(notify),
        *checker.check_calendars(notify),
        *checker.check_reports(notify),
        *checker.check_tunnels(),
        *checker.check_dependencies(),
        *checker.check_upstreams(as_map(raw.get("gateway"))),
    ]


def find_warnings(document: Document, inventory: Inventory) -> Iterator[ConfigProblem]:
    """Yield what is valid, and more often a mistake than intended."""
    first: dict[tuple[str, str], str] = {}
    default_timeout = document.is_written(("defaults", "probe", "timeout"))
    for name, service in inventory.services.items():
        probe = service.probe
        has_timeout = default_timeout or document.is_written(("services", name, "probe", "timeout"))
        if has_timeout and probe.timeout > probe.every:
            message = (
                f"timeout ({format_duration(probe.timeout)}) is longer than every ({format_duration(probe.every)}): "
                "a slow probe delays the next one"
            )
            yield document.problem_at(("services", name, "probe", "timeout"), message)
        if service.on_failure == "restart" and service.control is None:
            message = "on_failure is restart, but the service has no `control:`: it is never restarted"
            yield document.problem_at(("services", name, "on_failure"), message)
        other = first.setdefault((service.host, service.target), name)
        if other != name and service.control is not None:
            where = f" on {service.host}" if service.host else ""
            message = f"same target as {other} ({service.target}{where}): only one action at a time runs for both"
            yield document.problem_at(("services", name, "control"), message)
        host = inventory.hosts.get(service.host)
        if service.control is not None and host is not None:
            for verb, message in _find_unsafe_paths(service.control.options, host):
                yield document.problem_at(("services", name, "control", service.control.kind, verb), message)
    yield from _find_heartbeat_warnings(document, inventory)
    yield from (document.problem_at(*each) for each in find_gateway_warnings(inventory.gateway))
    for name, runbook in inventory.runbooks.items():
        hosts = inventory.hosts_of_runbook(runbook)
        if not hosts:
            yield document.problem_at(("runbooks", name), "no host matches: it is never run")
        for key, message in dict.fromkeys(each for host in hosts for each in _find_unsafe_paths(runbook, host)):
            yield document.problem_at(("runbooks", name, key), message)


def _find_heartbeat_warnings(document: Document, inventory: Inventory) -> Iterator[ConfigProblem]:
    """Yield heartbeats with the same slug, and those that restarts cannot help in time."""
    first: dict[str, str] = {}
    for name, service in inventory.services.items():
        probe, control = service.probe, service.control
        if not probe.is_reported:
            continue
        slug = getattr(probe.options, "slug", None) or name
        other = first.setdefault(slug, name)
        if other != name:
            message = f"same slug as {other} ({slug}): only the URLs with their UUIDs work; or set different slugs"
            yield document.problem_at(("services", name, "probe", probe.kind, "slug"), message)
        if control is None or service.on_failure != "restart":
            continue
        interval = probe.options.longest_interval()
        if control.start_within < interval:
            message = (
                f"start_within ({format_duration(control.start_within)}) is shorter than the time between two pings "
                f"({format_duration(interval)}): a restart fails before the next ping can show that it has helped"
            )
            yield document.problem_at(("services", name, "control", "start_within"), message)


def _find_unsafe_paths(options: BaseModel, host: Host) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with paths that root uses and that are in the account's home or in a temporary directory."""
    if host.sudo.mode == "none":
        return
    account = host.ssh_for(control=True).user if host.shell == "ssh" else None
    folders = ("/tmp/", "/var/tmp/", "/dev/shm/", *([f"/home/{account}/"] if account else []))  # noqa: S108 - nothing is created
    for key, value in options:
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and word.startswith(folders):
                yield key, f"root uses {word}, which others can probably change: move it, for example to /usr/local"


def _find_alert_problem(alert: Any) -> str | None:
    """Return why there can be no runbook for a shipped alert of this name; the model reports what is no text."""
    if not isinstance(alert, str) or alert in HOST_ALERTS:
        return None
    if alert in UNREACHABLE_ALERTS:
        return f"while {alert} fires, nothing can be run on the host"
    if alert in OTHER_ALERTS:
        return f"{alert} is not about a host: only alerts with the label `host` and without `service` have runbooks"
    suggestion = _suggest(alert, tuple(sorted(HOST_ALERTS)))
    return f"there is no alert {str(alert)!r} about hosts; one of your own rules belongs in `own_alerts`{suggestion}"


def _is_unresolved(text: str) -> bool:
    """Whether a text has a reference that this program does not resolve."""
    return isinstance(text, TextWithBase) and text.pending


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _via(host: Raw, key: str) -> str | None:
    via = as_map(host.get(key)).get("via")
    return via if isinstance(via, str) else None


def _dependencies(service: Raw) -> list[str]:
    return [name for name in _list(service.get("depends_on")) if isinstance(name, str)]


def _is_wrapped(host: Raw, key: str = "ssh") -> bool:
    return as_map(host.get(key)).get("wrapper") is True


@lru_cache(maxsize=1000)
def _suggest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _find_cycles(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Search depth first; yield the names of each cycle, of which the last closes it and is also the first."""
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
                        names = list(path)
                        yield [*names[names.index(other) :], other]
                    else:
                        left.append((other, False))


@dataclass(frozen=True)
class _Checker:
    document: Document
    hosts: Mapping[str, Raw]
    services: Mapping[str, Raw]
    kinds: KindTables

    def check_hosts(self) -> Iterator[ConfigProblem]:
        for name, host in self.hosts.items():
            if host.get("collect"):
                where = ("hosts", name, "collect")
                yield from self._check_shell(where, name)
                for kind, options in as_map(host["collect"]).items() if _is_wrapped(host) else ():
                    yield from self._check_wrapper_arguments(where, host, self.kinds.collectors.get(kind), options)
            for key in ("ssh", "control_ssh"):
                via = _via(host, key)
                if via is not None:
                    yield from self._check_via(("hosts", name, key, "via"), via)

    def check_upstreams(self, gateway: Raw) -> Iterator[ConfigProblem]:
        """Yield upstreams that do not exist, or that would replace themselves."""
        upstreams = as_maps(gateway.get("upstreams"))
        if isinstance(default := gateway.get("default"), str):
            yield from self._check_known(("gateway", "default"), default, upstreams, "upstream")
        for name, upstream in upstreams.items():
            where = ("gateway", "upstreams", name)
            fallback = upstream.get("fallback")
            yield from self._check_names((*where, "fallback"), fallback, upstreams, "upstream")
            if name in _list(fallback):
                yield self.document.problem_at((*where, "fallback"), "an upstream cannot replace itself")

    def _check_via(self, where: Location, via: str) -> Iterator[ConfigProblem]:
        yield from self._check_known(where, via, self.hosts, "host")
        jump_host = self.hosts.get(via, {})
        if _is_wrapped(jump_host):
            yield self.document.problem_at(where, f"{via} accepts only its wrapper's commands (ssh.wrapper)")
        if jump_host.get("shell") == "local":
            yield self.document.problem_at(where, f"{via} is not reached over SSH (shell: local)")

    def check_services(self) -> Iterator[ConfigProblem]:
        for name, service in self.services.items():
            host = service.get("host")
            if isinstance(host, str) and host:
                yield from self._check_known(("services", name, "host"), host, self.hosts, "host")
            for index, other in enumerate(_dependencies(service)):
                yield from self._check_known(("services", name, "depends_on", index), other, self.services, "service")
            for kind, options in as_map(service.get("probe")).items():
                yield from self._check_probe(("services", name, "probe", kind), host, kind, options)
            for kind, options in as_map(service.get("control")).items():
                yield from self._check_control(("services", name, "control", kind), host, kind)
                if "components" in as_map(options):
                    yield from self._check_components(("services", name, "control", kind), service, as_map(options))

    def _check_probe(self, where: Location, host: Any, kind: str, written: Any) -> Iterator[ConfigProblem]:
        known = self.kinds.probes.get(kind)
        options = known.options if known is not None else None
        raw_host = self.hosts.get(str(host), {})
        if getattr(options, "needs_host", False):
            yield from self._check_shell(where, host)
        yield from self._check_wrapper_arguments(where, raw_host, known, written)
        if getattr(options, "needs_plain_shell", False) and _is_wrapped(raw_host):
            yield self.document.problem_at(where, f"{host} accepts only its wrapper's commands (ssh.wrapper)")

    def _check_control(self, where: Location, name: Any, kind: str) -> Iterator[ConfigProblem]:
        known = self.kinds.controls.get(kind)
        if known is not None and getattr(known.options, "needs_host", False):
            yield from self._check_control_shell(where, name)

    def _check_control_shell(self, where: Location, name: Any) -> Iterator[ConfigProblem]:
        yield from self._check_shell(where, name)
        # A key that may only run the wrapper's `read` controls nothing.
        host = self.hosts.get(str(name), {})
        key_file, control_key_file = (as_map(host.get(key)).get("key_file") for key in ("ssh", "control_ssh"))
        if _is_wrapped(host) and control_key_file in (None, key_file):
            message = f"{name} needs `control_ssh: {{key_file: …}}`: its ssh.key_file may only read (ssh.wrapper)"
            yield self.document.problem_at(where, message)

    def _check_components(self, where: Location, service: Raw, control: Raw) -> Iterator[ConfigProblem]:
        """Check that the probe of a service whose control restarts components reports them, and that it may restart."""
        for kind in as_map(service.get("probe")):
            known = self.kinds.probes.get(kind)
            if known is not None and not getattr(known.options, "reports_components", False):
                message = f"the probe {kind} does not report components; use the probe status"
                yield self.document.problem_at((*where, "components"), message)
        if (
            as_map(control.get("component")).get("automatic") is True
            and service.get("on_failure", "notify") == "notify"
        ):
            message = "components are restarted automatically only with `on_failure: restart`"
            yield self.document.problem_at((*where, "component", "automatic"), message)

    def _check_wrapper_arguments(
        self, where: Location, host: Raw, kind: ConfigurableKind | None, written: Any
    ) -> Iterator[ConfigProblem]:
        keys = getattr(kind.options, "wrapper_arguments", ()) if kind is not None and _is_wrapped(host) else ()
        convert = getattr(kind.options, "to_wrapper_argument", str) if kind is not None else str
        for key, names in ((key, as_map(written).get(key)) for key in keys):
            for name in names if isinstance(names, list) else [names] if names else []:
                if WRAPPER_ARGUMENT.fullmatch(convert(str(name))) is None:
                    message = (
                        f"{key}: {str(name)!r} has characters that the host's wrapper does not accept (ssh.wrapper)"
                    )
                    yield self.document.problem_at(where, message)

    def check_unique(self) -> Iterator[ConfigProblem]:
        """Find services that share what must differ, such as the UUID of a heartbeat."""
        first: dict[tuple[str, str, str], str] = {}
        for name, service in self.services.items():
            for kind, written in as_map(service.get("probe")).items():
                known = self.kinds.probes.get(kind)
                for key in getattr(known.options, "unique", ()) if known is not None else ():
                    value = as_map(written).get(key)
                    if not isinstance(value, str) or _is_unresolved(value):
                        continue
                    other = first.setdefault((kind, key, value.lower()), name)
                    if other != name:
                        message = f"the service {other} has the same {key}"
                        yield self.document.problem_at(("services", name, "probe", kind, key), message)

    def check_recreate(self, remediation: Raw) -> Iterator[ConfigProblem]:
        """Find hosts whose wrapper must recreate a container: it runs only commands that are known beforehand."""
        for name, service in self.services.items():
            if not _is_wrapped(self.hosts.get(str(service.get("host")), {}), "control_ssh"):
                continue
            own = as_map(service.get("remediation"))
            steps = _list(own.get("steps") if "steps" in own else remediation.get("steps"))
            controls = self.kinds.controls
            kinds = [kind for kind in as_map(service.get("control")) if kind in controls]
            recreating = [kind for kind in kinds if getattr(controls[kind].options, "can_recreate", False)]
            without_command = any(
                step == "recreate"
                or (isinstance(step, dict) and "recreate" in step and not as_map(step["recreate"]).get("command"))
                for step in steps
            )
            for kind in recreating if without_command else ():
                message = "the step recreate needs a `command:` where the host's wrapper runs it (control_ssh.wrapper)"
                yield self.document.problem_at(("services", name, "control", kind), message)

    def check_runbooks(self, runbooks: Mapping[str, Raw]) -> Iterator[ConfigProblem]:
        """Find alerts that do not exist or are about no host, and hosts that do not exist or can run nothing."""
        for name, runbook in runbooks.items():
            alerts, own_alerts = (_list(runbook.get(key)) for key in ("alerts", "own_alerts"))
            if not alerts and not own_alerts:
                yield self.document.problem_at(("runbooks", name), "has neither `alerts` nor `own_alerts`")
            for index, alert in enumerate(alerts):
                if (message := _find_alert_problem(alert)) is not None:
                    yield self.document.problem_at(("runbooks", name, "alerts", index), message)
            for index, alert in enumerate(own_alerts):
                if alert in HOST_ALERTS | OTHER_ALERTS | UNREACHABLE_ALERTS:
                    message = f"{alert} is an alert of Defib's own rules: it belongs in `alerts`"
                    yield self.document.problem_at(("runbooks", name, "own_alerts", index), message)
            yield from self._check_hosts_of_runbook(name, runbook)

    def _check_hosts_of_runbook(self, name: str, runbook: Raw) -> Iterator[ConfigProblem]:
        selector, where = as_map(runbook.get("hosts")), ("runbooks", name, "hosts")
        known: dict[str, Mapping[str, Raw]] = {"group": self._groups, "names": self.hosts}
        for key, what in (("group", "group"), ("names", "host")):
            for each in as_list(selector.get(key, [])):
                if isinstance(each, str) and re.search(r"[*?\[]", each) is None and not _is_unresolved(each):
                    yield from self._check_known((*where, key), each, known[key], what)
        for host, body in self.hosts.items():
            is_selected = matches_host(selector, host, str(body.get("group", "")), as_map(body.get("labels")))
            if selector:
                yield from self._check_control_shell(where, host) if is_selected else ()
            elif body.get("shell") == "local" or body.get("ssh") is not None:
                yield from self._check_control_shell(("runbooks", name), host)

    @property
    def _groups(self) -> dict[str, Raw]:
        return {str(host["group"]): {} for host in self.hosts.values() if host.get("group")}

    def check_maintenance(self, remediation: Raw) -> Iterator[ConfigProblem]:
        groups = self._groups
        for index, window in enumerate(_list(remediation.get("maintenance"))):
            for scope, known in (("service", self.services), ("host", self.hosts), ("group", groups)):
                name = as_map(window).get(scope)
                if isinstance(name, str):
                    yield from self._check_known(("remediation", "maintenance", index, scope), name, known, scope)

    def check_routes(self, notify: Raw) -> Iterator[ConfigProblem]:
        channels, people = as_maps(notify.get("channels")), as_maps(notify.get("people"))
        calendars = as_maps(notify.get("calendars"))
        on_call = "person or calendar" if calendars else "person"
        for index, route in enumerate(_list(notify.get("routes"))):
            where = ("notify", "routes", index)
            own, escalate = as_map(route), as_map(as_map(route).get("escalate"))
            yield from self._check_names((*where, "channels"), own.get("channels"), channels, "channel")
            yield from self._check_names((*where, "on_call"), own.get("on_call"), people | calendars, on_call)
            yield from self._check_names(
                (*where, "escalate", "channels"), escalate.get("channels"), channels, "channel"
            )

    def check_calendars(self, notify: Raw) -> Iterator[ConfigProblem]:
        people = as_maps(notify.get("people"))
        for name, calendar in as_maps(notify.get("calendars")).items():
            where = ("notify", "calendars", name)
            if name in people:
                yield self.document.problem_at(where, "a person has the same name; rename one of them")
            yield from self._check_names((*where, "rotation"), calendar.get("rotation"), people, "person")
            for index, override in enumerate(_list(calendar.get("overrides"))):
                person = as_map(override).get("person")
                if isinstance(person, str):
                    yield from self._check_known((*where, "overrides", index, "person"), person, people, "person")

    def check_reports(self, notify: Raw) -> Iterator[ConfigProblem]:
        channels = as_maps(notify.get("channels"))
        named = as_map(notify.get("reports")).get("channels")
        yield from self._check_names(("notify", "reports", "channels"), named, channels, "channel")

    def check_tunnels(self) -> Iterator[ConfigProblem]:
        """Find cycles of `via`, among the connections that read and among those that control."""
        reading = {name: [via] if (via := _via(host, "ssh")) else [] for name, host in self.hosts.items()}
        for cycle in _find_cycles(reading):
            yield self._cycle_at(("hosts", cycle[-2], "ssh", "via"), cycle)
        own = {name: [via] for name, host in self.hosts.items() if (via := _via(host, "control_ssh")) is not None}
        for cycle in _find_cycles({**reading, **own}):
            with_own = [name for name in cycle[:-1] if name in own]
            if with_own:  # else it is a cycle of `ssh.via`
                yield self._cycle_at(("hosts", with_own[-1], "control_ssh", "via"), cycle)

    def check_dependencies(self) -> Iterator[ConfigProblem]:
        dependencies = {name: _dependencies(service) for name, service in self.services.items()}
        for cycle in _find_cycles(dependencies):
            yield self._cycle_at(("services", cycle[-2], "depends_on"), cycle)

    def _cycle_at(self, where: Location, cycle: list[str]) -> ConfigProblem:
        return self.document.problem_at(where, f"cycle: {' → '.join(cycle)}")

    def _check_known(self, where: Location, name: str, known: Mapping[str, Raw], what: str) -> Iterator[ConfigProblem]:
        if name not in known and name in self.document.disabled.get(what, ()):
            yield self.document.problem_at(where, f"the {what} {str(name)!r} is not enabled")
        elif name not in known:
            suggestion = _suggest(name, tuple(known)) if len(known) <= SUGGESTION_LIMIT else ""
            yield self.document.problem_at(where, f"there is no {what} {str(name)!r}{suggestion}")

    def _check_names(
        self, where: tuple[str | int, ...], names: Any, known: Mapping[str, Raw], what: str
    ) -> Iterator[ConfigProblem]:
        for index, name in enumerate(_list(names)):
            if isinstance(name, str):
                yield from self._check_known((*where, index), name, known, what)

    def _check_shell(self, where: Location, host: Any) -> Iterator[ConfigProblem]:
        if not host:
            yield self.document.problem_at(where, "runs on a host: the service needs `host:`")
            return
        known = self.hosts.get(host) if isinstance(host, str) else None
        if known is not None and known.get("shell") != "local" and known.get("ssh") is None:
            yield self.document.problem_at(where, f"runs on {host}, which has neither `ssh:` nor `shell: local`")
