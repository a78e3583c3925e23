"""What all commands have in common: global options, unset secrets, unknown names, unreadable files, JSON, times."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from aiohttp import web
from blockbuster import BlockBuster

from defib.cli import main
from defib.demo.feishu import SECRET
from fleet.inventory.model import Inventory
from remediator.record.database import Database
from tests.forked_defib import run_defib
from tests.integration import peers
from tests.integration.loop import Loop, alert, delivery
from tests.support import eventually, write

SECRETS = """
    exporter: {token: "${UNSET_EXPORTER}"}
    remediator:
      database: "sqlite:///%s/record.db"
      token: "${UNSET_TOKEN}"
      webhook_token: "${file:secrets/missing}"
      retention: "${UNSET_RETENTION}"
      url: %s
    notify:
      timezone: Asia/Shanghai
      channels: {ops: {feishu: {webhook: "${UNSET_WEBHOOK}"}}}
    hosts:
      here: {address: 127.0.0.1, shell: local}
    services:
      web:
        host: here
        probe: {command: {run: ["true"]}}
        control: {command: {restart: ["echo", "restarted"]}}
      llm:
        host: here
        probe: {openai: {url: "http://127.0.0.1:1/v1", model: m, api_key: "${UNSET_KEY}"}}
        control: {http: {restart: {url: "http://127.0.0.1:1/", headers: {X-Key: "${UNSET_KEY}"}}}}
    """


def defib(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_defib(*arguments, cwd=cwd, env=environment)


async def on_loop(loop: Loop, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the configuration of a loop, `--config` before the command."""
    return await asyncio.to_thread(defib, "--config", str(loop.folder / "config"), *arguments)


@pytest.fixture
def unset(tmp_path: Path) -> Path:
    """A configuration whose secrets are all unset, as in a cron job."""
    Database(f"sqlite:///{tmp_path}/record.db", Inventory()).close()
    return write(tmp_path / "config", defib=SECRETS % (tmp_path, "http://127.0.0.1:1"))


def test_commands_work_while_secrets_that_they_do_not_use_are_unset(unset: Path, tmp_path: Path) -> None:
    config = ["--config", str(unset)]
    backup = defib("backup", str(tmp_path / "copy.db"), *config)
    assert (backup.returncode, (tmp_path / "copy.db").is_file()) == (0, True), backup.stderr
    restored = defib(*config, "--json", "restore", str(tmp_path / "copy.db"))
    assert (restored.returncode, json.loads(restored.stdout)["incidents"]) == (0, 0), restored.stderr
    assert defib("probe", "web", *config).returncode == 0
    direct = defib("control", "web", "restart", "--direct", *config)
    assert (direct.returncode, direct.stdout) == (0, "restarted\n"), direct.stderr
    checked = defib("doctor", "here", "--json", *config)
    assert {each["subject"] for each in json.loads(checked.stdout)["findings"]} <= {"here"}, checked.stdout


@pytest.mark.parametrize(
    "arguments", [["incidents"], ["explain", "web"], ["maintenance"], ["automation"], ["control", "web", "status"]]
)
def test_only_the_api_token_is_needed_for_the_api(unset: Path, tmp_path: Path, arguments: list[str]) -> None:
    missing = defib(*arguments, "--config", str(unset))
    assert missing.returncode == 1
    assert re.fullmatch(
        rf"{unset}/defib.yaml:\d+: remediator.token: the environment variable UNSET_TOKEN is not set\n", missing.stderr
    ), missing.stderr
    (tmp_path / "token").write_text("from-a-file")
    (tmp_path / "token").chmod(0o600)
    from_file = defib(*arguments, "--token-file", str(tmp_path / "token"), "--config", str(unset))
    for done in (from_file, defib(*arguments, "--config", str(unset), UNSET_TOKEN="given")):
        assert (
            done.returncode,
            "remediator at http://127.0.0.1:1: cannot connect: Connection refused" in done.stderr,
        ) == (1, True), done.stderr


