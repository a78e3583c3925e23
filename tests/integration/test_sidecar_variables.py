"""A gateway that is started as the earlier sidecar was: with variables, and without a configuration."""

import os
import sys
from pathlib import Path

import httpx
import pytest

from defib.demo.stack import reserve_ports
from tests.integration.model_api import KEY, Gateway, ModelApi
from tests.support import NO_TLS, eventually

ADMIN = {"Authorization": "Bearer t-admin-secret"}


class Sidecar(Gateway):
    """A gateway in a folder without a configuration directory, unless a test writes one."""

    variables: dict[str, str] = {}

    async def launch(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR_", "DEFIB_"))}
        root = str(Path(__file__).parents[2])
        self.pid = await self.launcher.start(
            [sys.executable, "-m", "defib", "gateway"],
            self.log,
            {**clean, "PYTHONPATH": root, **self.variables},
            cwd=self.folder,
        )


@pytest.fixture
def sidecar(gateway: Gateway, api: ModelApi) -> Sidecar:
    made = Sidecar(gateway.launcher, gateway.folder, api)
    made.client, made.port = gateway.client, gateway.port
    made.variables = {
        "SIDECAR_PORT": str(made.port),
        "SIDECAR_METRICS_PORT": str(reserve_ports(1)[0]),
        "SIDECAR_UPSTREAM": api.url,
        "SIDECAR_API_KEY": KEY,
        "SIDECAR_ADMIN_TOKEN": "t-admin-secret",
    }
    return made


async def test_it_starts_without_a_configuration(sidecar: Sidecar, api: ModelApi) -> None:
    sidecar.variables["SIDECAR_RATE_RPM"] = "30"
    await sidecar.start()
    assert (await sidecar.chat()).is_success
    assert (await sidecar.chat(path="/tokenize")).is_success
    assert [each.header("Authorization") for each in api.received] == [[f"Bearer {KEY}"]] * 2
    status = await sidecar.client.get("/status", headers=ADMIN)
    assert status.json()["upstreams"]["upstream"]["base_rate_per_minute"] == 30
    assert (await sidecar.client.get("/status")).status_code == 401
    metrics_url = f"http://127.0.0.1:{sidecar.variables['SIDECAR_METRICS_PORT']}/metrics"
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as scraper:
        assert 'gateway_base_rate_per_minute{provider="upstream"} 30.0' in (await scraper.get(metrics_url)).text
    reload = await sidecar.client.post("/-/reload", headers=ADMIN)
    assert reload.json() == {"upstreams": 1}
    text = sidecar.log.read_text()
    assert "secret" not in text
    assert KEY not in text


async def test_the_level_of_its_log(sidecar: Sidecar) -> None:
    sidecar.variables["SIDECAR_LOG_LEVEL"] = "ERROR"
    await sidecar.start()
    assert (await sidecar.chat()).is_success
    assert sidecar.find_logged("request") == []
    assert sidecar.find_logged("server_started") == []


async def test_a_misspelled_variable_is_named(sidecar: Sidecar) -> None:
    sidecar.variables["SIDECAR_RATE_LIMIT"] = "3"
    await sidecar.start()
    (entry,) = await sidecar.logged("variables_unknown")
    assert entry["variables"] == ["SIDECAR_RATE_LIMIT"]


async def test_the_configuration_is_in_force_alone_and_names_what_is_ignored(sidecar: Sidecar, api: ModelApi) -> None:
    sidecar.configure(listen=f"127.0.0.1:{sidecar.port}")
    sidecar.variables |= {"SIDECAR_API_KEY": "nvapi-other", "SIDECAR_TIMEOUT": "wrong", "SIDECAR_PORT": "1"}
    await sidecar.start()
    assert (await sidecar.chat()).is_success
    assert api.received[0].header("Authorization") == [f"Bearer {KEY}"]
    (entry,) = await sidecar.logged("variables_ignored")
    assert set(entry["variables"]) == sidecar.variables.keys()
    assert entry["level"] == "warning"


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("SIDECAR_TIMEOUT", "900", "SIDECAR_TIMEOUT: must be a number of seconds from 0.001 to 300, not '900'"),
        ("SIDECAR_API_KEY", "", "SIDECAR_API_KEY is not set"),
    ],
)
async def test_a_wrong_variable_ends_it(sidecar: Sidecar, variable: str, value: str, problem: str) -> None:
    sidecar.variables[variable] = value
    await sidecar.launch()

    async def is_named() -> bool:
        return f"defib: {problem}" in sidecar.log.read_text()

    await eventually(is_named, 60)
    assert "Traceback" not in sidecar.log.read_text()
