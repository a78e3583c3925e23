import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.probes import peer_work
from exporter.probes.peer_work import run_in_thread
from tests.support import eventually


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_work, "_THREADS", ThreadPoolExecutor(2))


class Work:
    def __init__(self) -> None:
        self.begun = 0
        self.go_on = threading.Event()

    def __call__(self) -> str:
        self.begun += 1
        assert self.go_on.wait(60)
        return "done"

    async def has_begun(self) -> bool:
        return self.begun > 0


async def test_a_slow_peer_keeps_no_other_waiting() -> None:
    slow = Work()
    tasks = [asyncio.create_task(run_in_thread("slow", slow)) for _ in range(10)]
    await eventually(slow.has_begun, 30)
    assert await asyncio.wait_for(run_in_thread("other", lambda: "quick"), 30) == "quick"
    assert slow.begun == 1
    slow.go_on.set()
    assert await asyncio.gather(*tasks) == ["done"] * 10


async def test_work_that_cannot_be_interrupted_keeps_the_turn_of_its_peer() -> None:
    slow, waiting = Work(), Work()
    waiting.go_on.set()
    first = asyncio.create_task(run_in_thread("slow", slow))
    await eventually(slow.has_begun, 30)
    first.cancel()
    second = asyncio.create_task(run_in_thread("slow", waiting))
    third = asyncio.create_task(run_in_thread("slow", waiting))
    await asyncio.wait([first])
    assert await asyncio.wait_for(run_in_thread("other", lambda: "quick"), 30) == "quick"
    assert waiting.begun == 0
    second.cancel()
    slow.go_on.set()
    assert await asyncio.wait_for(third, 30) == "done"
    assert (second.cancelled(), waiting.begun) == (True, 1)


async def test_errors_of_the_work_end_the_turn() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            await asyncio.wait_for(run_in_thread("one", fail), 30)
