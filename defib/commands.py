"""One function for each command: it imports what the command needs, and calls it with the command's options."""

import argparse
import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from runtime.errors import DefibError

if TYPE_CHECKING:
    from defib.lookup import HostSelection
    from defib.remediator_client import Connect
    from fleet.inventory.loading import LoadedInventory
    from fleet.inventory.model import Inventory
    from fleet.inventory.references import Program
    from runtime.lifecycle import ListenAddress
    from runtime.redaction import Redactor
    from runtime.webconfig import WebConfigFile

    Load = Callable[[], LoadedInventory]
    Server = Callable[[Load, ListenAddress, WebConfigFile, Redactor], Coroutine[Any, Any, None]]

P = ParamSpec("P")
T = TypeVar("T")
EXPORTER_RESOLVER_THREADS = 1024  # it may have thousands of names


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    gc.freeze()
    gc.enable()
    return uvloop.run(work)


def _loader(options: argparse.Namespace, *programs: "Program", strict: bool = False) -> "Load":
    """Return a function that loads the configuration as `_reader` does, after asking servers for their targets."""
    return partial(_load_with_targets, _reader(options, *programs, strict=strict))


def _reader(options: argparse.Namespace, *programs: "Program", strict: bool = False) -> "Load":
    """Return a function that loads the configuration, and resolves the references of some programs.

    Unless `strict`, references that cannot be resolved are left; the command checks those that it needs with
    `LoadedInventory.require_resolved`.
    """
    from defib.kinds import KINDS
    from fleet.inventory.documents import find_directory
    from fleet.inventory.loading import load

    return partial(load, find_directory(options.config), KINDS, programs=programs, strict=strict)


def _load_with_targets(read: "Load") -> "LoadedInventory":
    """Load the configuration, after asking servers for their targets. Raises ConfigurationError."""
    loaded = read()
    if not loaded.answers:
        return loaded
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from defib.output import print_lines
    from fleet.sources import ServiceSources

    def report(source: str, error: str | None) -> None:
        if error:
            print_lines([f"warning: services_from.{source}: {error}"], sys.stderr)

    with ThreadPoolExecutor(1) as thread:  # commands also load in an event loop
        return thread.submit(asyncio.run, ServiceSources(read, report).refresh(loaded)).result()


def _load_client(options: argparse.Namespace, *programs: "Program", warn: bool = True) -> "LoadedInventory":
    """Load what a client of the remediator needs, also while other parts have errors. Raises ConfigurationError.

    References that `programs` use are resolved, too.
    """
    from defib.kinds import KINDS
    from defib.output import print_text
    from fleet.inventory.documents import find_directory
    from fleet.inventory.loading import load_sections
    from fleet.inventory.problems import ConfigurationError

    try:
        return _reader(options, "client", *programs)()
    except ConfigurationError:
        directory = find_directory(options.config)
        for sections in (
            ("remediator", "notify", "exporter", "gateway"),
            ("remediator", "notify", "exporter"),
            ("remediator", "notify"),
            ("remediator",),
        ):
            with contextlib.suppress(ConfigurationError):
                loaded = load_sections(directory, KINDS, sections, programs=("client", *programs))
                if warn:
                    print_text("warning: the configuration has errors; `defib check` lists them", sys.stderr)
                return loaded
        raise


def _ask(
    options: argparse.Namespace,
    command: "Callable[Concatenate[Connect, P], Coroutine[Any, Any, int]]",
    *args: P.args,
    **kwargs: P.kwargs,
) -> int:
    """Run a command that uses the remediator's API; its first argument connects to it."""
    from defib import remediator_client

    connect = partial(remediator_client.connect, partial(_load_client, options), options.token_file)
    with remediator_client.checking_answers():
        return _run(command(connect, *args, **kwargs))


def _parse_duration(option: str, text: str, least: float = 0.0) -> float:
    """Return the seconds of an option's duration, above 0. Raises DefibError."""
    from fleet.inventory.units import format_duration, parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise DefibError(f"argument {option}: {error}") from error
    if seconds <= 0:
        raise DefibError(f"argument {option}: {text!r} must be greater than 0")
    if seconds < least:
        raise DefibError(f"argument {option}: {text!r} must be at least {format_duration(least)}")
    return seconds


