"""The gateway as openai-python uses it, and many agents for a long time before an API that enforces its rate."""

import asyncio
import random
import time
from collections import Counter

import openai
import pytest

from tests.integration.model_api import KEY, NIM_429, Gateway, ModelApi, Received, completion, whole

RATE, SPAN = 40, 600.0  # requests a minute; seconds
SHARES = {f"agent-{number}": 2 if number < 5 else 1 for number in range(15)}
OUTSTANDING = 6  # requests of each agent, so that all of them always wait
EVENT = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n'
JSON = "Content-Type: application/json"


def make_client(gateway: Gateway, token: str = "", retries: int = 0) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    base = f"http://127.0.0.1:{gateway.port}/v1"
    return openai.AsyncOpenAI(
        api_key=token or "any", base_url=base, max_retries=retries, timeout=900.0, http_client=http
    )


async def ask(client: openai.AsyncOpenAI, priority: str = "normal") -> str:
    message: dict[str, str] = {"role": "user", "content": "Hello"}
    answer = await client.chat.completions.create(
        model="m",
        messages=[message],  # type: ignore[list-item]  # as a dict
        extra_headers={"X-Priority": priority},
    )
    return answer.model


async def test_streams(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for number in range(20):
            writer.write(EVENT % number)
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    api.respond = respond
    async with make_client(gateway) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        texts = [chunk.choices[0].delta.content async for chunk in stream]
    assert texts == [str(number) for number in range(20)]
    assert api.received[0].header("Authorization") == [f"Bearer {KEY}"]


async def test_retries_wait_as_long_as_the_gateway_says(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="20/s", concurrency=1)}, queue={"size": 1})
    await gateway.start()
    began = asyncio.Event()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        began.set()
        await asyncio.sleep(0.5)
        await whole(completion(), "200 OK", JSON)(request, writer)

    api.respond = respond
    async with make_client(gateway, retries=10) as client:
        assert await asyncio.gather(*(ask(client) for _ in range(4))) == ["m"] * 4
    refused = (await gateway.metrics())['gateway_requests_refused_total{client="anonymous",code="queue_full"}']
    assert refused >= 1
    assert len(api.received) == 4


async def test_errors_are_those_of_openai(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(clients={"a": {"token": "token-of-a"}})
    await gateway.start()
    async with make_client(gateway, "wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await ask(client)
    api.respond = whole(NIM_429, "429 Too Many Requests")
    async with make_client(gateway, "token-of-a") as client:
        with pytest.raises(openai.RateLimitError):
            await ask(client)
        api.respond = whole(
            b'{"data": [{"id": "m", "object": "model", "created": 1, "owned_by": "o"}]}', "200 OK", JSON
        )
        assert [model.id async for model in client.models.list()] == ["m"]


@pytest.mark.long
@pytest.mark.timeout(2400)
async def test_fifteen_agents_for_ten_minutes(gateway: Gateway, api: ModelApi) -> None:
    """The API never answers 429, urgent requests come first, and all agents get their shares of the whole rate."""
    clients = {name: {"token": f"token-of-{name}", "share": share} for name, share in SHARES.items()}
    upstream = gateway.upstream(rate=f"{RATE}/min")
    gateway.configure({"api": upstream}, clients=clients, queue={"max_wait": "20m"})
    await gateway.start()
    api.rate = RATE

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(random.uniform(0.2, 2.0))
        await whole(completion(), "200 OK", JSON)(request, writer)

    api.respond = respond
    served: Counter[str] = Counter()
    waits: dict[str, list[float]] = {"normal": [], "urgent": []}
    began = time.monotonic()
    end = began + SPAN

    async def work(name: str, priority: str, pause: float) -> None:
        async with make_client(gateway, f"token-of-{name}") as client:
            while time.monotonic() < end:
                asked = time.monotonic()
                await ask(client, priority)
                if time.monotonic() < end:
                    waits[priority].append(time.monotonic() - asked)
                    # Nobody waits at the beginning: the first minute's requests are not shared.
                    served[name] += priority == "normal" and time.monotonic() > began + 30
                await asyncio.sleep(pause)

    async with asyncio.TaskGroup() as group:
        for name in SHARES:
            for _ in range(OUTSTANDING):
                group.create_task(work(name, "normal", 0.0))
        group.create_task(work("agent-14", "urgent", 20.0))
    assert api.refused == 0
    arrivals = sorted(each.at for each in api.received)
    assert all(later - earlier > 60 for earlier, later in zip(arrivals, arrivals[RATE:], strict=False))
    windows = int(SPAN // 61)
    used = windows * 60 / (arrivals[windows * RATE] - arrivals[0])
    print(f"used {used:.2%} of the rate; served {dict(served)}; urgent waited {max(waits['urgent']):.1f} s at most")  # noqa: T201 - the figures of a long run
    assert used >= 0.98
    each = sum(served.values()) / sum(SHARES.values())
    for name, share in SHARES.items():
        assert abs(served[name] - share * each) <= max(1.0, 0.05 * share * each), served
    assert max(waits["urgent"]) < 70 < sorted(waits["normal"])[len(waits["normal"]) // 2]
