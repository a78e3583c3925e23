"""What `defib doctor` says of a gateway."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from defib.doctor.monitoring import check_prometheus
from tests.forked_defib import run_defib
from tests.integration.model_api import Gateway, ModelApi
from tests.integration.peers import web_server
from tests.support import inventory_of

CLIENTS = {"coder": {"token": "a-long-token-for-the-coder"}}


async def examine(gateway: Gateway) -> dict[str, dict[str, str]]:
    argv = ("doctor", "--json", "--for", "gateway", "--config", str(gateway.folder / "config"))
    done = await asyncio.to_thread(run_defib, *argv)
    assert "Traceback" not in done.stderr, done.stderr
    return {each["check"]: each for each in json.loads(done.stdout)["findings"] if each["subject"] == "gateway"}


def configure(gateway: Gateway, **more: Any) -> None:
    gateway.configure(**{"url": f"http://127.0.0.1:{gateway.port}", "clients": CLIENTS, **more})


async def test_one_that_works(gateway: Gateway) -> None:
    configure(gateway)
    await gateway.start()
    found = await examine(gateway)
    assert {check for check, each in found.items() if each["result"] != "pass"} <= {"metrics"}, found
    assert {"state_file", "clients", "ready", "local token", "configuration", "upstreams"} <= found.keys()


async def test_one_that_is_not_configured_is_not_checked(gateway: Gateway) -> None:
    (gateway.folder / "config").mkdir()
    (gateway.folder / "config" / "a.yaml").write_text("gateway: {token: a-token}")
    assert await examine(gateway) == {}


async def test_one_that_does_not_run(gateway: Gateway) -> None:
    configure(gateway)
    found = await examine(gateway)
    assert found["reachable"]["result"] == "fail"
    assert found["state_file"]["result"] == "pass"
    configure(gateway, state_file="../none/state")
    missing = (await examine(gateway))["state_file"]
    assert missing["detail"].endswith("/none: the gateway cannot start here"), missing


async def test_what_is_wrong_is_named(gateway: Gateway, api: ModelApi) -> None:
    away = gateway.upstream(url="http://127.0.0.1:1/v1")
    configure(gateway, upstreams={"api": away})
    await gateway.start()
    for _ in range(5):
        await gateway.chat(Authorization=f"Bearer {CLIENTS['coder']['token']}")
    short = {"coder": {"token": "short"}, "tester": {"token": "a-long-token-for-the-tester"}}
    configure(gateway, upstreams={"api": away, "other": gateway.upstream()}, clients=short, state_file=None)
    found = await examine(gateway)
    wrong = {check: each["detail"] for check, each in found.items() if each["result"] != "pass"}
    assert wrong["state_file"] == "it is not set: a restart may exceed the rate for a minute"
    assert wrong["clients"] == "the tokens of coder have less than 16 characters"
    assert wrong["ready"] == "all upstreams fail"
    assert wrong["configuration"] == "it has other upstreams: other"
    assert wrong["upstreams"] == "no answers from api"


async def test_everybody_may_use_the_key(gateway: Gateway) -> None:
    configure(gateway, listen="0.0.0.0:9190", clients={})
    assert (await examine(gateway))["clients"]["detail"] == "there are none: whoever reaches its port uses the keys"


@pytest.mark.parametrize("is_configured", [True, False])
async def test_prometheus_scrapes_it(gateway: Gateway, *, is_configured: bool) -> None:
    nothing = {"activeTargets": [], "yaml": "{}", "groups": [], "activeAlertmanagers": []}

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"data": [] if request.path.endswith("/labels") else nothing})

    async with web_server(answer) as port:
        written: dict[str, Any] = {"remediator": {"prometheus_url": f"http://127.0.0.1:{port}"}}
        if is_configured:
            written["gateway"] = {"default": "own", "upstreams": {"own": {"url": "http://127.0.0.1:1/v1"}}}
        made = await asyncio.to_thread(inventory_of, gateway.folder, written)
        found = {each.check: each for each in await check_prometheus(made.inventory)}
    assert ("scrapes defib-gateway" in found) is is_configured
    if is_configured:
        assert (found["scrapes defib-gateway"].result, found["scrapes defib-gateway"].detail) == (
            "fail",
            "it has no target",
        )
