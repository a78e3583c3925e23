"""What reloads, restarts, kills and stops of the gateway do to its requests and to what it has learned."""

import asyncio
import os
import signal
from collections import Counter

import httpx
import pytest

from gateway.handling import SHORT_WAIT
from tests.integration.model_api import (
    ADMIN,
    EVENT_STREAM,
    KEY,
    NIM_429,
    Gateway,
    ModelApi,
    Received,
    chunk,
    completion,
    endless,
    whole,
)
from tests.support import eventually

FIRST, LAST = b"data: {}\n\n", b"data: [DONE]\n\n"


async def test_a_reload_breaks_no_stream_and_keeps_what_was_sent(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="2/min")}, queue={"low_timeout": "300ms"})
    await gateway.start()
    api.respond = endless
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
        parts = response.aiter_raw()
        await anext(parts)
        gateway.configure(
            {"renamed": gateway.upstream(rate="2/min")}, default="renamed", queue={"low_timeout": "300ms"}
        )
        assert (await gateway.client.post("/-/reload", headers=ADMIN)).json() == {"upstreams": 1}
        for _ in range(5):
            await anext(parts)
        api.respond = whole(completion())
        assert (await gateway.status("renamed"))["in_flight"] == 1
        assert (await gateway.chat(X_Priority="low")).is_success
        assert (await gateway.chat(X_Priority="low")).status_code == 429
        gateway.configure({"renamed": {"url": "nothing"}})
        os.kill(gateway.pid, signal.SIGHUP)

        async def is_refused() -> bool:
            return bool(gateway.find_logged("configuration_reload_refused"))

        await eventually(is_refused, 20)
        await anext(parts)
    assert len(api.received) == 2


async def test_an_upstream_that_a_reload_removes_and_brings_back_keeps_its_rate(
    gateway: Gateway, api: ModelApi
) -> None:
    queue = {"low_timeout": "300ms"}
    gateway.configure({"api": gateway.upstream(rate="2/min")}, queue=queue)
    await gateway.start()
    for _ in range(2):
        assert (await gateway.chat(X_Priority="low")).is_success
    for key in ("nvapi-a-wrong-key", KEY):
        gateway.configure({"api": gateway.upstream(rate="2/min", api_key=key)}, queue=queue)
        assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    assert (await gateway.chat(X_Priority="low")).json()["error"]["code"] == "timeout"
    assert len(api.received) == 2


async def test_a_kill_under_load_does_not_forget_what_was_sent(gateway: Gateway, api: ModelApi) -> None:
    api.rate = 20
    gateway.configure({"api": gateway.upstream(rate="20/min")}, queue={"low_timeout": "300ms"})
    await gateway.start()

    async def request() -> int:
        try:
            return (await gateway.chat(X_Priority="low")).status_code
        except httpx.HTTPError:
            return 0

    load = [asyncio.create_task(request()) for _ in range(12)]
    await asyncio.gather(*load)
    load = [asyncio.create_task(request()) for _ in range(5)]
    while len(api.received) < 14:
        await asyncio.sleep(0)
    os.kill(gateway.pid, signal.SIGKILL)
    await asyncio.gather(*load)
    await gateway.start()
    status = await gateway.status()
    assert status["sent_last_minute"] == {"anonymous": status["requests_in_window"]}
    await asyncio.gather(*(request() for _ in range(30)))
    assert len(api.received) <= 20
    assert api.refused == 0


