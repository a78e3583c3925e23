"""The systemd units: as systemd reads them, and a program of ours running under what they allow."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from defib.commands import EXPORTER_RESOLVER_THREADS
from defib.demo.stack import reserve_ports
from runtime import lookups
from tests.support import write
from tests.systemd import UNPACKED, libraries

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
EXPOSED = 2.0  # of 10, as systemd-analyze counts
TOKEN = "token-of-the-exporter"
pytestmark = pytest.mark.needs("systemd")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze") or str(UNPACKED / "usr/bin/systemd-analyze")
    environment = {**os.environ, **libraries()}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(params=UNITS, ids=lambda path: str(path.name))
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit as it is shipped, but for a program that is there."""
    path = tmp_path / str(request.param.name)
    path.write_text(request.param.read_text().replace("/opt/defib/current/bin/defib", "/bin/true"))
    return path


def test_systemd_finds_nothing_wrong(unit: Path) -> None:
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_is_exposed_to_little(unit: Path) -> None:
    told = analyze("security", "--offline=true", str(unit)).stdout
    found = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert found is not None, told
    assert float(found[1]) <= EXPOSED


def test_all_hold_back_alike() -> None:
    hardened = [
        {
            line
            for line in path.read_text().splitlines()
            if re.match(r"Protect|Private|Restrict|NoNew|Memory|System|Lock", line)
        }
        for path in UNITS
    ]
    assert hardened == [hardened[0]] * len(UNITS)
    for wanted in ("ProtectSystem=strict", "NoNewPrivileges=true", "MemoryMax=", "LimitNOFILE=", "LimitCORE=0"):
        assert all(wanted in path.read_text() for path in UNITS)


def test_they_permit_the_threads_that_look_up_names() -> None:
    """Libuv ends a program that cannot create them."""
    for path in UNITS:
        (limit,) = re.findall(r"^TasksMax=(\d+)$", path.read_text(), re.MULTILINE)
        threads = EXPORTER_RESOLVER_THREADS if "exporter" in path.stem else lookups.THREADS
        assert int(limit) >= threads + 100, path.stem


def test_they_run_as_different_users() -> None:
    users = {path.stem: re.findall(r"^User=(.+)$", path.read_text(), re.MULTILINE) for path in UNITS}
    # The watcher sends to the channels of the remediator, whose secrets it reads.
    assert users == {
        "defib-deadman": ["defib"],
        "defib-exporter": ["defib-exporter"],
        "defib-gateway": ["defib-gateway"],
        "defib-remediator": ["defib"],
    }


@pytest.fixture
def service(systemd: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The exporter as a unit of a real systemd, under what the shipped unit allows; gives systemctl and its port.

    The manager is a user's: what only the system's can do (another user, namespaces of the file system) is left out.
    """
    (port,) = reserve_ports(1)
    run = systemd.parent / "run"
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    written = f"""
        services: {{web: {{probe: {{every: 1s, tcp: {{address: '127.0.0.1:1'}}}}}}}}
        exporter: {{token: '${{file:{run}/credentials/defib-exporter.service/token}}'}}
        """
    config = write(tmp_path / "config", a=written)
    text = next(path for path in UNITS if "exporter" in path.name).read_text()
    left_out = "User|Group|SupplementaryGroups|EnvironmentFile|Protect|Private|RemoveIPC|Ambient|Capability|MemoryMax|TasksMax|Wants|After|WantedBy"
    kept = [line for line in text.splitlines() if not re.match(rf"({left_out})", line)]
    begin = f"LoadCredential=token:{tmp_path}/token\nExecStart={sys.executable} -m defib exporter --config {config} --listen 127.0.0.1:{port}"
    made = (
        re.sub(r"ExecStart=.*", begin, "\n".join(kept))
        .replace("[Install]", "")
        .replace("[Unit]", "[Unit]\nDefaultDependencies=no")
    )
    made = made.replace("[Service]", f"[Service]\nWorkingDirectory={ROOT}\nStandardError=file:{tmp_path}/log")
    units = systemd.parent / "units"
    (units / "defib-exporter.service").write_text(made)
    ctl = systemd / "systemctl"
    subprocess.run([ctl, "daemon-reload"], check=True)
    subprocess.run([ctl, "start", "defib-exporter.service"], check=True)
    yield ctl, port
    subprocess.run([ctl, "stop", "defib-exporter.service"], check=False)
    (units / "defib-exporter.service").unlink()


def test_the_exporter_runs_under_it_reloads_and_stops(service: tuple[Path, int], tmp_path: Path) -> None:
    ctl, port = service
    ends, page = time.monotonic() + 20, ""
    while True:
        try:
            page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            if (
                'service_probes_total{service="web",host="",provider="other",category="other",result="failure"} 0'
                not in page
            ):
                break
        except httpx.HTTPError:
            pass
        assert time.monotonic() < ends, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.2)
    assert 'reason="connect"' in page
    headers = {"Authorization": f"Bearer {TOKEN}"}
    probed = httpx.post(f"http://127.0.0.1:{port}/api/v1/services/web/probe", headers=headers, trust_env=False)
    assert probed.status_code == 200, "the credential was not read"
    shown = subprocess.run(
        [ctl, "show", "--property=LimitCORE", "defib-exporter.service"], capture_output=True, check=True
    )
    assert shown.stdout == b"LimitCORE=0\n"
    subprocess.run([ctl, "reload", "defib-exporter.service"], check=True)
    subprocess.run([ctl, "stop", "defib-exporter.service"], check=True)
    argv = [str(ctl), "show", "--property=Result,ExecMainStatus,NRestarts", "defib-exporter.service"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert set(told.stdout.split()) == {"Result=success", "ExecMainStatus=0", "NRestarts=0"}, (
        tmp_path / "log"
    ).read_text()[-2000:]
