"""Several gateways on one key count together in a real Redis server."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import RedisError
from structlog.testing import capture_logs

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.inventory.gateway import SharedSettings
from gateway.ledger import key_of
from gateway.shared import Credit, Demand, SharedLimits, SharedWindow
from runtime.tasks import cancel_and_wait
from tests.integration.model_api import ADMIN, Gateway, ModelApi
from tests.support import eventually

LENGTH = 1500  # milliseconds of a window
KEY = key_of("http://api/v1", "key")
PASSWORD = "a-password-of-redis"


class RedisServer:
    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher, self._folder = launcher, folder
        (self.port,) = reserve_ports(1)
        self.pid = 0

    @property
    def settings(self) -> SharedSettings:
        return SharedSettings(redis=f"redis://127.0.0.1:{self.port}/0", password=SecretStr(PASSWORD), gateways=2)

    async def start(self) -> None:
        config = self._folder / "redis.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsave ''\nappendonly no\ndir {self._folder}\nrequirepass {PASSWORD}\n"
        )
        self.pid = await self._launcher.start(["redis-server", str(config)], self._folder / "redis.log")
        async with Redis(port=self.port, password=PASSWORD) as client:

            async def answers() -> bool:
                try:
                    return bool(await client.ping())
                except (OSError, RedisError):
                    return False

            await eventually(answers)

    async def stop(self) -> None:
        await self._launcher.kill(self.pid, signal.SIGKILL)

    async def flush(self) -> None:
        async with Redis(port=self.port, password=PASSWORD) as client:
            await client.flushall()


class Sender:
    """A gateway's part in this: it sends as often as it may."""

    def __init__(self, limits: SharedLimits) -> None:
        self.limits = limits
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.window: SharedWindow = limits.create_window(KEY, self._changed.set)

    async def acquire(self, demand: Demand) -> Credit:
        while (at := self.window.next_time(demand, time.monotonic())) > time.monotonic():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(10.0, max(0.0, at - time.monotonic())))
            except TimeoutError:
                continue
        return self.window.take(demand.tokens)

    async def send(self, demand: Demand, sent: list[float]) -> None:
        credit = await self.acquire(demand)
        sent.append(time.monotonic())
        credit.mark_sent(sent[-1])

    async def send_always(self, demand: Demand, sent: list[float]) -> None:
        while True:
            await self.send(demand, sent)

    async def is_available(self) -> bool:
        if self.task is not None and self.task.done():
            self.task.result()
        return self.limits.is_available

    async def is_lost(self) -> bool:
        return not self.limits.is_available


@pytest.fixture
async def server(launcher: Launcher, tmp_path: Path) -> RedisServer:
    made = RedisServer(launcher, tmp_path)
    await made.start()
    return made


@asynccontextmanager
async def sender(server: RedisServer, name: str) -> AsyncIterator[Sender]:
    made = Sender(SharedLimits(server.settings, name, time.monotonic, LENGTH))
    made.task = asyncio.create_task(made.limits.run())
    try:
        await eventually(made.is_available)
        yield made
    finally:
        await cancel_and_wait([made.task])


@pytest.fixture
async def senders(server: RedisServer) -> AsyncIterator[tuple[Sender, Sender]]:
    async with sender(server, "a") as one, sender(server, "b") as two:
        yield one, two


def most_in_a_window(sent: list[float], length: float) -> int:
    ordered = sorted(sent)
    return max(sum(at <= each < at + length for each in ordered) for at in ordered)


async def run_for(seconds: float, *works: "asyncio.Future[None] | asyncio.Task[None]") -> None:
    await asyncio.sleep(seconds)
    for work in works:
        work.cancel()
    await asyncio.gather(*works, return_exceptions=True)


async def test_two_gateways_together_keep_the_limit_and_use_it(senders: tuple[Sender, Sender]) -> None:
    sent: tuple[list[float], list[float]] = ([], [])
    demand = Demand(1.0, 10, None)
    works = [asyncio.create_task(each.send_always(demand, times)) for each, times in zip(senders, sent, strict=True)]
    await run_for(7.6, *works)
    together = [*sent[0], *sent[1]]
    assert most_in_a_window(together, LENGTH / 1000 - 0.1) <= 10  # of the times at which they were noted here
    assert len(together) >= 40
    assert min(map(len, sent)) > 0