def check(options: argparse.Namespace) -> int:
    from defib import check
    from fleet.inventory.documents import find_directory

    if options.schema:
        return check.print_schema()
    if options.web_config is not None:
        check.check_web_configuration(options.web_config)
    programs: list[Program] = [options.program] if options.program else ["exporter", "remediator", "gateway", "client"]
    load = _loader(options, *programs, strict=True)
    return check.check(
        load, find_directory(options.config), options.program, show=options.show, as_json=options.as_json
    )


def exporter(options: argparse.Namespace) -> int:
    from exporter import app
    from runtime import lookups

    lookups.set_threads(EXPORTER_RESOLVER_THREADS)
    return _serve(options, _reader(options, "exporter", strict=True), app.run)


def remediator(options: argparse.Namespace) -> int:
    import console
    from remediator import app

    load = _reader(options, "remediator", strict=True)
    return _serve(options, load, partial(app.run, add_pages=console.add_pages))


def gateway(options: argparse.Namespace) -> int:
    import os

    from fleet.inventory import sidecar
    from gateway import app

    read = _read_gateway(options)
    load = partial(sidecar.load_with_variables, read, os.environ)
    variables = sidecar.list_variables(os.environ)
    ignored = variables if variables and read().inventory.gateway.upstreams else []
    level = sidecar.read_variables(os.environ).log_level if variables and not ignored else None
    options.listen = options.listen or load().inventory.gateway.listen
    unknown = sidecar.list_unknown(os.environ) if level is not None else []
    server = partial(app.run, ignored_variables=ignored, unknown_variables=unknown)
    return _serve(options, load, server, level)


def _read_gateway(options: argparse.Namespace) -> "Load":
    """Return a function that loads the configuration; an empty one if variables may stand for it."""
    import os

    from fleet.inventory import sidecar
    from fleet.inventory.documents import has_configuration
    from fleet.inventory.loading import LoadedInventory
    from fleet.inventory.model import Inventory

    if sidecar.list_variables(os.environ) and not has_configuration(options.config):
        return partial(LoadedInventory, Inventory(), frozenset())
    return _reader(options, "gateway", strict=True)


def deadman(options: argparse.Namespace) -> int:
    from defib.deadman import server

    within = _parse_duration("--within", options.within)
    settings = server.WatcherSettings(options.channel, within, options.directory, options.pings_optional)
    return _serve(options, _reader(options, "remediator"), partial(server.run, settings=settings))


def _serve(options: argparse.Namespace, load: "Load", server: "Server", level: int | None = None) -> int:
    import logging

    from runtime import logs, lookups, webconfig
    from runtime.lifecycle import ListenAddress, disable_core_dumps, raise_file_limit
    from runtime.redaction import Redactor

    disable_core_dumps()
    lookups.set_threads()
    redact = Redactor()
    raise_file_limit()
    logs.configure(redact, level=logging.INFO if level is None else level)
    web = webconfig.WebConfigFile(options.web_config)
    # Before the server handles SIGHUP, a reload would end the process; the configuration is being loaded anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _run(server(load, ListenAddress.parse(options.listen), web, redact))
    return 0


def probe(options: argparse.Namespace) -> int:
    from defib import probe

    return _run(probe.probe(_loader(options, "exporter"), options.service, as_json=options.as_json))


def control(options: argparse.Namespace) -> int:
    from defib import control

    name, verb, component, as_json = options.service, options.verb, options.component, options.as_json
    if component and verb != "restart":
        raise DefibError(f"argument --component: cannot {verb} a component, only restart it")
    if options.direct:
        load, load_all = _loader(options, "remediator"), _reader(options, "exporter", "remediator")
        return _run(control.control_directly(load, load_all, name, verb, component, as_json=as_json))
    body = {"overrule": options.overrule, "reason": options.reason}
    return _ask(options, control.control_through_remediator, name, verb, component, body, as_json=as_json)


def explain(options: argparse.Namespace) -> int:
    from defib import explain

    return _ask(options, explain.explain, options.service, as_json=options.as_json, verbose=options.verbose)