@pytest.mark.parametrize("other", ["", "every: 10s, http: {url: 'http://h/', expect: {status: '${file:secrets/bad}'}}"])
def test_a_direct_control_masks_the_secrets_of_probes(tmp_path: Path, other: str) -> None:
    """A service may log the requests of its probe; with an invalid probe, their secrets are unknown, which is printed."""
    (tmp_path / "config" / "secrets").mkdir(parents=True)
    (tmp_path / "config" / "secrets" / "probe").write_text("probe&s3cret/of+web")
    (tmp_path / "config" / "secrets" / "bad").write_text("not-a-status")
    config = write(
        tmp_path / "config",
        defib=f"""
        hosts: {{here: {{address: 127.0.0.1, shell: local}}}}
        services:
          web:
            host: here
            probe: {{http: {{url: "http://h/", auth: {{bearer: "${{file:secrets/probe}}"}}}}}}
            control:
              command:
                restart: ["true"]
                logs: [sh, -c, "cat {tmp_path}/config/secrets/probe; echo ' ?token=probe%26s3cret%2fof%2bweb' >&2"]
          llm:
            host: here
            probe: {{{other or 'openai: {url: "http://127.0.0.1:1/v1", model: m, api_key: "${UNSET_KEY}"}'}}}
        """,
    )
    for arguments in (["control", "web", "logs", "--direct"], ["--json", "control", "web", "logs", "--direct"]):
        done = defib("--config", str(config), *arguments)
        assert done.returncode == 0, done.stderr
        is_masked = ("?token=***" in done.stdout, "s3cret" in done.stdout) == (True, False)
        assert (is_masked, "warning: secrets of probes are not masked" in done.stderr) == (not other, bool(other))


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["probe", "llm"], "services.llm.probe.openai.api_key"),
        (["control", "llm", "restart", "--direct"], "services.llm.control.http.restart.headers.X-Key"),
    ],
)
def test_a_secret_that_is_used_must_be_set(unset: Path, arguments: list[str], path: str) -> None:
    done = defib(*arguments, "--config", str(unset))
    assert f": {path}: the environment variable UNSET_KEY is not set\n" in done.stderr
    assert done.returncode == (2 if arguments[0] == "probe" else 1)


@pytest.mark.parametrize("arguments", [["probe", "web"], ["control", "web", "restart", "--direct"], ["doctor", "h"]])
@pytest.mark.parametrize("route", ["ssh: {via: inner}", "ssh: {}, control_ssh: {via: inner}"])
def test_references_of_jump_hosts_must_be_set(tmp_path: Path, arguments: list[str], route: str) -> None:
    """Those of the whole route, but not the jump host's password, which only its own controls use."""
    write(
        tmp_path,
        defib="""
        hosts:
          outer: {address: "${UNSET_JUMP}.invalid", ssh: {}, sudo: {password: "${UNSET_PASSWORD}"}}
          inner: {address: inner.invalid, ssh: {via: outer}}
          h: {address: h.invalid, @route@}
        services:
          web: {host: h, probe: {command: {run: ["true"]}}, control: {command: {restart: ["true"]}}}
        """.replace("@route@", route),
    )
    done = defib(*arguments, "--config", str(tmp_path))
    message = "hosts.outer.address: the environment variable UNSET_JUMP is not set"
    is_needed = "control" not in route or arguments[0] != "probe"
    assert (message in done.stdout + done.stderr) == is_needed, done
    assert "UNSET_PASSWORD" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "exporter", "remediator"])
def test_check_and_the_servers_need_all_secrets(unset: Path, command: str) -> None:
    done = defib(command, "--config", str(unset))
    assert (done.returncode, "UNSET_EXPORTER" in done.stderr or "UNSET_TOKEN" in done.stderr) == (1, True), done.stderr