async def test_tokens(senders: tuple[Sender, Sender]) -> None:
    one, two = senders
    sent: list[float] = []
    for each in (one, two):
        await asyncio.wait_for(each.send(Demand(300.0, 100, 1000.0), sent), 5)
    credit = await asyncio.wait_for(one.acquire(Demand(300.0, 100, 1000.0)), 5)
    credit.mark_sent(time.monotonic())
    credit.correct(100.0)  # 700 are used
    await asyncio.wait_for(two.send(Demand(300.0, 100, 1000.0), sent), 5)
    assert sent[2] - sent[0] < LENGTH / 1000
    await asyncio.wait_for(two.send(Demand(5000.0, 100, 1000.0), sent), 20)  # more than ever fits: alone
    assert sent[3] - sent[2] > LENGTH / 1000 - 0.1


async def test_what_is_not_sent_is_returned(senders: tuple[Sender, Sender]) -> None:
    one, two = senders
    demand = Demand(1.0, 2, None)
    first, second = await one.acquire(demand), await one.acquire(demand)
    waiting = asyncio.create_task(two.acquire(demand))
    await asyncio.sleep(LENGTH / 1000 + 0.5)
    assert not waiting.done()  # what is reserved counts as if it were sent later
    second.cancel()
    await asyncio.wait_for(waiting, 5)
    first.mark_sent(time.monotonic())
    held = asyncio.create_task(one.acquire(demand))  # when that was sent long ago, it is granted
    await asyncio.wait_for(held, 10)


async def test_a_credit_that_nobody_needs_is_returned(senders: tuple[Sender, Sender]) -> None:
    one, two = senders
    demand = Demand(1.0, 1, None)
    await eventually(lambda: _is_held(one, demand))
    one.window.release()
    await asyncio.wait_for(two.acquire(demand), 5)


async def _is_held(sender: Sender, demand: Demand) -> bool:
    now = time.monotonic()
    return sender.window.next_time(demand, now) <= now


async def test_without_redis_each_uses_its_part_later(server: RedisServer, senders: tuple[Sender, Sender]) -> None:
    one, two = senders
    one.limits.length = two.limits.length = 8000
    with capture_logs() as logs:
        await server.stop()
        for each in senders:
            await eventually(each.is_lost)
    assert [line["event"] for line in logs].count("shared_limits_lost") == 2
    assert PASSWORD not in str(logs)
    now = time.monotonic()
    assert now < one.window.next_time(Demand(1.0, 10, None), now) <= now + 8
    assert (one.window.reduce(11), one.window.reduce(1)) == (5, 1)
    sent: list[float] = []
    await one.send(Demand(1.0, 5, None), sent)  # its own window, elsewhere, keeps that limit
    await server.start()
    for each in senders:
        await eventually(each.is_available)
    assert two.window.reduce(11) == 11


@pytest.mark.parametrize("is_restarted", [True, False])
async def test_a_server_that_forgets_is_told_what_was_sent(
    server: RedisServer, senders: tuple[Sender, Sender], is_restarted: bool
) -> None:
    one, two = senders
    sent: list[float] = []
    one.limits.length = two.limits.length = 8000
    demand = Demand(1.0, 2, None)
    await asyncio.wait_for(one.send(demand, sent), 5)
    await asyncio.wait_for(two.send(demand, sent), 5)
    if is_restarted:
        await server.stop()
        await eventually(one.is_lost)
        await server.start()
    else:
        await server.flush()
    await asyncio.wait_for(one.send(demand, sent), 60)
    assert sent[2] - sent[0] > 7.9


async def test_it_ends_at_whatever_moment_it_is_cancelled(server: RedisServer) -> None:
    for turns in range(40):
        async with sender(server, "a") as one:
            one.window.take(1.0).mark_sent(time.monotonic())
            for _ in range(turns):
                await asyncio.sleep(0)
            assert one.task is not None
            one.task.cancel()
            ended, _ = await asyncio.wait([one.task], timeout=30)
            assert ended