def continue_in_storm(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.continue_in_storm, options.service, options.reason, as_json=options.as_json)


def reset(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.reset, options.service, as_json=options.as_json)


def incidents(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.show_incidents, options.number, as_json=options.as_json)


def status(options: argparse.Namespace) -> int:
    from defib import status

    return _ask(options, status.show_status, as_json=options.as_json)


def list_(options: argparse.Namespace) -> int:
    from defib import events, hosts, incidents, services

    as_json = options.as_json
    if options.subject == "services":
        exact = {name: getattr(options, name) for name in ("host", "group", "provider", "category")}
        wanted = {**exact, "state": ",".join(options.state), "q": " ".join(options.words)}
        return _ask(options, services.list_services, wanted, as_json=as_json)
    if options.subject == "hosts":
        return _ask(options, hosts.list_hosts, as_json=as_json)
    if options.subject == "incidents":
        selected = (options.state, options.service, options.limit)
        return _ask(options, incidents.list_incidents, *selected, as_json=as_json)
    filters = {"kind": options.kind, "host": options.host, "service": options.service}
    return _ask(options, events.list_events, options.limit, filters, as_json=as_json)


def report(options: argparse.Namespace) -> int:
    from defib import report

    if options.as_html and options.as_json:
        raise DefibError("argument --html: not allowed with --json")
    _parse_duration("--since", options.since)
    return _ask(options, report.show_report, options.since, as_json=options.as_json, as_html=options.as_html)


def note(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.add_note, options.number, options.text, as_json=options.as_json)


def acknowledge(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.acknowledge, options.number, as_json=options.as_json)


def silence(options: argparse.Namespace) -> int:
    from defib import incidents

    _parse_duration("--for", options.duration)
    body = {"for": options.duration, "comment": options.comment}
    if options.alert is not None:
        return _ask(options, incidents.silence_alert, options.alert, body, as_json=options.as_json)
    return _ask(options, incidents.silence_incident, options.number, body, as_json=options.as_json)


def approve(options: argparse.Namespace) -> int:
    from defib import incidents

    return _ask(options, incidents.approve, options.action, as_json=options.as_json)


def automation(options: argparse.Namespace) -> int:
    from defib import maintenance

    return _ask(options, maintenance.automation, options.switch, options.reason, as_json=options.as_json)


def maintenance(options: argparse.Namespace) -> int:
    from defib import maintenance

    if options.verb is None:
        return _ask(options, maintenance.list_maintenance, as_json=options.as_json)
    if options.verb == "end":
        return _ask(options, maintenance.end_maintenance, options.number, as_json=options.as_json)
    if options.duration:
        _parse_duration("--for", options.duration)
    end = {"for": options.duration} if options.duration else {"until": options.until}
    paused = {"pause_probing": True} if options.pause_probing else {}  # unknown to earlier remediators
    body = {**end, "reason": options.reason, "notify": options.notify, **paused}
    return _ask(options, maintenance.begin_maintenance, options.scope, options.name, body, as_json=options.as_json)


def heartbeat(options: argparse.Namespace) -> int:
    from defib import heartbeats

    if options.verb == "list":
        return _ask(options, heartbeats.list_heartbeats, as_json=options.as_json)
    if options.verb == "url":
        return _ask(options, heartbeats.show_url, options.service, options.url, as_json=options.as_json)
    if options.verb == "remove":
        return _ask(options, heartbeats.remove, options.service, as_json=options.as_json)
    body = {"kind": options.kind, "exit_status": options.exit_status, "message": options.message}
    return _ask(options, heartbeats.ping, options.service, body, as_json=options.as_json)


def run_job(options: argparse.Namespace) -> int:
    import os

    from defib import job_report

    def ask() -> str:
        import asyncio

        from defib import heartbeats, remediator_client

        load = partial(_load_client, options, warn=False)
        return asyncio.run(
            heartbeats.read_url(partial(remediator_client.connect, load, options.token_file), options.service)
        )

    return job_report.run(options.service, options.job, options.url_file, os.environ, ask)


