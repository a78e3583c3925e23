"""Work on what a peer has sent, such as decoding a body: in threads, and for each peer one piece at a time.

A piece cannot be interrupted. A peer whose responses take long to work on must not keep the work for others waiting,
nor may its responses fill the memory.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="peer work")
_TURNS: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock] = WeakValueDictionary()

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_thread(peer: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread, after other work on what this peer has sent.

    The threads are for nothing else. Work cannot be cancelled once it runs, so it must be bounded; work that still
    waits is cancelled with the probe.
    """
    loop = asyncio.get_running_loop()
    turn = _TURNS.setdefault((loop, peer), asyncio.Lock())
    await turn.acquire()
    job = _THREADS.submit(partial(work, *args, **kwargs))

    def end_turn(_job: object) -> None:  # also if the probe has ended before
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(turn.release)

    job.add_done_callback(end_turn)
    return await asyncio.wrap_future(job)