async def test_a_learned_rate_survives_a_restart(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(NIM_429, "429 Too Many Requests")
    await gateway.chat()
    (cut,) = await gateway.logged("rate_cut")
    assert (cut["upstream"], cut["rate_per_minute"], cut["state"]) == ("api", 750, "retreating")
    assert (await gateway.metrics())['gateway_retreat_state{provider="api",state="retreating"}'] == 1
    await gateway.launcher.kill(gateway.pid, signal.SIGTERM)
    await gateway.start()
    status = await gateway.status()
    assert (status["rate_per_minute"], status["base_rate_per_minute"], status["retreat"]) == (750, 1000, "recovering")
    (gateway.folder / "state").write_text("not JSON")
    os.kill(gateway.pid, signal.SIGKILL)
    await gateway.start()
    assert (await gateway.status())["rate_per_minute"] == 1000
    assert await gateway.logged("state_unreadable")


async def test_a_stop_waits_for_streams(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    stopping = asyncio.Event()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(FIRST))
        await stopping.wait()
        writer.write(chunk(LAST) + b"0\r\n\r\n")

    api.respond = respond
    got = b""
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
        async for part in response.aiter_raw():
            got += part
            if not stopping.is_set():
                os.kill(gateway.pid, signal.SIGTERM)

                async def is_stopping() -> bool:
                    return bool(gateway.find_logged("server_stopping"))

                await eventually(is_stopping, 20)
                stopping.set()
    assert got == FIRST + LAST

    async def has_stopped() -> bool:
        return bool(gateway.find_logged("server_stopped"))

    await eventually(has_stopped, 20)


async def suspend_all_but_one(
    gateway: Gateway, api: ModelApi, count: int
) -> tuple[asyncio.Event, list[asyncio.Task[httpx.Response]]]:
    """Send requests to an upstream that takes one at a time, and answers once the event is set."""
    go_on = asyncio.Event()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    api.respond = respond
    requests = [asyncio.create_task(gateway.chat()) for _ in range(count)]

    async def wait() -> bool:
        return int((await gateway.status())["queue"]["normal"]) == count - 1

    await eventually(wait, 20)
    await asyncio.sleep(2 * SHORT_WAIT)  # they are suspended by then
    return go_on, requests


@pytest.mark.parametrize("change", ["name", "key"])
async def test_requests_that_wait_keep_their_upstream_at_a_reload(gateway: Gateway, api: ModelApi, change: str) -> None:
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    await gateway.start()
    go_on, requests = await suspend_all_but_one(gateway, api, 2)
    if change == "name":
        gateway.configure({"other": gateway.upstream(concurrency=1)}, default="other")
    else:
        gateway.configure({"api": gateway.upstream(concurrency=1, api_key="nvapi-another-key")})
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    go_on.set()
    answers = await asyncio.wait_for(asyncio.gather(*requests), 60)
    assert [each.status_code for each in answers] == [200, 200]
    assert sorted(each.headers.get("Connection", "") for each in answers) == ["", "close"]  # of the suspended one
    assert [each.header("Authorization") for each in api.received] == [[f"Bearer {KEY}"]] * 2


async def test_a_reload_says_what_needs_a_restart(gateway: Gateway) -> None:
    gateway.configure()
    await gateway.start()
    gateway.configure(state_file=str(gateway.folder / "other"), metrics_listen="127.0.0.1:1")
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    (warning,) = await gateway.logged("restart_needed")
    assert warning["settings"] == ["gateway.metrics_listen", "gateway.state_file"]


async def test_a_stream_that_a_stop_ends_was_not_left_by_its_client(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = endless

    async def read_to_the_end() -> None:
        async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
            async for part in response.aiter_raw():
                if part and not gateway.find_logged("server_stopping"):
                    os.kill(gateway.pid, signal.SIGTERM)

    with pytest.raises(httpx.RemoteProtocolError):
        await read_to_the_end()
    assert [each["outcome"] for each in await gateway.logged("request")] == ["shutting_down"]


async def test_a_stop_waits_for_requests_that_wait(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    await gateway.start()
    stopping, requests = await suspend_all_but_one(gateway, api, 3)
    os.kill(gateway.pid, signal.SIGTERM)

    async def is_stopping() -> bool:
        return bool(gateway.find_logged("server_stopping"))

    await eventually(is_stopping, 20)
    stopping.set()
    answers = await asyncio.gather(*requests)
    assert [each.status_code for each in answers] == [200] * 3
    assert sorted(each.headers.get("Connection", "") for each in answers) == ["", "close", "close"]
    assert [each["outcome"] for each in await gateway.logged("request", 3)] == ["ok"] * 3


async def test_a_stop_refuses_those_that_wait_too_long(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    await gateway.start()
    go_on, requests = await suspend_all_but_one(gateway, api, 40)
    os.kill(gateway.pid, signal.SIGTERM)
    await asyncio.wait(requests, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    go_on.set()
    answers = await asyncio.wait_for(asyncio.gather(*requests), 60)
    for each in (refused := [each for each in answers if not each.is_success]):
        assert (each.status_code, each.json()["error"]["code"]) == (503, "shutting_down")
        assert each.headers["Retry-After"] == "5"
    assert len(refused) == 39
    outcomes = Counter(each["outcome"] for each in await gateway.logged("request", 40))
    assert outcomes == {"ok": 1, "shutting_down": 39}