def token(options: argparse.Namespace) -> int:
    from defib import access

    as_json = options.as_json
    if options.verb is None:
        return _ask(options, access.list_tokens, as_json=as_json)
    if options.verb == "revoke":
        return _ask(options, access.revoke_token, options.name, as_json=as_json)
    if options.expires is not None:
        _parse_duration("--expires", options.expires)
    return _ask(options, access.create_token, options.name, options.role, options.expires, as_json=as_json)


def session(options: argparse.Namespace) -> int:
    from defib import access

    if options.verb == "end":
        return _ask(options, access.end_session, options.id, as_json=options.as_json)
    return _ask(options, access.list_sessions, as_json=options.as_json)


def audit(options: argparse.Namespace) -> int:
    from defib import access

    return _ask(options, access.show_audit, options.limit, as_json=options.as_json)


def replay(options: argparse.Namespace) -> int:
    from defib import replay

    since = _parse_duration("--since", options.since, least=1.0)
    return _run(replay.run(_loader(options, "remediator"), since, as_json=options.as_json))


def host(options: argparse.Namespace) -> int:
    from defib import host_setup

    chosen = host_setup.Options(
        sources=options.sources,
        apply_as=options.apply,
        output=options.output,
        parallel=options.parallel,
        timeout=_parse_duration("--timeout", options.timeout),
    )
    return host_setup.set_up_hosts(_loader(options, "exporter", "remediator"), _hosts_of(options), chosen)


def _hosts_of(options: argparse.Namespace) -> "HostSelection":
    from defib.lookup import HostSelection

    return HostSelection(options.hosts, options.group, options.everything)


def discover(options: argparse.Namespace) -> int:
    from defib import discover
    from defib.administrator import check_user
    from defib.discovery import known_hosts
    from fleet.inventory.documents import find_directory
    from runtime.redaction import Redactor

    selection = _hosts_of(options)
    if options.known_hosts:
        load = _loader(options, "exporter", "remediator")
        return known_hosts.pin_keys(load, selection, yes=options.yes, as_json=options.as_json)
    directory = find_directory(options.config)
    loaded = _loader(options, "exporter")()
    output = discover.Output(directory, options.output, options.yes, options.as_json)
    output.check()
    if options.administrator:
        check_user("--as", options.administrator)
    discovered = _run(discover.discover(loaded, selection, directory, options.administrator))
    return discover.present(discovered, output, Redactor(loaded.secrets))


def notify(options: argparse.Namespace) -> int:
    from defib import notify

    return _run(notify.send_tests(_loader(options, "remediator"), options.channel, as_json=options.as_json))


def init(options: argparse.Namespace) -> int:
    from defib import starter
    from defib.starter import answers

    given, chosen = answers.from_options(options)
    if sys.stdin.isatty() and not options.no_input:
        chosen = answers.ask(chosen, given)
    return starter.init(options.directory, answers.check(chosen))


def completion(options: argparse.Namespace) -> int:
    from defib import completion

    return completion.print_script(options.shell)


def doctor(options: argparse.Namespace) -> int:
    from defib import doctor

    programs: list[Program] = [options.program] if options.program else ["exporter", "remediator", "gateway"]

    def load() -> "LoadedInventory":
        # Checks of single hosts do not need the secrets of the others, of channels and of servers.
        return _loader(options, *programs, strict=not options.hosts)()

    token_file, send = options.token_file, options.send
    return _run(doctor.run(load, options.hosts, programs, token_file=token_file, send=send, as_json=options.as_json))