def test_check_for_the_gateway(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", defib="gateway: {}")
    done = defib("check", "--for", "gateway", "--config", str(empty))
    assert (done.returncode, "gateway.upstreams: is empty" in done.stderr) == (1, True), done
    assert defib("check", "--config", str(empty)).returncode == 0
    upstreams = "gateway: {upstreams: {a: {url: 'http://h/v1'}}, state_file: ./no/where}"
    config = write(tmp_path / "config", defib=upstreams)
    done = defib("check", "--for", "gateway", "--config", str(config))
    assert done.stdout == f"{config}: 0 hosts, 0 services, 1 upstream, 0 clients, no errors\n"
    assert "gateway.state_file: the folder does not exist" in done.stderr


def test_a_database_that_is_an_unset_reference(tmp_path: Path) -> None:
    write(tmp_path / "config", defib='remediator: {database: "sqlite:///${UNSET_FOLDER}/record.db"}')
    done = defib("backup", str(tmp_path), "--config", str(tmp_path / "config"))
    assert (done.returncode, "remediator.database: the environment variable UNSET_FOLDER" in done.stderr) == (1, True)


def test_global_options_before_the_command(tmp_path: Path) -> None:
    config = write(tmp_path / "config", defib="services: {web: {probe: {tcp: {address: '127.0.0.1:1'}}}}")
    other = write(tmp_path / "other", defib="hosts: {}")
    before = defib("--config", str(config), "--json", "check")
    after = defib("check", "--json", "--config", str(config))
    assert json.loads(before.stdout) == {"hosts": 0, "services": 1, "errors": [], "warnings": []}
    assert (before.returncode, before.stdout) == (0, after.stdout)
    assert ": 0 hosts, 1 service, no errors\n" in defib("--config", str(other), "check", "--config", str(config)).stdout
    assert json.loads(defib("--json", "--config", str(config), "probe", "web").stdout)["success"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "exporter"], "argument --json: not supported by `defib exporter`"),
        (["--config", "x", "init", "y"], "argument --config: not supported by `defib init`"),
        (["chek"], "argument COMMAND: invalid choice: 'chek'; did you mean check?"),
        (["control", "web", "restrat"], "argument verb: invalid choice: 'restrat'; did you mean restart or start?"),
        (["list", "service"], "invalid choice: 'service'; did you mean services?"),
        (["list", "services", "--state", "up,dwon"], "argument --state: 'dwon' is not a state: use down, degraded,"),
        (["incidents", "web"], "argument ID: 'web' is not an ID: must be a number, such as 12"),
        (["silence", "--for", "1h"], "one of the arguments INCIDENT --alert is required"),
        (["maintenance", "begin", "host", "h", "--reason", "r"], "one of the arguments --for --until is required"),
    ],
)
def test_errors_in_arguments(arguments: list[str], message: str) -> None:
    done = defib(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "--since", "0s"], "argument --since: '0s' must be greater than 0"),
        (["replay", "--since", "1ms"], "argument --since: '1ms' must be at least 1s"),
        (["report", "--since", "0s"], "argument --since: '0s' must be greater than 0"),
        (["deadman", "--channel", "ops", "--within", "0s"], "argument --within: '0s' must be greater than 0"),
        (["replay", "--since", "7x"], "argument --since: '7x' is not a duration; write 500ms, 10s, 5m, 1h30m or 7d"),
        (
            ["maintenance", "begin", "host", "h", "--reason", "r", "--for", "long"],
            "argument --for: 'long' is not a duration; write 500ms, 10s, 5m, 1h30m or 7d",
        ),
        (["silence", "1", "--for", "2x"], "argument --for: '2x' is not a duration; write 500ms, 10s, 5m, 1h30m or 7d"),
        (["probe", "wbe"], "the inventory has no service 'wbe'; did you mean web?"),
        (["probe", "other"], "the inventory has no service 'other' (services: web)"),
        (["control", "wbe", "restart", "--direct"], "the inventory has no service 'wbe'; did you mean web?"),
        (["host", "setup", "gpu-1"], "the inventory has no host 'gpu-1'; did you mean gpu-01?"),
        (["doctor", "gpu-1"], "the inventory has no host 'gpu-1'; did you mean gpu-01?"),
        (["notify", "test", "onc"], "the inventory has no channel 'onc'; did you mean oncall?"),
    ],
)
def test_errors_in_values(tmp_path: Path, arguments: list[str], message: str) -> None:
    write(
        tmp_path,
        defib="""
        hosts: {gpu-01: {address: 10.0.0.1}}
        services: {web: {probe: {tcp: {address: "127.0.0.1:1"}}}}
        notify: {channels: {oncall: {feishu: {webhook: "http://127.0.0.1:1/"}}}}
        """,
    )
    done = defib(*arguments, "--config", str(tmp_path))
    assert (done.returncode, done.stderr) == (2 if arguments[0] == "probe" else 1, f"defib: {message}\n")


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    "command", [["check"], ["doctor"], ["doctor", "h"], ["host", "setup", "h"], ["backup", "x.db"]]
)
@pytest.mark.parametrize("closed", ["config", "config/secrets", "keys", "record"])
def test_files_that_cannot_be_read_are_named(readable: Path, command: list[str], closed: str) -> None:
    """As a user who may not read a folder: an error message, never a traceback."""
    ssh = {"user": "u", "key_file": f"{readable}/keys/id", "known_hosts": f"{readable}/keys/known_hosts", "port": 1}
    for folder in ("config/secrets", "keys", "record"):
        (readable / folder).mkdir(parents=True)
    for file in ("config/secrets/token", "keys/id", "keys/known_hosts", "record/record.db"):
        (readable / file).write_text("text")
    written = {
        "exporter": {"url": "http://127.0.0.1:1", "token": "${file:secrets/token}"},
        "remediator": {"url": "http://127.0.0.1:1", "database": f"sqlite:///{readable}/record/record.db"},
        "hosts": {"h": {"address": "127.0.0.1", "ssh": ssh}},
    }
    (readable / "config" / "defib.yaml").write_text(yaml.safe_dump(written))
    (readable / closed).chmod(0o700)
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-m", "defib", *command]
    done = subprocess.run(
        [*argv, "--config", str(readable / "config")], capture_output=True, text=True, check=False, cwd="/"
    )
    assert "Traceback" not in done.stderr, done.stderr
    named = {
        "config": command, "config/secrets": ["check"], "keys": ["doctor", "h"], "record": ["doctor"],
    }[closed]  # fmt: skip
    if command == named:
        assert done.returncode == (0 if closed == "record" and command == ["check"] else 1), done.stdout
        assert str(readable / closed) in done.stdout + done.stderr


