"""`defib demo`: starts a service and everything that watches it, kills it, and shows how it recovers."""

import asyncio
import os
import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from defib.demo import service, sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.feishu_app import APP, CHAT, USER_OPEN_ID
from defib.demo.launcher import Launcher
from defib.demo.live import LiveReport
from defib.demo.stack import Stack, check_requirements, reserve_ports
from defib.demo.timeline import Timeline
from defib.output import print_json, print_text
from defib.starter import files

RECOVERY_TIMEOUT = 180.0  # seconds
SERVICE = "web"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run(*, once: bool, as_json: bool) -> int:
    """Run the demo; return 0 if the remediator restarted the service and it recovered. Raises StartError."""
    check_requirements()
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    launcher = await Launcher.begin()
    feishu = FeishuSimulator()
    try:
        return await _run_with(launcher, feishu, once=once, as_json=as_json)
    except asyncio.CancelledError:
        return 128 + signal.SIGINT
    finally:
        for number in SIGNALS:  # it is stopping already
            asyncio.get_running_loop().add_signal_handler(number, lambda: None)
        _report("stopping everything")
        await feishu.stop()
        await launcher.end()


async def _run_with(launcher: Launcher, feishu: FeishuSimulator, *, once: bool, as_json: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="defib-demo-"))
    await launcher.remove_folder_at_end(folder)
    folder.chmod(0o711)
    stack = Stack(launcher, folder, report=_report)
    _report(f"starting everything on loopback, in {folder}")
    web, ssh = reserve_ports(2)
    demo_service = await service.start(launcher, folder, web, f"defib-demo-{secrets.token_hex(4)}")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    _report("starting an SSH server")
    host = await sshd.start(launcher, folder / "sshd", ssh, {"PATH": path, **_docker_environment()})
    await feishu.start()
    feishu.apps.callback_url = f"{stack.url('remediator')}/webhook/feishu/chat"
    stack.configuration(build_inventory(host, demo_service, web, feishu))
    password = secrets.token_urlsafe(8)
    web_config = folder / "web.yml"
    web_config.touch(mode=0o600)
    web_config.write_text(await asyncio.to_thread(files.render_web_config, {files.ADMIN: password}))
    stack.options["remediator"] = ["--web.config.file", str(web_config)]
    await stack.start()
    await stack.wait_for("the service to be up", lambda: _is_up(stack))
    _report(f"the service is {demo_service.kind} on http://127.0.0.1:{web}; killing it")
    out = sys.stderr if as_json else sys.stdout
    timeline = Timeline(stack, feishu, SERVICE, out)
    await demo_service.kill()
    recovered = await timeline.follow(within=RECOVERY_TIMEOUT)
    if as_json:
        print_json({"events": timeline.events})
    if not once:
        await _print_addresses(stack, feishu, folder, web, password)
        _report(_suggest_experiments(demo_service, folder / "config"))
        await LiveReport(stack, feishu, SERVICE, out).follow()
    await stack.client.aclose()
    return 0 if recovered else 1


def _docker_environment() -> Mapping[str, str]:
    return {name: os.environ[name] for name in ("DOCKER_HOST",) if name in os.environ}


def build_inventory(
    host: sshd.Sshd, demo_service: service.DemoService, port: int, feishu: FeishuSimulator
) -> Mapping[str, Any]:
    """Return the inventory of the demo: one host, one service, two channels."""
    return {
        "hosts": {
            "demo": {
                "address": "127.0.0.1",
                "ssh": {
                    "user": host.user,
                    "port": host.port,
                    "key_file": str(host.key_file),
                    "known_hosts": str(host.known_hosts),
                },
            }
        },
        "services": {
            SERVICE: {
                "name": "Demo web page",
                "category": "web",
                "provider": "demo",
                "host": "demo",
                "probe": {
                    "every": "1s",
                    "retry_every": "500ms",
                    "timeout": "2s",
                    "http": {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "heart"}},
                },
                "control": {**demo_service.control, "timeout": "30s", "start_within": "20s"},
                "on_failure": "restart",
            }
        },
        # Short, so that the next experiment has all attempts again.
        "remediation": {"hold": "3s", "backoff": {"first": "5s"}, "window": "30s"},
        "notify": {
            "language": "en",
            "timezone": "UTC",
            "people": {"you": {"open_id": USER_OPEN_ID, "role": "admin"}},
            "channels": {
                "oncall": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}},
                "chat": {"feishu_app": {**APP, "chat_id": CHAT, "url": feishu.url}},
            },
            # Messages that are not about a service go to one chat only.
            "routes": [
                {"match": {"service": SERVICE}, "channels": ["chat"], "continue": True},
                {"channels": ["oncall"]},
            ],
        },
    }


async def _is_up(stack: Stack) -> bool:
    status = await stack.get("exporter", f"/api/v1/services/{SERVICE}")
    series = await stack.get("prometheus", f'/api/v1/query?query=service_up{{service="{SERVICE}"}}')
    return bool(status and status["up"] and series and series["data"]["result"])


async def _print_addresses(stack: Stack, feishu: FeishuSimulator, folder: Path, port: int, password: str) -> None:
    _report("\nEverything runs until Ctrl-C:")
    for name, address in (
        ("service", f"http://127.0.0.1:{port}/"),
        ("exporter", f"{stack.url('exporter')}/metrics"),
        ("Prometheus", await _find_page(stack, "prometheus", "/graph", "/api/v1/alerts")),
        ("Alertmanager", await _find_page(stack, "alertmanager", "/", "/api/v2/alerts")),
        ("console", f"{stack.url('remediator')}/ (user {files.ADMIN.name}, password {password})"),
        ("Feishu", f"{feishu.url}/ (simulated; its buttons work)"),
        ("configuration", str(folder / "config")),
        ("local token", str(stack.token_file)),
    ):
        _report(f"  {name:<14}{address}")


async def _find_page(stack: Stack, name: str, page: str, api: str) -> str:
    """Return the URL of a program's web page, or of its API if it has no pages, as in Debian's packages."""
    url = f"{stack.url(name)}{page}"
    try:
        response = await stack.client.get(url, follow_redirects=True)
        has_page = response.is_success and "html" in response.headers.get("Content-Type", "")
    except httpx.HTTPError:
        has_page = False
    return url if has_page else f"{stack.url(name)}{api} (JSON; this build has no web pages)"


def _suggest_experiments(demo_service: service.DemoService, config: Path) -> str:
    kill, break_it, repair = map(
        shlex.join, (demo_service.kill_command, demo_service.break_command, demo_service.repair_command)
    )
    return f"""
Try these in another terminal, in any order; the effects are shown here:
  export DEFIB_CONFIG={shlex.quote(str(config))}
  defib() {{ {_own_command()} "$@"; }}

  1. Stop the service on purpose: Defib leaves it stopped, and notifies nobody.
       defib control {SERVICE} stop
       defib control {SERVICE} start         # when done
  2. Put it into maintenance, then kill it: Defib restarts it only after the maintenance.
       defib maintenance begin service {SERVICE} --for 10m --reason "a try"
       {kill}
       defib maintenance                 # its ID
       defib maintenance end ID
  3. Break it so that a restart does not help: when its attempts are used up, Defib asks for a person.
       {break_it}
       defib explain {SERVICE}
       {repair}     # when done
"""


def _own_command() -> str:
    """Return the command that runs this program, for a shell."""
    if sys.argv[0].endswith("__main__.py"):
        return shlex.join([sys.executable, "-m", "defib"])
    return shlex.quote(str(Path(sys.argv[0]).resolve()))


def _report(text: str) -> None:
    print_text(text, sys.stderr)
