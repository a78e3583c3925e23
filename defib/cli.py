"""The commands: what each takes, and which function carries it out."""

import argparse
import getpass
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from defib import check, control, doctor, host, probe
from defib.demo import demo
from defib.kinds import KINDS
from fleet.loading import Loaded, directory, load
from fleet.references import Program
from runtime import VERSION, logs, webconfig
from runtime.errors import DefibError
from runtime.lifecycle import Listen
from runtime.redaction import Redactor

CANNOT_TELL = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    options = parser().parse_args(argv)
    have_a_name()
    try:
        sys.exit(options.run(options))
    except DefibError as error:
        print(_one_line_each(error), file=sys.stderr)
        sys.exit(options.on_error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has enough of it
        sys.exit(0)


def have_a_name() -> None:
    """Asyncssh wants to know who we are, which a container's user id often has no name for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = "defib"


def _one_line_each(error: DefibError) -> str:
    return f"{error}" if "\n" in str(error) or ":" in str(error) else f"defib: {error}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="defib", description="Watches services, restarts the dead ones, tells people once."
    )
    top.add_argument("--version", action="version", version=f"defib {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_, description=help_)
        made.set_defaults(run=run, on_error=1)
        made.add_argument(
            "--config", type=Path, metavar="DIR", help="configuration directory ($DEFIB_CONFIG, ./config, /etc/defib)"
        )
        return made

    checking = command("check", _check, "load the inventory and print every error in it")
    checking.add_argument("--show", action="store_true", help="print the resolved inventory, secrets masked")
    checking.add_argument("--for", dest="program", choices=["exporter", "remediator"], help="resolve only what it uses")
    checking.add_argument("--schema", action="store_true", help="print the JSON Schema of configuration files")

    for name, serve, listen in (
        ("exporter", _exporter, "0.0.0.0:9999"),
        ("remediator", _remediator, "127.0.0.1:9095"),
    ):
        server = command(name, serve, f"serve the {name}")
        server.add_argument("--listen", default=listen, metavar="ADDRESS:PORT", help=f"default {listen}")
        server.add_argument(
            "--web.config.file",
            dest="web_config",
            type=Path,
            metavar="FILE",
            help="TLS and users, as Prometheus exporters",
        )

    probing = command("probe", _probe, "probe a service once, now, from here")
    probing.add_argument("service", metavar="SERVICE")
    probing.add_argument("--json", action="store_true", help="print the result as JSON")
    probing.set_defaults(on_error=CANNOT_TELL)

    controlling = command("control", _control, "start, stop, restart or ask a service, through the remediator")
    controlling.add_argument("service", metavar="SERVICE")
    controlling.add_argument("verb", choices=["status", "start", "stop", "restart", "logs"])
    controlling.add_argument("--direct", action="store_true", help="go to the host itself: no locks, no record")

    hosting = command("host", _host, "make a host ready: print the script for its administrator, or run it")
    hosting.add_argument("verb", choices=["setup"])
    hosting.add_argument("host", metavar="HOST")
    hosting.add_argument("--from", dest="sources", default="", metavar="ADDRESSES", help="where logins may come from")
    hosting.add_argument("--apply", metavar="USER", help="run it there, as `ssh USER@HOST sudo sh`")

    examining = command("doctor", _doctor, "check what the hosts need, and say what to mend")
    examining.add_argument("hosts", metavar="HOST", nargs="*")

    showing = commands.add_parser(
        "demo", help="the whole loop on this machine", description="The whole loop, on this machine."
    )
    showing.add_argument(
        "--once", action="store_true", help="end after one round; exit 0 if the service was brought back"
    )
    showing.add_argument("--json", action="store_true", help="print the timeline as one line of JSON, the last")
    showing.set_defaults(run=_demo, on_error=1)
    return top


def _loader(options: argparse.Namespace, *programs: Program) -> Callable[[], Loaded]:
    return partial(load, directory(options.config), KINDS, programs=programs)


def _check(options: argparse.Namespace) -> int:
    if options.schema:
        return check.schema()
    return check.check(directory(options.config), options.program, show=options.show)


def _exporter(options: argparse.Namespace) -> int:
    from exporter import app  # noqa: PLC0415 - a command loads what it needs

    app.prepare_process()
    redact = Redactor()
    logs.configure(redact)
    web = webconfig.load(options.web_config)
    return _serve(app.run(_loader(options, "exporter"), Listen.parse(options.listen), web, redact))


def _remediator(options: argparse.Namespace) -> int:
    from remediator import app  # noqa: PLC0415 - a command loads what it needs

    redact = Redactor()
    logs.configure(redact)
    web = webconfig.load(options.web_config)
    return _serve(app.run(_loader(options, "remediator"), Listen.parse(options.listen), web, redact))


def _serve(server: Coroutine[Any, Any, None]) -> int:
    # A reload that is asked for before we serve would end us; what is being loaded is as new as it gets.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    uvloop.run(server)
    return 0


def _probe(options: argparse.Namespace) -> int:
    return uvloop.run(probe.probe(_loader(options, "exporter"), options.service, as_json=options.json))


def _control(options: argparse.Namespace) -> int:
    program: Program = "remediator" if options.direct else "client"
    run = control.direct if options.direct else control.through_remediator
    return uvloop.run(run(_loader(options, program), options.service, options.verb))


def _host(options: argparse.Namespace) -> int:
    return host.setup(_loader(options), options.host, sources=options.sources, apply=options.apply)


def _doctor(options: argparse.Namespace) -> int:
    return uvloop.run(doctor.doctor(_loader(options, "exporter", "remediator"), options.hosts))


def _demo(options: argparse.Namespace) -> int:
    return demo.run(once=options.once, as_json=options.json)
