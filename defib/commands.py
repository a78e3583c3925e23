"""One function for each command: it imports what the command needs, and calls it with the command's options."""

import argparse
import gc
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from runtime.errors import DefibError

if TYPE_CHECKING:
    from defib.remediator_client import Connect
    from fleet.inventory.loading import LoadedInventory
    from fleet.inventory.references import Program
    from runtime.lifecycle import ListenAddress
    from runtime.redaction import Redactor
    from runtime.webconfig import WebConfigFile

    Load = Callable[[], LoadedInventory]
    Server = Callable[[Load, ListenAddress, WebConfigFile, Redactor], Coroutine[Any, Any, None]]

P = ParamSpec("P")
T = TypeVar("T")


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    gc.freeze()
    gc.enable()
    return uvloop.run(work)


def _loader(options: argparse.Namespace, *programs: "Program", strict: bool = False) -> "Load":
    """Return a function that loads the configuration, and resolves the references of some programs.

    Unless `strict`, references that cannot be resolved are left; the command checks those that it needs with
    `LoadedInventory.require_resolved`.
    """
    from defib.kinds import KINDS
    from fleet.inventory.documents import find_directory
    from fleet.inventory.loading import load

    return partial(load, find_directory(options.config), KINDS, programs=programs, strict=strict)


def _ask(
    options: argparse.Namespace,
    command: "Callable[Concatenate[Connect, P], Coroutine[Any, Any, int]]",
    *args: P.args,
    **kwargs: P.kwargs,
) -> int:
    """Run a command that uses the remediator's API; its first argument connects to it."""
    from defib import remediator_client

    connect = partial(remediator_client.connect, _loader(options, "client"), options.token_file)
    with remediator_client.checking_answers():
        return _run(command(connect, *args, **kwargs))


def _parse_duration(option: str, text: str) -> float:
    """Return the seconds of an option's duration. Raises DefibError."""
    from fleet.inventory.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise DefibError(f"argument {option}: {error}") from error


def check(options: argparse.Namespace) -> int:
    from defib import check
    from fleet.inventory.documents import find_directory

    if options.schema:
        return check.print_schema()
    if options.web_config is not None:
        check.check_web_configuration(options.web_config)
    return check.check(find_directory(options.config), options.program, show=options.show, as_json=options.as_json)


def exporter(options: argparse.Namespace) -> int:
    from exporter import app

    app.set_resolver_threads()
    return _serve(options, "exporter", app.run)


def remediator(options: argparse.Namespace) -> int:
    import console
    from remediator import app

    return _serve(options, "remediator", partial(app.run, add_pages=console.add_pages))


def _serve(options: argparse.Namespace, program: "Program", server: "Server") -> int:
    from runtime import logs, webconfig
    from runtime.lifecycle import ListenAddress, disable_core_dumps, raise_file_limit
    from runtime.redaction import Redactor

    disable_core_dumps()
    redact = Redactor()
    raise_file_limit()
    logs.configure(redact)
    web = webconfig.WebConfigFile(options.web_config)
    # Before the server handles SIGHUP, a reload would end the process; the configuration is being loaded anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _run(server(_loader(options, program, strict=True), ListenAddress.parse(options.listen), web, redact))
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
        return _run(control.control_directly(_loader(options, "remediator"), name, verb, component, as_json=as_json))
    body = {"overrule": options.overrule, "reason": options.reason}
    return _ask(options, control.control_through_remediator, name, verb, component, body, as_json=as_json)


def explain(options: argparse.Namespace) -> int:
    from defib import explain

    return _ask(options, explain.explain, options.service, as_json=options.as_json, verbose=options.verbose)


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
    body = {**end, "reason": options.reason, "notify": options.notify}
    return _ask(options, maintenance.begin_maintenance, options.scope, options.name, body, as_json=options.as_json)


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

    since = _parse_duration("--since", options.since)
    return _run(replay.run(_loader(options, "remediator"), since, as_json=options.as_json))


def host(options: argparse.Namespace) -> int:
    from defib import host_setup

    load = _loader(options, "exporter", "remediator")
    return host_setup.set_up_host(load, options.host, sources=options.sources, apply_as=options.apply)


def notify(options: argparse.Namespace) -> int:
    from defib import notify

    return _run(notify.send_tests(_loader(options, "remediator"), options.channel, as_json=options.as_json))


def init(options: argparse.Namespace) -> int:
    from defib import starter

    return starter.init(options.directory, options.public_url, compose=options.compose)


def completion(options: argparse.Namespace) -> int:
    from defib import completion

    return completion.print_script(options.shell)


def doctor(options: argparse.Namespace) -> int:
    from defib import doctor

    programs: list[Program] = [options.program] if options.program else ["exporter", "remediator"]

    def load() -> "LoadedInventory":
        # Checks of single hosts do not need the secrets of the others, of channels and of servers.
        return _loader(options, *programs, strict=not options.hosts)()

    token_file, send = options.token_file, options.send
    return _run(doctor.run(load, options.hosts, programs, token_file=token_file, send=send, as_json=options.as_json))


def backup(options: argparse.Namespace) -> int:
    from defib.output import format_count, print_json, print_text
    from remediator.record import backup

    written = backup.back_up(_database(options), options.to)
    if options.as_json:
        print_json({"path": str(written.path), "incidents": written.incidents, "bytes": written.size})
    else:
        print_text(f"{written.path}: {format_count(written.incidents, 'incident')}, {written.size} bytes")
    return 0


def restore(options: argparse.Namespace) -> int:
    from defib.output import format_count, print_json, print_text
    from remediator.record import backup

    restored, previous = backup.restore(_database(options), options.source)
    if options.as_json:
        moved = str(previous) if previous else None
        print_json({"path": str(restored.path), "incidents": restored.incidents, "previous": moved})
    else:
        moved_to = f"; the previous database is now {previous}" if previous else ""
        print_text(f"{restored.path}: {format_count(restored.incidents, 'incident')}{moved_to}")
    return 0


def _database(options: argparse.Namespace) -> str:
    """Return the URL of the remediator's database. Raises ConfigurationError."""
    loaded = _loader(options, "client")()
    loaded.require_resolved("remediator.database")
    return loaded.inventory.remediator.database


def demo(options: argparse.Namespace) -> int:
    from defib.demo import demo

    return _run(demo.run(once=options.once, as_json=options.as_json))
