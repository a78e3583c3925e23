"""A reload that fails in any way leaves the old configuration in force, and says so."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support import NO_TLS, eventually, write

TOKEN = "t0ken-of-the-api"
# The program with a bug: a service of a certain name makes a part of it raise.
PROGRAM = """
import sys
import fleet.inventory.loading as loading
from exporter.scheduler.collector_scheduler import CollectorScheduler
from remediator.engine.observer import ServiceObserver

find_errors, apply, reload = loading.find_errors, CollectorScheduler.apply, ServiceObserver.reload

def crash_in_load(document, raw, kinds):
    if "crash-in-load" in raw["services"]:
        raise RuntimeError("a bug")
    return find_errors(document, raw, kinds)

async def crash_in_apply(self, hosts):
    if "crash-in-apply" in hosts:
        raise RuntimeError("a bug")
    await apply(self, hosts)

def crash_in_reload(self, inventory, *clients):
    if "crash-in-apply" in inventory.hosts:
        raise RuntimeError("a bug")
    reload(self, inventory, *clients)

loading.find_errors, CollectorScheduler.apply, ServiceObserver.reload = crash_in_load, crash_in_apply, crash_in_reload
from defib.cli import main
sys.exit(main())
"""


def configuration(folder: Path, service: str = "web", host: str = "h") -> dict[str, object]:
    return {
        "exporter": {"token": TOKEN},
        "remediator": {"token": TOKEN, "database": f"sqlite:///{folder}/record.db"},
        "hosts": {host: {"address": "127.0.0.1"}},
        "services": {service: {"probe": {"every": "200ms", "tcp": {"address": "127.0.0.1:1"}}}},
    }


@pytest.fixture(params=["exporter", "remediator"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    config = write(tmp_path / "config", a=yaml.safe_dump(configuration(tmp_path)))
    argv = [sys.executable, "-c", PROGRAM, request.param, "--config", config, "--listen", "127.0.0.1:0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "PYTHONPATH": "."})  # fmt: skip
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None, (tmp_path / "log").read_text()
    yield process, found[0]
    process.terminate()
    process.wait(timeout=60)
    process.stdout.close()


@pytest.mark.parametrize("changed", [{"service": "crash-in-load"}, {"service": "new", "host": "crash-in-apply"}])
async def test_a_reload_that_crashes(
    program: tuple[subprocess.Popen[str], str], tmp_path: Path, changed: dict[str, str]
) -> None:
    process, url = program
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(verify=NO_TLS, base_url=url, headers=headers, trust_env=False, timeout=60) as client:

        async def metric(name: str) -> float:
            page = (await client.get("/metrics")).text
            return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))

        async def loaded() -> bool:
            return await metric("defib_config_last_reload_successful") == 1

        await eventually(loaded)
        write(tmp_path / "config", a=yaml.safe_dump(configuration(tmp_path, **changed)))
        answer = await client.post("/-/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert await metric("defib_config_last_reload_successful") == 0
        process.send_signal(signal.SIGHUP)

        async def logged_twice() -> bool:
            return (tmp_path / "log").read_text().count('"event": "configuration_reload_failed"') == 2

        await eventually(logged_twice)
        assert "RuntimeError: a bug" in (tmp_path / "log").read_text()
        if "exporter" in process.args:  # type: ignore[operator]  # a list, as it was given
            probes = await metric('service_probe_failures_total{service="web"')

            async def still_probed() -> bool:
                return await metric('service_probe_failures_total{service="web"') > probes

            await eventually(still_probed)
            listed = (await client.get("/api/v1/services")).json()["services"]
            assert [service["id"] for service in listed] == ["web"]
        else:
            assert (await client.get("/api/v1/services/web/explain")).status_code == 200
        write(tmp_path / "config", a=yaml.safe_dump(configuration(tmp_path, service="new")))
        assert (await client.post("/-/reload")).json() == {"services": 1}
        assert await metric("defib_config_last_reload_successful") == 1
