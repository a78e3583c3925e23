"""Secrets of the programs' memory and environment stay there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from fleet.shells.local import LocalShell
from tests.integration import peers
from tests.integration.loop import Loop
from tests.support import eventually, probed

PR_GET_DUMPABLE = 3
WITH_CORE_DUMPS = ["sh", "-c", 'ulimit -c "$(ulimit -H -c)"; exec "$@"', "sh"]


@pytest.mark.parametrize("program", ["exporter", "remediator"])
def test_a_program_that_crashes_leaves_no_core_dump(program: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    written = {"remediator": {"database": f"sqlite:///{tmp_path}/record.db", "webhook_token": "webhook-t0ken"}}
    (tmp_path / "config" / "a.yaml").write_text(yaml.safe_dump(written))
    argv = [sys.executable, "-m", "defib", program, "--config", str(tmp_path / "config"), "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*WITH_CORE_DUMPS, *argv], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "listening on" in process.stdout.readline()
        process.send_signal(signal.SIGABRT)
        _, status = os.waitpid(process.pid, 0)
    assert (os.WTERMSIG(status), os.WCOREDUMP(status)) == (signal.SIGABRT, False)
    assert list(tmp_path.glob("core*")) == []


def test_the_kernel_passes_no_core_dump_to_a_program_that_collects_them() -> None:
    """That program is run without regard to the limit."""
    code = f"""
import ctypes
from runtime.lifecycle import disable_core_dumps
disable_core_dumps()
print(ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


@pytest.mark.parametrize("read_only", [True, False])
async def test_commands_on_this_machine_receive_no_secrets_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, *, read_only: bool
) -> None:
    for name in ("DATABASE_PASSWORD", "HTTPS_PROXY", "FEISHU_WEBHOOK"):
        monkeypatch.setenv(name, f"s3cret-{name}")
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    completed = await LocalShell(read_only=read_only).run(["env"], timeout=30)
    assert (completed.status, "s3cret" in completed.output) == (0, False)
    received = dict(line.split("=", 1) for line in completed.stdout.splitlines())
    assert (received["PATH"], received["TZ"], received["LC_ALL"]) == (os.environ["PATH"], "Asia/Shanghai", "C")


async def test_functions_of_python_probes_receive_no_secrets_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "s3cret-value")
    (tmp_path / "mine.py").write_text("import os\ndef look(context):\n    return repr(sorted(os.environ.values()))\n")
    result = await probed(tmp_path, "python", {"call": "mine:look"})
    assert (os.environ["PATH"] in result.message, "s3cret-value" in result.message) == (True, False)


@pytest.mark.needs("sshd")
async def test_what_hosts_and_services_repeat_is_stored_without_secrets(loop: Loop) -> None:
    """A backup has it, and after the secret has changed, nothing would mask it."""
    secret = "s3cret-of-a-control"

    async def repeat(request: web.Request) -> web.Response:
        return web.Response(status=500, text=f"got {request.headers.get('Authorization', secret)}")

    async with peers.web_server(repeat) as port:
        url = f"http://127.0.0.1:{port}/"
        headers = {"Authorization": f"Bearer {secret}"}
        control = {"restart": {"url": url, "headers": headers}, "status": {"url": url, "headers": headers}}
        service = {
            "probe": {"every": "200ms", "retry_every": "200ms", "http": {"url": url, "expect": {"body_lacks": ["got"], "status": [500]}}},
            "control": {"http": control, "timeout": "5s", "start_within": "1s"},
            "on_failure": "restart",
        }  # fmt: skip
        await loop.start({"web": service})
        await loop.fire("web")

        async def has_ended() -> bool:
            rows = (await loop.ask("GET", "/api/v1/actions")).json()["actions"]
            return any(row["ended_at"] is not None and row["before"] for row in rows)

        await eventually(has_ended)
    stored = b"".join(path.read_bytes() for path in loop.folder.rglob("*.db*"))
    assert (b"HTTP 500 got" in stored, secret.encode() in stored) == (True, False)
