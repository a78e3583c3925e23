"""`defib doctor`: checks of a whole installation, each with a result and what to do."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import SecretStr

from defib.doctor import channels, database, gateway, heartbeats, hosts, monitoring, programs
from defib.doctor.files import check_files
from defib.doctor.findings import Finding, check_with_timeout
from defib.doctor.server import ServerCheck, check_server
from defib.doctor.sign_in import check_sign_in
from defib.doctor.sources import SUBJECT, check_sources
from defib.lookup import find_host
from defib.output import format_size, print_json, print_lines, print_text
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Host
from fleet.inventory.problems import ConfigurationError
from fleet.inventory.references import Program
from remediator.execution.controls import CONTROLS
from runtime import tokens
from runtime.errors import StartError
from runtime.redaction import Redactor

CONCURRENT_HOSTS = 500
HOST_TIMEOUT, SERVER_TIMEOUT = 25.0, 25.0  # seconds for all checks of one host or server
SERVERS: tuple[tuple[str, ServerCheck], ...] = (
    ("exporter", programs.check_exporter),
    ("remediator", programs.check_remediator),
    ("console", programs.check_console),
    ("gateway", gateway.check_gateway),
    ("prometheus", monitoring.check_prometheus),
    ("alertmanager", monitoring.check_alertmanager),
    ("grafana", monitoring.check_grafana),
)


async def run(
    load: Callable[[], LoadedInventory],
    names: Sequence[str],
    programs: Collection[Program],
    *,
    token_file: Path | None,
    send: bool,
    as_json: bool,
) -> int:
    """Check the installation, or only the named hosts, and print one line per finding; return 1 if a check fails.

    Only what `programs` need is checked: they may run as different users. With `send`, send a test message to each
    channel.
    """
    try:
        loaded = load()
        selected = [find_host(loaded.inventory, name) for name in names]
        _require_references(loaded, names, programs)
    except ConfigurationError as error:
        fix = "fix it; `defib check` prints all errors, `defib init DIR` writes a first configuration"
        findings = [Finding("configuration", "loads", "fail", str(wrong), fix) for wrong in error.problems]
        return _print_findings(findings, as_json=as_json)
    except StartError as error:
        fix = "create one with `defib init DIR`, or name its directory with --config or $DEFIB_CONFIG"
        return _print_findings([Finding("configuration", "loads", "fail", str(error), fix)], as_json=as_json)
    if token_file is not None:
        loaded = _with_token(loaded, tokens.read_token(token_file))
    every_host = [host for host in loaded.inventory.hosts.values() if host.has_shell]
    work = [_check_hosts(loaded, selected or every_host, programs)]
    if not names:
        work.insert(0, _check_all_but_hosts(loaded, programs, send=send))
    redact = Redactor(loaded.secrets)
    parts = await asyncio.gather(*work)
    findings = [replace(each, detail=redact(each.detail)) for each in chain.from_iterable(parts)]
    return _print_findings(findings, as_json=as_json)


def _require_references(loaded: LoadedInventory, hosts: Sequence[str], programs: Collection[Program]) -> None:
    """Check that all references are resolved that the checks of some hosts need. Raises ConfigurationError."""
    controlled = [
        f"services.{name}.control"
        for name, service in loaded.inventory.services.items()
        if service.host in hosts and service.control and CONTROLS[service.control.kind].options.needs_host
    ]
    connections = [
        section
        for name in hosts
        for program, control in (("exporter", False), ("remediator", True))
        if program in programs
        for section in loaded.connection_sections(name, control=control)
    ]
    loaded.require_resolved(*connections, *(controlled if "remediator" in programs else ()))


def _with_token(loaded: LoadedInventory, token: SecretStr) -> LoadedInventory:
    settings = loaded.inventory.remediator.model_copy(update={"token": token})
    inventory = loaded.inventory.model_copy(update={"remediator": settings})
    return replace(loaded, inventory=inventory, secrets=loaded.secrets | {token.get_secret_value()})


def _print_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    if as_json:
        print_json({"findings": [asdict(each) for each in findings]})
    else:
        counts = {result: sum(1 for each in findings if each.result == result) for result in ("pass", "warn", "fail")}
        print_lines(map(str, findings))
        print_text(", ".join(f"{count} {result}" for result, count in counts.items()))
    return int(any(each.result == "fail" for each in findings))


async def _check_hosts(
    loaded: LoadedInventory, selected: Sequence[Host], programs: Collection[Program]
) -> Sequence[Finding]:
    limit = asyncio.Semaphore(CONCURRENT_HOSTS)

    async def check_host(host: Host) -> Sequence[Finding]:
        async with limit:
            return await hosts.check_host(host, loaded.inventory, programs)

    checks = (check_with_timeout(HOST_TIMEOUT, host.name, partial(check_host, host)) for host in selected)
    return list(chain.from_iterable(await asyncio.gather(*checks)))


async def _check_all_but_hosts(
    loaded: LoadedInventory, programs: Collection[Program], *, send: bool
) -> Sequence[Finding]:
    inventory, redact = loaded.inventory, Redactor(loaded.secrets)
    findings = [Finding("configuration", "loads", "pass", format_size(inventory))]
    fix = "correct it if it is not intended: docs/configuration.md, Warnings"
    findings += [Finding("configuration", "warnings", "warn", str(warning), fix) for warning in loaded.warnings]
    findings += await asyncio.to_thread(check_files, loaded)
    checks: list[Awaitable[Sequence[Finding]]] = [
        check_with_timeout(SERVER_TIMEOUT, name, partial(check_server, name, check, inventory))
        for name, check in SERVERS
        if name in programs or ("remediator" in programs and name != "gateway")
    ]
    checks.append(check_with_timeout(SERVER_TIMEOUT, SUBJECT, partial(check_sources, loaded)))
    if "exporter" in programs:
        check_heartbeats = partial(check_server, heartbeats.NAME, heartbeats.check_heartbeats, inventory)
        checks.append(check_with_timeout(SERVER_TIMEOUT, heartbeats.NAME, check_heartbeats))
    if "remediator" in programs:
        check_database = partial(asyncio.to_thread, database.check_database, inventory)
        check_channels = partial(channels.check_channels, inventory, redact, send=send)
        checks.insert(0, check_with_timeout(SERVER_TIMEOUT, "database", check_database))
        checks.append(check_with_timeout(SERVER_TIMEOUT, "notify", check_channels))
        checks.append(check_with_timeout(SERVER_TIMEOUT, "access.oidc", partial(check_sign_in, inventory)))
    return [*findings, *chain.from_iterable(await asyncio.gather(*checks))]
