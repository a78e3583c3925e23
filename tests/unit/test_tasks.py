import asyncio

from runtime.tasks import SmallEvent


async def test_an_event_or_a_time_is_waited_for() -> None:
    loop, event = asyncio.get_running_loop(), SmallEvent()
    assert not await event.wait_until(loop.time() - 1)
    assert not await event.wait_until(loop.time() + 0.01)
    loop.call_later(0.01, event.set)
    assert await event.wait_until(loop.time() + 60)
    assert await event.wait_until(loop.time() + 60)  # until it is cleared
    event.clear()
    waiting = asyncio.create_task(event.wait_until(loop.time() + 60))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    event.set()
    assert await event.wait_until(loop.time())
