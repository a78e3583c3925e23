"""The command line: its commands, their arguments and options.

`defib.commands` has a function for each command, and imports the modules of a command when it runs.
"""

import argparse
import gc
import getpass
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from defib import commands
from runtime import VERSION
from runtime.errors import DefibError

CANNOT_DETERMINE = 2  # exit status of `defib probe`
CONFIG_HELP = "configuration directory (default: $DEFIB_CONFIG, ./config, /etc/defib)"
CREDENTIAL_HELP = "file with the API token (default: remediator.token, else the file `token` next to the database)"
GLOBAL_OPTIONS = {"config": "--config", "token_file": "--token-file", "as_json": "--json"}
SERVERS = ("exporter", "remediator")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    gc.disable()  # while modules are imported, collecting takes a fifth of the time and frees nothing
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        from defib import completion

        completion.complete(parser)
    options = parser.parse_args(argv)
    _check_global_options(parser, options)
    ensure_user_name()
    try:
        sys.exit(options.run(options))
    except DefibError as error:
        print(_format_error(str(error)), file=sys.stderr)
        sys.exit(options.on_error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has closed it, as `head` does
        sys.exit(0)
    except OSError as error:
        if error.filename is None or options.command in SERVERS:
            raise
        print(_format_error(f"{error.filename}: {error.strerror}"), file=sys.stderr)
        sys.exit(options.on_error)


def ensure_user_name() -> None:
    """Set $LOGNAME if the user ID has no name, as in containers: asyncssh needs one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = "defib"


def _format_error(text: str) -> str:
    """Prefix a message with the program's name, unless it begins with `file:line:`."""
    return text if re.match(r"\S+:\d+: ", text) else f"defib: {text}"


def _check_global_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit if a global option before the command is one that the command does not have."""
    for name, option in GLOBAL_OPTIONS.items():
        if getattr(options, name) and name not in options.supports:
            parser.error(f"argument {option}: not supported by `defib {options.command}`")


class _Parser(argparse.ArgumentParser):
    """An argument parser that suggests the closest choices for a mistyped one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            import difflib

            close = difflib.get_close_matches(str(value), list(map(str, action.choices or ())), n=2)
            if not close:
                raise
            message = f"invalid choice: {value!r}; did you mean {' or '.join(close)}?"
            raise argparse.ArgumentError(action, message) from error


class _Commands:
    """Adds commands, each with the global options that it supports."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        description: str,
        supports: Iterable[str] = ("config",),
    ) -> argparse.ArgumentParser:
        """Add a command; `supports` names its global options."""
        sentence = f"{description[:1].upper()}{description[1:]}."
        parser = self._parsers.add_parser(name, help=description, description=sentence)
        parser.set_defaults(run=run, on_error=1, supports=frozenset(supports))
        _add_global_options(parser, supports)
        return parser


def _add_global_options(
    parser: argparse.ArgumentParser, names: Iterable[str], default: Any = argparse.SUPPRESS
) -> None:
    """Add global options; those of a command have no default, so that one before the command stays in force."""
    if "config" in names:
        parser.add_argument("--config", type=Path, metavar="DIR", default=default, help=CONFIG_HELP)
    if "token_file" in names:
        parser.add_argument("--token-file", type=Path, metavar="FILE", default=default, help=CREDENTIAL_HELP)
    if "as_json" in names:
        help_ = "print the result as JSON"
        parser.add_argument("--json", dest="as_json", action="store_true", default=default, help=help_)


API = ("config", "token_file", "as_json")  # the global options of commands that use the remediator's API


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="defib", description="Probes services, restarts failed ones, and notifies the people on call."
    )
    parser.add_argument("--version", action="version", version=f"defib {VERSION}")
    _add_global_options(parser, GLOBAL_OPTIONS, default=None)
    parser.set_defaults(as_json=False)
    added = _Commands(parser)
    _add_server_commands(added)
    _add_service_commands(added)
    _add_incident_commands(added)
    _add_maintenance_command(added)
    _add_setup_commands(added)
    _add_database_commands(added)
    demo = added.add("demo", commands.demo, "show on this machine how a service is restarted", ["as_json"])
    demo.add_argument("--once", action="store_true", help="end after one round; exit status 0 if the service recovered")
    return parser


def _complete_from_inventory(argument: argparse.Action, section: str = "") -> None:
    """Complete an argument with the names in a section; by default, the section that the argument `scope` selects."""

    def complete(parsed_args: argparse.Namespace, **_more: object) -> list[str]:
        from defib import completion

        return completion.read_names(section or f"{parsed_args.scope}s", parsed_args)

    argument.completer = complete  # type: ignore[attr-defined] # argcomplete's own attribute


def _add_service_argument(parser: argparse.ArgumentParser) -> None:
    _complete_from_inventory(
        parser.add_argument("service", metavar="SERVICE", help="the name of a service"), "services"
    )


def _parse_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an ID: must be a number, such as 12")
    return int(text)


def _add_server_commands(added: _Commands) -> None:
    check = added.add(
        "check", commands.check, "validate the configuration and print every error", ["config", "as_json"]
    )
    check.add_argument("--show", action="store_true", help="print the resolved configuration, secrets masked")
    check.add_argument("--for", dest="program", choices=SERVERS, help="resolve only the references of this program")
    check.add_argument("--schema", action="store_true", help="print the JSON Schema of configuration files")
    for name, run, listen in (
        ("exporter", commands.exporter, "0.0.0.0:9999"),
        ("remediator", commands.remediator, "127.0.0.1:9095"),
    ):
        server = added.add(name, run, f"run the {name}")
        server.add_argument("--listen", default=listen, metavar="ADDRESS:PORT", help=f"default {listen}")
        server.add_argument(
            "--web.config.file",
            dest="web_config",
            type=Path,
            metavar="FILE",
            help="TLS and users, as Prometheus exporters",
        )


def _add_services(command: Command) -> None:
    """The commands about one service."""
    probing = command("probe", _probe, "probe a service once, now, from here")
    _from_inventory(probing.add_argument("service", metavar="SERVICE"), "services")
    probing.add_argument("--json", action="store_true", help="print the result as JSON")
    probing.set_defaults(on_error=CANNOT_TELL)

    controlling = command("control", _control, "start, stop, restart or ask a service, through the remediator")
    _from_inventory(controlling.add_argument("service", metavar="SERVICE"), "services")
    controlling.add_argument("verb", choices=["status", "start", "stop", "restart", "logs"])
    controlling.add_argument(
        "--overrule", action="append", default=[], metavar="WAIT", help="do it though this wait holds it back"
    )
    _takes_token(controlling)
    controlling.add_argument("--direct", action="store_true", help="go to the host itself: no locks, no record")


def _add_setting_up(command: Command, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands that help to set Defib up."""
    replaying = command("replay", _replay, "say what the remediator would have done, by Prometheus' history")
    replaying.add_argument("--since", default="7d", metavar="DURATION", help="how far back, default 7d")
    replaying.add_argument("--json", dest="as_json", action="store_true", help="print it as JSON")

    hosting = command("host", _host, "make a host ready: print the script for its administrator, or run it")
    hosting.add_argument("verb", choices=["setup"])
    _from_inventory(hosting.add_argument("host", metavar="HOST"), "hosts")
    hosting.add_argument("--from", dest="sources", default="", metavar="ADDRESSES", help="where logins may come from")
    hosting.add_argument("--apply", metavar="USER", help="run it there, as `ssh USER@HOST sudo sh`")

    telling = command("notify", _notify, "send a test to a channel, or to each, and say what was answered")
    telling.add_argument("verb", choices=["test"])
    _from_inventory(telling.add_argument("channel", metavar="CHANNEL", nargs="?"), "channels")

    examining = command("doctor", _doctor, "check all that an installation needs, and say what to mend")
    _from_inventory(examining.add_argument("hosts", metavar="HOST", nargs="*", help="these hosts alone"), "hosts")
    examining.add_argument("--send", action="store_true", help="send each channel a test")
    _takes_token(examining)
    examining.add_argument("--json", dest="as_json", action="store_true", help="print the findings as JSON")

    starting = commands.add_parser("init", help=INIT, description=f"{INIT}.".capitalize())
    starting.add_argument("directory", metavar="DIR", type=Path)
    starting.add_argument("--compose", action="store_true", help="with the addresses of docker-compose.yml")
    starting.set_defaults(run=_init, on_error=1)

    completing = commands.add_parser("completion", help=COMPLETION, description=f"{COMPLETION}.".capitalize())
    completing.add_argument("shell", choices=["bash", "zsh"])
    completing.set_defaults(run=_completion, on_error=1)


def _add_keeping(command: Command) -> None:
    """The commands that keep the record safe."""
    keeping = command("backup", _backup, "write all of the remediator's record to a new file, while it runs")
    keeping.add_argument("to", metavar="FILE", type=Path, help="or a folder, where it is named by the time")
    restoring = command("restore", _restore, "put a backup in the record's place; the remediator must not run")
    restoring.add_argument("source", metavar="FILE", type=Path)


def _takes_token(command: argparse.ArgumentParser, default: str | None = None) -> None:
    help_ = "the file of the API token (default: remediator.token, else `token` beside the record)"
    command.add_argument("--token-file", type=Path, metavar="FILE", default=default, help=help_)


def _add_asking(command: Command) -> None:
    """The commands that ask the remediator."""

    def asks(function: str, *names: str) -> Callable[[argparse.Namespace], int]:
        def run(options: argparse.Namespace) -> int:
            from defib import asking

            given = {name: getattr(options, name) for name in names}
            work: Callable[..., Coroutine[Any, Any, int]] = getattr(asking, function)
            return _run(work(_remediator_of(options), **given))

        return run

    told = command("incidents", asks("incidents", "number", "as_json"), "print the incidents, or one in full")
    told.add_argument("number", metavar="ID", nargs="?", type=int)
    explained = command(
        "explain", asks("explain", "service", "as_json"), "say what stands between a service and its restart"
    )
    _from_inventory(explained.add_argument("service", metavar="SERVICE"), "services")
    for each in (told, explained):
        each.add_argument("--json", dest="as_json", action="store_true", help="print it as JSON")
    acknowledging = command(
        "acknowledge", asks("acknowledge", "number"), "say that you look after an incident: it is not escalated"
    )
    acknowledging.add_argument("number", metavar="INCIDENT", type=int)
    approving = command("approve", asks("approve", "action"), "let an action that waits for approval begin")
    approving.add_argument("action", metavar="ACTION", type=int)
    resetting = command("reset", asks("reset", "service"), "give a service all its attempts anew")
    _from_inventory(resetting.add_argument("service", metavar="SERVICE"), "services")
    switching = command(
        "automation", asks("automation", "switch", "reason"), "say whether it acts by itself, or switch that"
    )
    switching.add_argument("switch", choices=["on", "off"], nargs="?")
    switching.add_argument("--reason", default="", help="why, for others to read")
    holding = command("maintenance", _maintenance, "restart nothing of a service, host or group for a while")
    holding.set_defaults(verb=None)
    verbs = holding.add_subparsers(metavar="begin|end")
    beginning = verbs.add_parser("begin", help="begin one")
    beginning.add_argument("scope", choices=["service", "host", "group"])
    _from_inventory(beginning.add_argument("name", metavar="NAME"))
    lasts = beginning.add_mutually_exclusive_group(required=True)
    lasts.add_argument("--for", dest="lasts", metavar="DURATION", help="such as 2h")
    lasts.add_argument("--until", metavar="TIME", help="such as 2026-11-24T18:00:00+08:00")
    beginning.add_argument("--reason", required=True)
    beginning.add_argument("--notify", action="store_true", help="call people in it as usual")
    beginning.set_defaults(verb="begin")
    ending = verbs.add_parser("end", help="end one")
    ending.add_argument("number", metavar="ID", type=int)
    ending.set_defaults(verb="end")
    for each in (beginning, ending):
        each.add_argument("--config", type=Path, metavar="DIR", default=argparse.SUPPRESS, help=CONFIG)
        _takes_token(each, argparse.SUPPRESS)
    for each in (told, explained, acknowledging, approving, resetting, switching, holding):
        _takes_token(each)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    gc.freeze()
    gc.enable()
    return uvloop.run(work)


def _remediator_of(options: argparse.Namespace) -> "Connect":
    """How the remediator of the configuration is asked, with the API token."""
    from defib import asking

    return partial(asking.remediator, _loader(options, "client"), options.token_file)


def _maintenance(options: argparse.Namespace) -> int:
    from defib import asking

    connect = _remediator_of(options)
    if options.verb is None:
        return _run(asking.maintenances(connect))
    if options.verb == "end":
        return _run(asking.end_maintenance(connect, options.number))
    lasts = {"for": options.lasts} if options.lasts else {"until": options.until}
    more = {**lasts, "reason": options.reason, "notify": options.notify}
    return _run(asking.begin_maintenance(connect, options.scope, options.name, more))


def _replay(options: argparse.Namespace) -> int:
    from defib import replay
    from fleet.inventory.units import parse_duration

    try:
        since = parse_duration(options.since)
    except ValueError as error:
        raise DefibError(f"--since {options.since}: {error}") from error
    # The policy uses the parts of the configuration that the remediator uses, such as `notify.timezone`.
    return _run(replay.run(_loader(options, "remediator"), since, as_json=options.as_json))


def _loader(options: argparse.Namespace, *programs: "Program") -> "Callable[[], Loaded]":
    from defib.kinds import KINDS
    from fleet.inventory.documents import directory
    from fleet.inventory.loading import load

    return partial(load, directory(options.config), KINDS, programs=programs)


def _check(options: argparse.Namespace) -> int:
    from defib import check
    from fleet.inventory.documents import directory

    if options.schema:
        return check.schema()
    return check.check(directory(options.config), options.program, show=options.show)


def _exporter(options: argparse.Namespace) -> int:
    from exporter import app

    app.prepare_process()
    return _serve(options, "exporter", app.run)


def _remediator(options: argparse.Namespace) -> int:
    from remediator import app

    return _serve(options, "remediator", app.run)


Server = Callable[["Callable[[], Loaded]", "Listen", "WebConfig", "Redactor"], Coroutine[Any, Any, None]]


def _serve(options: argparse.Namespace, program: "Program", server: Server) -> int:
    from runtime import logs, webconfig
    from runtime.lifecycle import Listen
    from runtime.redaction import Redactor

    redact = Redactor()
    logs.configure(redact)
    web = webconfig.load(options.web_config)
    # A reload that is asked for before we serve would end us; what is being loaded is as new as it gets.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _run(server(_loader(options, program), Listen.parse(options.listen), web, redact))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from defib import probe

    return _run(probe.probe(_loader(options, "exporter"), options.service, as_json=options.json))


def _control(options: argparse.Namespace) -> int:
    from defib import control

    if options.direct:
        return _run(control.direct(_loader(options, "remediator"), options.service, options.verb))
    return _run(control.through_remediator(_remediator_of(options), options.service, options.verb, options.overrule))


def _host(options: argparse.Namespace) -> int:
    from defib import host

    return host.setup(_loader(options), options.host, sources=options.sources, apply=options.apply)


def _notify(options: argparse.Namespace) -> int:
    from defib import notify

    return _run(notify.test(_loader(options, "remediator"), options.channel))


def _init(options: argparse.Namespace) -> int:
    from defib import starter

    return starter.init(options.directory, compose=options.compose)


def _completion(options: argparse.Namespace) -> int:
    from defib import completion

    return completion.script(options.shell)


def _doctor(options: argparse.Namespace) -> int:
    from defib import doctor

    load_it = _loader(options, "exporter", "remediator")
    return _run(
        doctor.doctor(load_it, options.hosts, token_file=options.token_file, send=options.send, as_json=options.as_json)
    )

    description = "show what the remediator would have done, using the history in Prometheus"
    replay = added.add("replay", commands.replay, description, ["config", "as_json"])
    replay.add_argument("--since", default="7d", metavar="DURATION", help="how far back, such as 12h (default: 7d)")

    description = "print a script for shell completion of commands, options and names"
    completion = added.add("completion", commands.completion, description, [])
    completion.add_argument("shell", choices=["bash", "zsh"])


def _add_database_commands(added: _Commands) -> None:
    description = "back up the remediator's database, while it runs or not"
    backup = added.add("backup", commands.backup, description, ["config", "as_json"])
    backup.add_argument("to", metavar="FILE", type=Path, help="a new file, or a folder for a file named by the time")
    description = "restore a backup of the database; the remediator must not run"
    restore = added.add("restore", commands.restore, description, ["config", "as_json"])
    restore.add_argument("source", metavar="FILE", type=Path, help="a file that `defib backup` has written")
