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
from remediator.policy.service_states import STATES
from runtime import VERSION
from runtime.errors import DefibError

CANNOT_DETERMINE = 2  # exit status of `defib probe`
CONFIG_HELP = "configuration directory (default: $DEFIB_CONFIG, ./config, /etc/defib)"
CREDENTIAL_HELP = "file with a token (default: remediator.token, else the local token, next to the database)"
GLOBAL_OPTIONS = {"config": "--config", "token_file": "--token-file", "as_json": "--json"}
SERVERS = ("exporter", "remediator", "gateway")
MAX_EXIT_STATUS = 255
DEADMAN_FOLDER = "/var/lib/defib-deadman"


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
        _print_error(str(error))
        sys.exit(options.on_error if error.exit_status is None else error.exit_status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has closed it, as `head` does
        sys.exit(0)
    except OSError as error:
        if error.filename is None or options.command in (*SERVERS, "deadman"):
            raise
        _print_error(f"{error.filename}: {error.strerror}")
        sys.exit(options.on_error)


def ensure_user_name() -> None:
    """Set $LOGNAME if the user ID has no name, as in containers: asyncssh needs one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = "defib"


def _print_error(text: str) -> None:
    """Print a message to stderr, after the program's name unless it begins with `file:line:`."""
    from defib.output import print_text

    print_text(text if re.match(r"\S+:\d+: ", text) else f"defib: {text}", sys.stderr)


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
    _add_list_commands(added)
    _add_report_command(added)
    _add_incident_commands(added)
    _add_maintenance_command(added)
    _add_heartbeat_command(added)
    _add_access_commands(added)
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


def _parse_name(text: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: use lower-case letters, digits, '.', '_' and '-'")
    return text


def _parse_limit(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: must be 1 or more")
    return int(text)


def _parse_states(text: str) -> list[str]:
    states = text.split(",")
    for state in states:
        if state not in STATES:
            raise argparse.ArgumentTypeError(f"{state!r} is not a state: use {', '.join(STATES)}")
    return states


def _add_server_commands(added: _Commands) -> None:
    check = added.add(
        "check", commands.check, "validate the configuration and print every error", ["config", "as_json"]
    )
    check.add_argument("--show", action="store_true", help="print the resolved configuration, secrets masked")
    check.add_argument("--for", dest="program", choices=SERVERS, help="resolve only the references of this program")
    help_ = "check this web configuration, too: TLS, users and roles"
    check.add_argument("--web.config.file", dest="web_config", type=Path, metavar="FILE", help=help_)
    check.add_argument("--schema", action="store_true", help="print the JSON Schema of configuration files")
    for name, run, listen in (
        ("exporter", commands.exporter, "0.0.0.0:9999"),
        ("remediator", commands.remediator, "127.0.0.1:9095"),
    ):
        _add_server_options(added.add(name, run, f"run the {name}"), listen)
    description = "run the gateway: a proxy before model APIs that keeps their rate limits"
    _add_server_options(added.add("gateway", commands.gateway, description), None)
    description = "watch a remediator: notify when its pings stop and return, and of what Alertmanager sends to /alerts"
    deadman = added.add("deadman", commands.deadman, description)
    _add_server_options(deadman, "0.0.0.0:9192")
    help_ = "notify this channel (may be repeated; default: those that are notified of RemediatorDown)"
    channel = deadman.add_argument("--channel", action="append", default=[], metavar="NAME", help=help_)
    _complete_from_inventory(channel, "channels")
    help_ = "notify if no ping has arrived for this long (default: 5m)"
    deadman.add_argument("--within", default="5m", metavar="DURATION", help=help_)
    help_ = "expect pings only once one has arrived"
    deadman.add_argument("--pings-optional", action="store_true", help=help_)
    help_ = f"for the token of the ping URL, and the state (default: {DEADMAN_FOLDER})"
    deadman.add_argument("--directory", type=Path, default=Path(DEADMAN_FOLDER), metavar="DIR", help=help_)


def _add_server_options(server: argparse.ArgumentParser, listen: str | None) -> None:
    """Add the options of a server; without `listen`, the configuration has its address."""
    help_ = f"default {listen}" if listen else "default: gateway.listen"
    server.add_argument("--listen", default=listen, metavar="ADDRESS:PORT", help=help_)
    help_ = "TLS and users, in the format of the Prometheus exporters"
    server.add_argument("--web.config.file", dest="web_config", type=Path, metavar="FILE", help=help_)


def _add_service_commands(added: _Commands) -> None:
    probe = added.add("probe", commands.probe, "probe a service once from this machine", ["config", "as_json"])
    _add_service_argument(probe)
    probe.set_defaults(on_error=CANNOT_DETERMINE)

    description = "start, stop or restart a service, or show its status or logs, through the remediator"
    control = added.add("control", commands.control, description, API)
    _add_service_argument(control)
    control.add_argument("verb", choices=["status", "start", "stop", "restart", "logs"])
    help_ = "restart only this component, which the control must list"
    control.add_argument("--component", default="", metavar="NAME", help=help_)
    help_ = "act although this gate is closed (may be repeated)"
    control.add_argument("--overrule", action="append", default=[], metavar="GATE", help=help_)
    help_ = "why, for the audit log and for who finds the service stopped"
    control.add_argument("--reason", default="", help=help_)
    help_ = "run the command on the host without the remediator: no locks, no record"
    control.add_argument("--direct", action="store_true", help=help_)

    explain = added.add("explain", commands.explain, "show what the remediator does about a service, and why", API)
    _add_service_argument(explain)
    explain.add_argument("--verbose", action="store_true", help="show all gates, also those that are open")

    help_ = "restart the services of a host group although many of them fail at once"
    storm = added.add("storm", commands.continue_in_storm, help_, API)
    storm.add_argument("verb", choices=["continue"], help="let automation continue for an hour")
    _add_service_argument(storm)
    storm.add_argument("--reason", default="", help="why, for the record")

    reset = added.add("reset", commands.reset, "reset the attempts of a service", API)
    _add_service_argument(reset)


def _add_list_commands(added: _Commands) -> None:
    description = "show what is wrong: counts, incidents, broken services, hosts with problems"
    status = added.add("status", commands.status, description, API)
    status.set_defaults(on_error=CANNOT_DETERMINE)

    listing = added.add("list", commands.list_, "list services, hosts, incidents or events", API)
    subjects = listing.add_subparsers(required=True, metavar="services|hosts|incidents|events", dest="subject")

    def add(name: str, description: str) -> argparse.ArgumentParser:
        parser = subjects.add_parser(name, help=description, description=f"{description.capitalize()}.")
        _add_global_options(parser, API)
        return parser

    services = add("services", "list the services with their states, the broken ones first")
    services.add_argument("words", metavar="WORD", nargs="*", help="only services with these words in their texts")
    help_ = f"only these states: {', '.join(STATES)} (several separated by commas, or the option repeated)"
    states = services.add_argument(
        "--state", action="extend", type=_parse_states, default=[], metavar="STATE", help=help_
    )
    states.completer = lambda **_: STATES  # type: ignore[attr-defined] # argcomplete's own attribute
    for name, section, which in (
        ("host", "hosts", "on this host"),
        ("group", "groups", "on hosts of this group"),
        ("provider", "provider", "of this provider"),
        ("category", "category", "of this category"),
    ):
        help_ = f"only services {which}"
        option = services.add_argument(f"--{name}", default="", metavar=name.upper(), help=help_)
        _complete_from_inventory(option, section)
    add("hosts", "list the hosts with what they use, those with problems first")
    incidents = add("incidents", "list the incidents, those that are open first, then the newest first")
    incidents.add_argument("--state", choices=["open", "closed", "all"], default="all", help="default: all")
    events = add("events", "list what happened: changes of state, incidents, actions, operations")
    help_ = "only events of this kind, such as service or action (may be repeated)"
    events.add_argument("--kind", action="append", default=[], metavar="KIND", help=help_)
    option = events.add_argument("--host", default="", metavar="HOST", help="only events of this host")
    _complete_from_inventory(option, "hosts")
    for parser, name in ((incidents, "incidents"), (events, "events")):
        help_ = f"only {name} of this service"
        option = parser.add_argument("--service", default="", metavar="SERVICE", help=help_)
        _complete_from_inventory(option, "services")
        help_ = f"the newest N {name} (default: 50)"
        parser.add_argument("--limit", type=_parse_limit, default=50, metavar="N", help=help_)


def _add_report_command(added: _Commands) -> None:
    description = "report availability, incidents, restarts, GPU use, certificates and disks of the last days"
    report = added.add("report", commands.report, description, API)
    help_ = "the time that the report covers, such as 24h or 30d (default: 7d)"
    report.add_argument("--since", default="7d", metavar="DURATION", help=help_)
    help_ = "print an HTML page, to be stored in a file"
    report.add_argument("--html", dest="as_html", action="store_true", help=help_)


def _add_incident_commands(added: _Commands) -> None:
    incidents = added.add("incidents", commands.incidents, "list the incidents, or show one in detail", API)
    help_ = "an incident (default: list the newest)"
    incidents.add_argument("number", metavar="ID", nargs="?", type=_parse_id, help=help_)
    note = added.add("note", commands.note, "add a note to the timeline of an incident", API)
    note.add_argument("number", metavar="INCIDENT", type=_parse_id, help="the ID of an incident")
    note.add_argument("text", help="at most 1,000 characters")
    acknowledge = added.add("acknowledge", commands.acknowledge, "acknowledge an incident: it is not escalated", API)
    acknowledge.add_argument("number", metavar="INCIDENT", type=_parse_id, help="the ID of an incident")
    silence = added.add("silence", commands.silence, "silence an incident's service in Alertmanager", API)
    subject = silence.add_mutually_exclusive_group(required=True)
    subject.add_argument("number", metavar="INCIDENT", nargs="?", type=_parse_id, help="the ID of an incident")
    help_ = "silence a single alert, with this ID, instead"
    subject.add_argument("--alert", metavar="ID", type=_parse_id, help=help_)
    help_ = "such as 30m (default: 2h)"
    silence.add_argument("--for", dest="duration", default="2h", metavar="DURATION", help=help_)
    silence.add_argument("--comment", default="", metavar="TEXT", help="why, for Alertmanager")
    approve = added.add("approve", commands.approve, "approve an action that waits for approval", API)
    approve.add_argument("action", metavar="ACTION", type=_parse_id, help="the ID of an action")


def _add_maintenance_command(added: _Commands) -> None:
    automation = added.add("automation", commands.automation, "show whether automation is on, or switch it", API)
    automation.add_argument("switch", choices=["on", "off"], nargs="?", help="default: show the current state")
    automation.add_argument("--reason", default="", help="why, for the record")

    maintenance = added.add("maintenance", commands.maintenance, "list, begin or end maintenance", API)
    maintenance.set_defaults(verb=None)
    verbs = maintenance.add_subparsers(metavar="begin|end")
    description = "pause automatic actions for a service, host or group"
    begin = verbs.add_parser("begin", help=description, description=f"{description.capitalize()}.")
    begin.add_argument("scope", choices=["service", "host", "group"])
    _complete_from_inventory(begin.add_argument("name", metavar="NAME", help="of the service, host or group"))
    ends = begin.add_mutually_exclusive_group(required=True)
    ends.add_argument("--for", dest="duration", metavar="DURATION", help="such as 30m or 2h")
    help_ = 'such as "2026-11-24 18:00:00", in the configured time zone, or 2026-11-24T18:00:00+08:00'
    ends.add_argument("--until", metavar="TIME", help=help_)
    begin.add_argument("--reason", required=True, help="why, for the record")
    begin.add_argument("--notify", action="store_true", help="send notifications as usual")
    help_ = "do not probe the services meanwhile, except on request"
    begin.add_argument("--pause-probing", action="store_true", help=help_)
    begin.set_defaults(verb="begin")
    end = verbs.add_parser("end", help="end a maintenance", description="End a maintenance.")
    end.add_argument("number", metavar="ID", type=_parse_id, help="as listed by `defib maintenance`")
    end.set_defaults(verb="end")
    for parser in (begin, end):
        _add_global_options(parser, API)


def _parse_exit_status(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_EXIT_STATUS:
        raise argparse.ArgumentTypeError(f"{text!r} is not an exit status: must be 0 to {MAX_EXIT_STATUS}")
    return int(text)


def _add_heartbeat_command(added: _Commands) -> None:
    description = "list heartbeats, show their URLs, send pings, run a job that is reported, or remove a created one"
    heartbeat = added.add("heartbeat", commands.heartbeat, description, API)
    verbs = heartbeat.add_subparsers(required=True, metavar="list|url|ping|run|remove", dest="verb")

    def add(name: str, description: str, supports: Iterable[str] = API) -> argparse.ArgumentParser:
        sentence = f"{description[:1].upper()}{description[1:]}."
        parser = verbs.add_parser(name, help=description, description=sentence)
        _add_global_options(parser, supports)
        return parser

    add("list", "list the heartbeats, those that failed or are late first")
    url = add("url", "print the secret URL of a heartbeat")
    _add_service_argument(url)
    kinds = url.add_mutually_exclusive_group()
    for kind, help_ in (
        ("slug", "the URL with the ping key and the slug"), ("push", "the push URL, as of Uptime Kuma"),
        ("badge", "the URL of its badge, which can be public"), ("category-badge", "the URL of its category's badge"),
    ):  # fmt: skip
        name = f"{kind.replace('-', '_')}_url"
        kinds.add_argument(f"--{kind}", dest="url", action="store_const", const=name, default="url", help=help_)
    ping = add("ping", "send a ping, by default a success, in your name")
    _add_service_argument(ping)
    kinds = ping.add_mutually_exclusive_group()
    for kind, help_ in (("start", "a job has started"), ("fail", "a job has failed"), ("log", "an entry in the list")):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="success", help=help_)
    help_ = "a job has ended with this exit status; all but 0 are failures"
    kinds.add_argument("--exit-status", type=_parse_exit_status, metavar="N", help=help_)
    ping.add_argument("--message", default="", metavar="TEXT", help="stored with the ping")
    run = add("run", "run a job, and report its start, its exit status and the end of its output", API[:2])
    _add_service_argument(run)
    help_ = "file with the URL (default: $DEFIB_PING_URL, else the remediator is asked)"
    run.add_argument("--url-file", type=Path, metavar="FILE", help=help_)
    run.add_argument("job", metavar="COMMAND", nargs="+", help="after --: the command with its arguments")
    run.set_defaults(run=commands.run_job, supports=frozenset(API[:2]))
    remove = add("remove", "remove a heartbeat that a job has created")
    remove.add_argument("service", metavar="SLUG", help="the slug, which is its name")


def _add_access_commands(added: _Commands) -> None:
    token = added.add("token", commands.token, "list, create or revoke API tokens, for scripts", API)
    token.set_defaults(verb=None)
    verbs = token.add_subparsers(metavar="create|revoke|list")
    create = verbs.add_parser("create", help="create an API token and print it", description="Create an API token.")
    create.add_argument("name", metavar="NAME", type=_parse_name, help="lower-case letters, digits, '.', '_' and '-'")
    create.add_argument("--role", choices=["viewer", "operator", "admin"], required=True, help="what the token permits")
    create.add_argument("--expires", metavar="DURATION", help="such as 90d (default: never)")
    create.set_defaults(verb="create")
    revoke = verbs.add_parser("revoke", help="revoke an API token", description="Revoke an API token.")
    revoke.add_argument("name", metavar="NAME", help="as listed by `defib token`")
    revoke.set_defaults(verb="revoke")
    listing = verbs.add_parser("list", help="list the API tokens", description="List the API tokens.")
    listing.set_defaults(verb=None)

    session = added.add("session", commands.session, "list or end sessions of the console", API)
    session.set_defaults(verb=None)
    verbs = session.add_subparsers(metavar="end|list")
    end = verbs.add_parser("end", help="end a session", description="End a session.")
    end.add_argument("id", metavar="ID", help="as listed by `defib session`")
    end.set_defaults(verb="end")
    sessions = verbs.add_parser("list", help="list the sessions", description="List the sessions.")
    sessions.set_defaults(verb=None)
    for parser in (create, revoke, listing, end, sessions):
        _add_global_options(parser, API)

    audit = added.add("audit", commands.audit, "show who signed in and who did what", API)
    help_ = "the newest N entries (default: 100)"
    audit.add_argument("--limit", type=_parse_limit, default=100, metavar="N", help=help_)


def _add_init_options(init: argparse.ArgumentParser) -> None:
    init.add_argument("--no-input", action="store_true", help="ask no questions, also at a terminal")
    mode = init.add_mutually_exclusive_group()
    for name, help_ in (
        ("systemd", "for deploy/install.sh"), ("compose", "for docker-compose.yml"), ("checkout", "to run it by hand"),
    ):  # fmt: skip
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=help_)
    for option, metavar, help_ in (
        ("--public-url", "URL", "the console's address for browsers, with which links in notifications begin"),
        ("--ping-listen", "ADDRESS:PORT", "an address of this machine to which jobs and agents send pings"),
        ("--language", "zh|en", "language of notifications"),
        ("--timezone", "ZONE", "time zone of notifications, such as Asia/Shanghai"),
        ("--fallback-mail", "ADDRESS", "who is notified of problems of Defib itself, by Alertmanager"),
        ("--smtp", "HOST:PORT", "the mail server for that"),
        ("--fallback-webhook", "FILE", "its URL: a webhook that Alertmanager notifies of problems of Defib itself"),
    ):
        init.add_argument(option, metavar=metavar, help=help_)
    for option, help_ in (
        ("--feishu-webhook", "file with the webhook of a Feishu bot that notifies"),
        ("--feishu-secret", "file with the secret of that bot"),
    ):
        init.add_argument(option, metavar="FILE", type=Path, help=help_)
    help_ = "a host, or a range: 'gpu-[01-20]=10.0.0.{n}'; creates SSH keys; may be repeated"
    init.add_argument("--host", dest="hosts", action="append", metavar="NAME=ADDRESS", help=help_)
    help_ = "a user of the console beside admin: viewer, operator (default) or admin; may be repeated"
    init.add_argument("--user", dest="users", action="append", metavar="NAME[=ROLE]", help=help_)


def _add_setup_commands(added: _Commands) -> None:
    init = added.add("init", commands.init, "write a first configuration, with comments and random secrets", [])
    init.add_argument("directory", metavar="DIR", type=Path, help="the configuration directory to create")
    _add_init_options(init)

    doctor = added.add("doctor", commands.doctor, "check the whole installation and say how to fix problems", API)
    doctor.add_argument(
        "--for", dest="program", choices=SERVERS, help="check only what this program needs, as its user"
    )
    hosts = doctor.add_argument("hosts", metavar="HOST", nargs="*", help="check only these hosts")
    _complete_from_inventory(hosts, "hosts")
    doctor.add_argument("--send", action="store_true", help="send a test message to each channel")

    _add_discover_command(added)
    _add_host_command(added)

    description = "send a test message to a channel, or to each, and print the answers"
    notify = added.add("notify", commands.notify, description, ["config", "as_json"])
    notify.add_argument("verb", choices=["test"])
    _complete_from_inventory(
        notify.add_argument("channel", metavar="CHANNEL", nargs="?", help="default: each"), "channels"
    )

    description = "show what the remediator would have done, using the history in Prometheus"
    replay = added.add("replay", commands.replay, description, ["config", "as_json"])
    replay.add_argument("--since", default="7d", metavar="DURATION", help="how far back, such as 12h (default: 7d)")

    description = "print a script for shell completion of commands, options and names"
    completion = added.add("completion", commands.completion, description, [])
    completion.add_argument("shell", choices=["bash", "zsh"])


def _add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select hosts."""
    hosts = parser.add_argument("hosts", metavar="HOST", nargs="*", help="the names of hosts")
    _complete_from_inventory(hosts, "hosts")
    group = parser.add_argument("--group", default="", metavar="GROUP", help="all hosts of this group")
    _complete_from_inventory(group, "groups")
    parser.add_argument("--all", dest="everything", action="store_true", help="all hosts")


def _add_discover_command(added: _Commands) -> None:
    description = "find what runs on hosts, and write services for it; or pin their keys"
    discover = added.add("discover", commands.discover, description, ["config", "as_json"])
    _add_host_arguments(discover)
    discover.add_argument("--yes", action="store_true", help="add all services, or pin all new keys, without asking")
    ways = discover.add_mutually_exclusive_group()
    help_ = "show the fingerprints of the host keys, and pin those that are new"
    ways.add_argument("--known-hosts", action="store_true", help=help_)
    help_ = "read hosts as their administrator, with `ssh USER@HOST sudo`: shows containers and processes of all users"
    discover.add_argument("--as", dest="administrator", default="", metavar="USER", help=help_)
    help_ = "the file to write, which must not exist; - for stdout (default: a new file in the configuration directory)"
    ways.add_argument("--output", type=Path, metavar="FILE", help=help_)


def _add_host_command(added: _Commands) -> None:
    description = "prepare hosts: print a setup script for the administrator, or run it on many hosts"
    host = added.add("host", commands.host, description)
    # With an argument `verb` in its place, argparse would accept no options before the names.
    verbs = host.add_subparsers(required=True, metavar="setup", dest="verb")
    setup = verbs.add_parser("setup", help=description, description=f"{description.capitalize()}.")
    _add_global_options(setup, ["config"])
    _add_host_arguments(setup)
    help_ = "accept logins only from these addresses, such as 10.0.0.5,10.0.1.0/24"
    setup.add_argument("--from", dest="sources", default="", metavar="ADDRESSES", help=help_)
    ways = setup.add_mutually_exclusive_group()
    ways.add_argument("--apply", metavar="USER", help="run the scripts with `ssh USER@HOST sudo sh`")
    help_ = "write a script for each host to this directory, HOST.sh, readable by you only"
    ways.add_argument("--output", type=Path, metavar="DIR", help=help_)
    help_ = "with --apply, set up at most N hosts at the same time (default: 10)"
    setup.add_argument("--parallel", type=_parse_limit, default=10, metavar="N", help=help_)
    help_ = "with --apply, give up on a host after this time (default: 2m)"
    setup.add_argument("--timeout", default="2m", metavar="DURATION", help=help_)


def _add_database_commands(added: _Commands) -> None:
    description = "back up the remediator's database, while it runs or not, and the configuration with its secrets"
    backup = added.add("backup", commands.backup, description, ["config", "as_json"])
    backup.add_argument(
        "to", metavar="FILE", type=Path, help="a new file (.db), or a folder for files named by the time"
    )
    help_ = "then remove backups in the folder that are older, such as 30d, except the newest 3 of each kind"
    backup.add_argument("--keep", metavar="DURATION", help=help_)
    help_ = (
        "only what belongs to this program: the record and the configuration, the heartbeats, or the gateway's state"
    )
    backup.add_argument("--for", dest="program", choices=SERVERS, help=help_)
    description = "restore a backup of a database or of the gateway's state; the program that uses it must not run"
    restore = added.add("restore", commands.restore, description, ["config", "as_json"])
    restore.add_argument("source", metavar="FILE", type=Path, help="a file that `defib backup` has written")