@pytest.mark.needs("sshd")
async def test_commands_of_the_api_work_while_the_configuration_has_errors(loop: Loop) -> None:
    """Above all the one that stops automation."""
    await loop.start({"web": loop.service("web")})
    wrong = loop.folder / "config" / "wrong.yaml"
    wrong.write_text("hosts: {zz: {address: 127.0.0.1, thresholds: {filesystem: 80}}}\nservices: {web: {}}\n")
    for command in (["automation", "off", "--reason", "test"], ["status"], ["list", "services"]):
        done = await on_loop(loop, *command)
        assert "warning: the configuration has errors; `defib check` lists them" in done.stderr, done
        assert done.returncode == (0 if command != ["status"] else done.returncode), done
        assert "Traceback" not in done.stderr
    assert (await loop.ask("GET", "/api/v1/automation")).json()["enabled"] is False
    wrong.write_text("{")
    assert (await on_loop(loop, "list", "incidents")).stdout == "no incidents\n"


@pytest.mark.needs("sshd")
async def test_the_commands_of_the_api(loop: Loop) -> None:
    """A service that is up: explained in one line; unknown names and IDs; JSON; times in the configured zone."""
    web = loop.service("web")
    web["control"]["command"]["status"] = ["echo", "well"]
    await loop.start({"web": web}, notify={"timezone": "Asia/Shanghai"})
    up = await on_loop(loop, "explain", "web")
    assert up.stdout == "web is up; nothing to do. If it went down now: restart after ServiceDown fires\n", up
    verbose = await on_loop(loop, "explain", "web", "--verbose")
    gates = json.loads((await on_loop(loop, "--json", "explain", "web")).stdout)["gates"]
    assert len(re.findall(r"(?m)^  (?:open  |closed)  ", verbose.stdout)) == len(gates) > 20
    for arguments, message in (
        (["explain", "wbe"], "the inventory has no service 'wbe'; did you mean web?"),
        (["reset", "wbe"], "the inventory has no service 'wbe'; did you mean web?"),
        (["control", "wbe", "status"], "the inventory has no service 'wbe'; did you mean web?"),
        (["control", "wbe", "restart"], "the inventory has no service 'wbe'; did you mean web?"),
        (
            ["maintenance", "begin", "service", "wbe", "--for", "1h", "--reason", "r"],
            "the inventory has no service 'wbe'; did you mean web?",
        ),
        (
            ["maintenance", "begin", "host", "x", "--for", "1h", "--reason", "r"],
            "the inventory has no host 'x' (hosts: h",
        ),
        (["maintenance", "end", "7"], "there is no active maintenance 7 (active: none)"),
        (["incidents", "7"], "there is no incident 7 (the newest: none)"),
        (["acknowledge", "7"], "there is no incident 7 (the newest: none)"),
        (["silence", "7"], "there is no incident 7 (the newest: none)"),
        (["approve", "7"], "there is no action 7 (waiting for approval: none)"),
    ):
        done = await on_loop(loop, *arguments)
        assert (done.returncode, done.stderr.startswith(f"defib: {message}")) == (1, True), (arguments, done.stderr)
    until = (datetime.now(ZoneInfo("Asia/Shanghai")) + timedelta(hours=2)).strftime("%Y-%m-%d %H:%M:%S")
    begun = await on_loop(loop, "maintenance", "begin", "host", "h", "--until", until, "--reason", "disks")
    assert begun.stdout == f"maintenance 1 of host h until {until}: no automatic actions\n", begun
    assert f"host h, until {until}, by " in (await on_loop(loop, "maintenance")).stdout
    listed = json.loads((await on_loop(loop, "--json", "maintenance")).stdout)["maintenance"]
    assert [each["name"] for each in listed] == ["h"]
    ended = await on_loop(loop, "maintenance", "end", "1", "--json")
    assert json.loads(ended.stdout) == {"id": 1}
    assert json.loads((await on_loop(loop, "--json", "automation")).stdout)["enabled"] is True
    status = await on_loop(loop, "--json", "control", "web", "status")
    assert json.loads(status.stdout)["output"] == "well", status
    restarted = await on_loop(loop, "--json", "control", "web", "restart")
    assert (restarted.returncode, json.loads(restarted.stdout)["command"]) == (0, "succeeded"), restarted
    assert loop.restarts() == ["web"]