@contextmanager
def hanging(server: RedisServer) -> Iterator[None]:
    """Stop Redis for a while, as it is when its network fails: it loses nothing, and its answers come too late."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("is_held", [True, False])
async def test_what_was_granted_just_before_a_loss_is_returned(
    server: RedisServer, senders: tuple[Sender, Sender], is_held: bool
) -> None:
    one, two = senders
    demand = Demand(1.0, 1, None)
    (await one.acquire(demand)).cancel()  # Redis knows the scripts from now on
    if is_held:
        await eventually(lambda: _is_held(one, demand))
    with hanging(server):
        await _is_held(one, demand)  # asks, if it holds none
        for each in senders:
            await eventually(each.is_lost)
    for each in senders:
        await eventually(each.is_available)
    await asyncio.wait_for(two.acquire(demand), 30)


async def test_what_is_sent_while_redis_returns_counts(server: RedisServer) -> None:
    async with sender(server, "a") as one:
        one.limits.length = 60_000
        with hanging(server):
            await eventually(one.is_lost)
        sent: list[Credit] = []
        while not one.limits.is_available:  # at each moment of its return
            sent.append(one.window.take(1.0))
            sent[-1].mark_sent(time.monotonic())
            await asyncio.sleep(0.001)
        async with Redis(port=server.port, password=PASSWORD) as client:

            async def are_counted() -> bool:
                keys = await client.keys("*:sent")
                counted = {member for key in keys for member in await client.zrange(key, 0, -1)}
                return {each.member.encode() for each in sent} <= counted

            await eventually(are_counted, 20)


async def test_a_gateway_waits_for_the_return_of_the_others(server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(sender(server, "a"))
        sent: list[float] = []
        async with sender(server, "b") as two:
            one.limits.length = two.limits.length = 12_000
            with hanging(server):
                for each in (one, two):
                    await eventually(each.is_lost)
                for each in (one, two):  # each sends its part
                    for _ in range(5):
                        sent.append(time.monotonic())
                        each.window.take(1.0).mark_sent(sent[-1])
        sending = asyncio.create_task(one.send(Demand(1.0, 10, None), sent))
        await asyncio.sleep(2.5)  # the other one notices it later
        returned = asyncio.create_task(two.limits.run())
        await asyncio.wait_for(sending, 60)
        await cancel_and_wait([returned])
    assert sent[10] - sent[0] > 11.9


async def test_nothing_is_sent_before_all_have_joined(server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(sender(server, "a"))
        sent: list[float] = []
        began = time.monotonic()
        first = asyncio.create_task(one.send(Demand(1.0, 5, None), sent))
        await stack.enter_async_context(sender(server, "b"))
        await asyncio.wait_for(first, 10)
        assert sent[0] - began < 10


async def test_gateways(launcher: Launcher, tmp_path: Path, api: ModelApi, server: RedisServer) -> None:
    """Two processes with one key send no more than its rate, and say whether they count together."""
    async with AsyncExitStack() as stack:
        gateways = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            gateway = Gateway(launcher, tmp_path / name, api)
            stack.push_async_callback(gateway.close)
            shared = {"redis": f"redis://127.0.0.1:{server.port}", "password": PASSWORD, "gateways": 2}
            upstream = gateway.upstream(rate="20/min")
            gateway.configure({"api": upstream}, shared=shared, listen=f"127.0.0.1:{gateway.port}")
            await gateway.start()
            gateways.append(gateway)
        asked = [asyncio.create_task(each.chat()) for _ in range(20) for each in gateways]

        async def are_sent() -> bool:
            return len(api.received) >= 20

        await eventually(are_sent, 60)
        await asyncio.sleep(3.0)
        assert len(api.received) == 20
        assert (await gateways[0].metrics())["gateway_shared_limits_available"] == 1
        for task in asked[::2]:  # those of the first one
            task.cancel()

        async def is_queue_empty() -> bool:
            return not sum((await gateways[0].status())["queue"].values())

        await eventually(is_queue_empty)
        refused = await gateways[0].client.put("/api/v1/limits", json={"queue_size": 0}, headers=ADMIN)
        assert refused.json()["error"]["message"] == "queue_size: must be at least 1 with gateway.shared"
        await server.stop()

        async def is_alone() -> bool:
            return (await gateways[1].metrics())["gateway_shared_limits_available"] == 0

        await eventually(is_alone)
        status = (await gateways[1].client.get("/api/v1/status", headers=ADMIN)).json()
        assert status["shared_limits_available"] is False
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert len(api.received) == 20
        await gateways[0].logged("shared_limits_lost")
        log = gateways[0].log.read_text()
        assert PASSWORD not in log