def backup(options: argparse.Namespace) -> int:
    from defib import backups
    from defib.output import format_count, print_json, print_text
    from fleet.inventory.documents import find_directory
    from runtime.database_files import BackupError

    keep = None if options.keep is None else _parse_duration("--keep", options.keep)
    directory, program = find_directory(options.config), options.program
    written = backups.back_up(backups.Sources.of(_load_databases(options), directory, program), options.to, keep)
    record, heartbeats, state = written.record, written.heartbeats, written.state
    configuration = written.configuration
    if options.as_json:
        print_json(
            {
                **({} if record is None else {
                    "path": str(record.path), "incidents": record.incidents, "bytes": record.size,
                }),
                "heartbeats": heartbeats and {
                    "path": str(heartbeats.path), "heartbeats": heartbeats.heartbeats, "bytes": heartbeats.size,
                },
                "gateway": state and {"path": str(state.path), "clients": state.clients, "bytes": state.size},
                "configuration": configuration and {
                    "path": str(configuration.path), "files": configuration.files, "bytes": configuration.size,
                    "missing": list(configuration.missing),
                },
                "removed": [str(path) for path in written.removed],
            }
        )  # fmt: skip
    else:
        if record is not None:
            print_text(f"{record.path}: {format_count(record.incidents, 'incident')}, {record.size} bytes")
        if heartbeats is not None:
            count = format_count(heartbeats.heartbeats, "heartbeat")
            print_text(f"{heartbeats.path}: {count}, {heartbeats.size} bytes")
        if state is not None:
            print_text(f"{state.path}: {format_count(state.clients, 'client')}, {state.size} bytes")
        if configuration is not None:
            files = format_count(configuration.files, "file")
            print_text(f"{configuration.path}: {files}, {configuration.size} bytes")
        for path in written.removed:
            print_text(f"removed {path}")
    if written.problems:
        raise BackupError("; ".join(written.problems))
    return 0


def restore(options: argparse.Namespace) -> int:
    from defib.output import format_count, print_json, print_text
    from exporter.heartbeats.backup import is_database
    from gateway.backup import is_state
    from remediator.record import backup

    inventory = _load_databases(options)
    if is_database(options.source):
        return _restore_heartbeats(inventory, options)
    if is_state(options.source):
        return _restore_state(inventory, options)
    restored, previous = backup.restore(inventory.remediator.database, options.source)
    if options.as_json:
        moved = str(previous) if previous else None
        tokens = list(restored.tokens)
        print_json({"path": str(restored.path), "incidents": restored.incidents, "previous": moved, "tokens": tokens})
    else:
        moved_to = f"; the previous database is now {previous}" if previous else ""
        print_text(f"{restored.path}: {format_count(restored.incidents, 'incident')}{moved_to}")
        if restored.tokens:
            print_text(f"API tokens in force: {', '.join(restored.tokens)}; revoke those that should not be")
    return 0


def _restore_heartbeats(inventory: "Inventory", options: argparse.Namespace) -> int:
    from defib.output import format_count, print_json, print_text
    from exporter.heartbeats import backup

    settings = inventory.exporter.heartbeats
    restored = backup.restore(settings.database, options.source, has_key_file=settings.ping_key is None)
    written, previous, key = restored.backup, restored.previous, restored.previous_key
    if options.as_json:
        print_json(
            {
                "path": str(written.path), "heartbeats": written.heartbeats,
                "previous": str(previous) if previous else None, "previous_ping_key": str(key) if key else None,
            }
        )  # fmt: skip
        return 0
    moved_to = f"; the previous database is now {previous}" if previous else ""
    print_text(f"{written.path}: {format_count(written.heartbeats, 'heartbeat')}{moved_to}")
    if key is not None:
        print_text(f"URLs are those of the backup again; the key of the others is now {key}")
    return 0


def _restore_state(inventory: "Inventory", options: argparse.Namespace) -> int:
    from defib.output import format_count, print_json, print_text
    from gateway import backup

    if inventory.gateway.state_file is None:
        raise DefibError("gateway.state_file is not set: set it to where the state belongs")
    restored = backup.restore(inventory.gateway.state_file, options.source)
    written, previous = restored.backup, restored.previous
    if options.as_json:
        moved = str(previous) if previous else None
        print_json({"path": str(written.path), "clients": written.clients, "previous": moved})
    else:
        moved_to = f"; the previous state is now {previous}" if previous else ""
        print_text(f"{written.path}: {format_count(written.clients, 'client')}{moved_to}")
    return 0


def _load_databases(options: argparse.Namespace) -> "Inventory":
    """Load where the programs store data, also while other parts have errors. Raises ConfigurationError."""
    loaded = _load_client(options, "exporter", "gateway")
    loaded.require_resolved("remediator.database", "exporter.heartbeats.database", "gateway.state_file")
    return loaded.inventory


def demo(options: argparse.Namespace) -> int:
    from defib.demo import demo

    return _run(demo.run(once=options.once, as_json=options.as_json))