async def test_texts_with_line_breaks_cannot_look_like_other_lines(loop: Loop) -> None:
    """Notes, reasons, and names of alerts: in the output of commands, and in the summary of an incident."""
    forged = "x\r\nFORGED\n  FORGED\n    FORGED"
    await loop.start({"web": loop.service("web")})
    maintenance = {"scope": "service", "name": "web", "reason": forged, "for": "1h"}
    assert (await loop.ask("POST", "/api/v1/maintenance", maintenance)).is_success
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("wait", "maintenance")
    await loop.post(delivery(alert("web", forged)))
    assert (await loop.ask("POST", "/api/v1/incidents/1/notes", {"text": forged})).is_success
    assert (await loop.ask("PUT", "/api/v1/automation", {"enabled": False, "reason": forged})).is_success
    for arguments in (
        ["incidents", "1"], ["incidents"], ["explain", "web", "--verbose"], ["explain", "web"], ["status"], ["maintenance"],
        ["automation"], ["audit"], ["list", "events"], ["list", "services"], ["list", "incidents"],
    ):  # fmt: skip
        done = await on_loop(loop, *arguments)
        assert done.stdout, (arguments, done.stderr)
        assert [line for line in done.stdout.splitlines() if line.strip() == "FORGED"] == [], arguments
    page = (await loop.ask("GET", "/incidents/1")).text
    assert "FORGED" in page
    summary = page.rpartition("<pre>")[2].partition("</pre>")[0]
    assert [line for line in summary.splitlines() if line.strip() == "FORGED"] == [], summary


def test_settings_of_the_other_program_can_be_unset(tmp_path: Path) -> None:
    write(tmp_path, defib='remediator: {retention: "${UNSET_RETENTION}"}')
    done = defib("check", "--for", "exporter", "--config", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def listed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the states that `defib list services` has printed, by service, in order."""
    assert done.returncode == 0, done
    return {line.split()[2]: line.split()[0] for line in done.stdout.splitlines()[1:]}


@pytest.mark.needs("sshd")
async def test_the_fleet_on_a_terminal_is_that_of_the_console(loop: Loop) -> None:
    names: dict[str, dict[str, str]] = {"a": {}, "web": {"name": "门户网站"}, "qwen": {"provider": "vllm"}}
    services = {name: loop.service(name, on_failure="notify") | more for name, more in names.items()}
    await loop.start(services, notify={"timezone": "Asia/Shanghai"}, collect={"system": "1s"})
    created = await loop.ask("POST", "/api/v1/tokens", {"name": "reader", "role": "viewer"})
    viewer = loop.folder / "viewer"
    viewer.touch(mode=0o600)
    viewer.write_text(created.json()["token"])

    good = await on_loop(loop, "status")
    assert (good.returncode, good.stdout.splitlines()[0]) == (0, "3 up"), good
    assert (await on_loop(loop, "list", "incidents")).stdout == "no incidents\n"
    await loop.kill("web")
    await loop.fire("web")
    await loop.fire("qwen", "ServiceSlow")
    await loop.until_decision("refuse")

    expected = [("web", "down"), ("qwen", "degraded"), ("a", "up")]

    async def is_shown() -> bool:  # a page may be a second old
        page = (await loop.ask("GET", "/")).text
        return re.findall(r'id="s-(\w+)" class="(\w+)"', page) == expected

    await eventually(is_shown)
    printed = await on_loop(loop, "list", "services", "--token-file", str(viewer))
    assert list(listed(printed).items()) == expected
    assert re.search(r"(?m)^down +\S+ +web \(门户网站\) +h +exit: test exited with .* \d+ m?s +[-+]+-$", printed.stdout)
    for options, names_ in (
        (["--state", "up,degraded"], ["qwen", "a"]),
        (["--state", "up", "--state", "down"], ["web", "a"]),
        (["--provider", "vllm"], ["qwen"]),
        (["门户", "exit"], ["web"]),
    ):
        assert list(listed(await on_loop(loop, "list", "services", *options))) == names_
    assert (await on_loop(loop, "list", "services", "--host", "none")).stdout == "no services\n"

    bad = await on_loop(loop, "status", "--token-file", str(viewer))
    assert bad.returncode == 1
    assert bad.stdout.startswith("1 down, 1 degraded, 1 up\n"), bad
    assert "\n2 open incidents\n" in bad.stdout
    opened = (await loop.incident())["down_at"]
    local = datetime.fromisoformat(opened).astimezone(ZoneInfo("Asia/Shanghai"))
    assert f"{local + timedelta(seconds=0.5):%Y-%m-%d %H:%M:%S}" in bad.stdout
    asjson = await on_loop(loop, "--json", "status")
    answer = json.loads(asjson.stdout)
    assert (asjson.returncode, answer["counts"]["down"], answer["incident_count"]) == (1, 1, 2)
    assert [each["id"] for each in answer["services"]] == ["web", "qwen"]
    hosts = json.loads((await on_loop(loop, "list", "hosts", "--json")).stdout)["hosts"]
    assert {each["name"] for each in hosts} == {"h", "uncontrolled", "unreachable", "here"}
    assert re.search(r"(?m)^h +up +\S+ +\d+% +\S+ \d+%", (await on_loop(loop, "list", "hosts")).stdout)

    await on_loop(loop, "acknowledge", "1")
    await loop.fire("qwen", "ServiceSlow", status="resolved")
    await loop.until("recovered", 2)
    for options, ids in (
        ([], [1, 2]),
        (["--limit", "1"], [1]),
        (["--state", "open"], [1]),
        (["--state", "closed"], [2]),
        (["--service", "qwen"], [2]),
    ):
        incidents = json.loads((await on_loop(loop, "list", "incidents", "--json", *options)).stdout)["incidents"]
        assert [each["id"] for each in incidents] == ids, options
    rows = (await on_loop(loop, "list", "incidents")).stdout.splitlines()
    assert "  open  " in rows[1]
    assert "acknowledged by local" in rows[1]
    assert "recovered by self" in rows[2]


@pytest.mark.needs("sshd")
async def test_the_status_without_the_exporter_is_unknown(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    assert (await on_loop(loop, "status")).returncode == 0
    await loop.ask("PUT", "/api/v1/automation", {"enabled": False, "reason": "a network change"})
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "host", "name": "h", "for": "1h", "reason": "disks"})
    await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)

    async def is_seen() -> bool:
        return bool((await loop.ask("GET", "/api/v1/overview")).json()["problems"])

    await eventually(is_seen)
    done = await on_loop(loop, "status")
    assert done.returncode == 2
    first, *banners = done.stdout.splitlines()
    assert first == "1 up"
    assert banners[0].startswith("cannot read the exporter since ")
    assert "states are those of then" in banners[0]
    assert re.match(r"automation is off since .*: a network change$", banners[1])
    assert re.match(r"maintenance: host h, until .*: disks$", banners[2])
    assert "the hosts cannot be read from the exporter" in done.stdout
    services = await on_loop(loop, "list", "services")
    assert listed(services) == {"web": "up"}
    assert services.stderr.startswith("cannot read the exporter since ")
    hosts = await on_loop(loop, "list", "hosts")
    assert (hosts.returncode, "HTTP 502: cannot read the exporter's hosts" in hosts.stderr) == (1, True)
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
    away = await on_loop(loop, "status")
    assert (away.returncode, "cannot get an answer from the remediator" in away.stderr) == (2, True)


@pytest.mark.needs("sshd")
async def test_the_overview_refuses_unknown_parameters_and_masks_secrets(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    for query, message in (
        ("state=up,dwon", "unknown state 'dwon'; there are down, degraded, stopped, unknown, up"),
        ("page=2", "unknown parameter `page`"),
        ("limit=-1", "`limit` must be a number"),
        (f"q={'x' * 101}", "`q` has more than 100 characters"),
    ):
        refused = await loop.ask("GET", f"/api/v1/overview?{query}")
        assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True), query
    assert (await loop.ask("GET", "/api/v1/incidents?state=opened")).status_code == 400
    none = (await loop.ask("GET", "/api/v1/overview?state=down&state=degraded&limit=0")).json()
    assert (none["services"], none["total"], none["counts"]["up"]) == ([], 0, 1)
    body = {"scope": "service", "name": "web", "for": "1h", "reason": f"the secret {SECRET} is wrong"}
    assert (await loop.ask("POST", "/api/v1/maintenance", body)).status_code == 201

    async def is_in_maintenance() -> str:
        answer = await loop.ask("GET", "/api/v1/overview")
        return answer.text if answer.json()["services"][0]["maintenance"] else ""

    shown = await eventually(is_in_maintenance)
    assert (shown.count("the secret *** is wrong"), SECRET in shown) == (2, False)


COMMANDS = [
    ["status"], ["list", "services"], ["list", "hosts"], ["list", "incidents"], ["list", "events"], ["incidents"],
    ["incidents", "1"], ["explain", "web"], ["control", "web", "restart"], ["control", "web", "status"],
    ["acknowledge", "1"], ["silence", "1"], ["automation"], ["maintenance"],
    ["maintenance", "begin", "service", "web", "--for", "1h", "--reason", "r"], ["token"],
    ["token", "create", "ci", "--role", "viewer"], ["session"], ["audit"], ["report"],
]  # fmt: skip
PLAIN_COMMANDS = [
    ["note", "1", "text"],
    ["approve", "1"],
    ["reset", "web"],
    ["token", "revoke", "ci"],
    ["session", "end", "1"],
]
NO_ANSWERS = ["<html>Sign in</html>", "", "null", "[]", '"text"', "{"]
KEYS = (
    "incidents", "events", "next", "tokens", "sessions", "audit", "maintenance", "services", "hosts", "problems", "at",
    "counts", "gates", "alerts", "actions", "action", "until", "exit_status", "decision", "by_inventory", "on_call",
)  # fmt: skip
WRONG: tuple[Any, ...] = (7, "text", [None], [{}], [[]])
WRONG_ANSWERS = ["{}", *(json.dumps(dict.fromkeys(KEYS, wrong)) for wrong in WRONG)]


@pytest.mark.parametrize("command", [*COMMANDS, *PLAIN_COMMANDS], ids=" ".join)
async def test_an_answer_of_something_else_is_one_error(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], blocking_calls: BlockBuster
) -> None:
    blocking_calls.deactivate()  # a command does one thing at a time
    said = ""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=said, content_type="text/html")

    (tmp_path / "token").write_text("a-token")
    (tmp_path / "token").chmod(0o600)
    async with peers.web_server(answer) as port:
        config = write(
            tmp_path / "config",
            defib=f"""
            remediator: {{url: "http://127.0.0.1:{port}", database: "sqlite:///{tmp_path}/record.db"}}
            services: {{web: {{probe: {{tcp: {{address: "127.0.0.1:1"}}}}}}}}
            """,
        )
        for said in [*NO_ANSWERS, *(WRONG_ANSWERS if command in COMMANDS else [])]:
            with pytest.raises(SystemExit) as ended:
                await asyncio.to_thread(main, [*command, "--config", str(config)])
            printed = capsys.readouterr()
            assert ended.value.code == 2, (said, printed)
            assert re.fullmatch(r"(defib|action 7 .*): unexpected answer of the remediator: .*\n", printed.err), (
                said,
                printed,
            )


@pytest.mark.needs("sshd")
async def test_lines_are_cut_only_on_a_terminal(loop: Loop) -> None:
    name = f"a rather {'long ' * 20}name"
    await loop.start({"web": loop.service("web") | {"name": name}})
    assert name in (await on_loop(loop, "list", "services")).stdout
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "defib", "list", "services", "--config", str(loop.folder / "config")]
    env = {**os.environ, "COLUMNS": "60"}
    await asyncio.to_thread(subprocess.run, argv, stdout=follower, env=env, timeout=200, check=True)
    lines = os.read(leader, 65536).decode().splitlines()
    os.close(leader)
    os.close(follower)
    assert lines[1].startswith("up ")
    assert [len(line) <= 60 for line in lines] == [True, True]
