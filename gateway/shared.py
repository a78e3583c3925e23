"""What several gateways together send with one key, counted in Redis.

A script of Redis decides whether one more request fits into the window, by Redis' own clock: the requests of all
gateways are members of a sorted set, by the time when they were sent. A request is added before it is sent, and counts
as if it were sent at the end of `RESERVED`, until its gateway says when that was.

While Redis is away, each gateway keeps to its own part of the rate. It begins to use that when the window has passed
since it last reached Redis: what the others have sent until then is not known. When Redis is back, it waits until the
others have told what they have sent, too.
"""

import asyncio
import functools
import itertools
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from fleet.inventory.gateway import SharedSettings
from gateway.shared_scripts import SCRIPTS
from gateway.window import MARGIN, SPAN

LENGTH = int(1000 * (SPAN + MARGIN))  # milliseconds
RESERVED = 60_000  # milliseconds
CREDIT_KEPT = 10.0  # seconds for which a permission may stay unused
TIMEOUT = 1.0  # seconds for an answer
CHECK_EVERY = 1.0
OTHERS_RETURN = 5.0  # seconds in which other gateways notice that Redis is back, and tell it what they have sent
ASK_AGAIN = 1.0  # at the latest: others may have returned what they had reserved
_LARGEST = 2**53
KEPT_IN_REDIS = 600_000  # milliseconds
# What redis-py raises for answers that are no Redis server's, beside RedisError.
_UNEXPECTED = (ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError)
log = structlog.get_logger()


class _LostError(Exception):
    """Redis has lost what it knew of an upstream, or something else answers at its address."""


def _raise_if_cancelled() -> None:
    """Raise CancelledError if this task was cancelled: `wait_for` of Python 3.11, in redis-py, may drop that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@dataclass(frozen=True)
class Demand:
    """A request that is to be sent, and what the upstream allows in a window."""

    tokens: float
    requests_limit: float
    tokens_limit: float | None


class Credit:
    """A request that this gateway may send, or has sent, in a window of all gateways."""

    def __init__(self, window: "SharedWindow", member: str, tokens: float, now: float) -> None:
        self._window, self.member, self.tokens, self.taken_at = window, member, tokens, now
        self.sent_at: float | None = None

    def mark_sent(self, now: float) -> None:
        self.sent_at = now
        self._window.tell(self._window.mark, self)

    def cancel(self) -> None:
        """Return what was not sent."""
        self._window.forget(self)

    def correct(self, tokens: float) -> None:
        self.tokens = tokens
        self._window.tell(self._window.correct, self)


class SharedWindow:
    """What all gateways send to one upstream. `wake` is called when that may allow a request."""

    def __init__(self, limits: "SharedLimits", key: bytes, wake: Callable[[], None]) -> None:
        self._limits, self.wake = limits, wake
        name = f"defib:gateway:{{{key.hex()}}}"  # all keys of an upstream are in one slot of a cluster
        self._keys = [f"{name}:{part}" for part in ("sent", "amounts", "state")]
        self._credits: dict[str, Credit] = {}  # of requests that were sent in the window, or will be
        self._held: Credit | None = None
        self._asked: Credit | None = None  # for which Redis is being asked
        self._unneeded: dict[str, Credit] = {}  # that Redis has granted, or may have, until it knows that
        self._not_before = float("-inf")

    def reduce(self, limit: float) -> float:
        """Return what this gateway may send of a limit."""
        return limit if self._limits.is_available else max(1.0, limit // self._limits.settings.gateways)

    def next_time(self, demand: Demand, now: float) -> float:
        """Return from when on a request may be sent; infinity until the answer of Redis wakes those who wait."""
        if not self._limits.is_available:
            return max(now, self._limits.alone_from)
        held = self._held
        if held is not None:
            fits = demand.tokens_limit is None or demand.tokens <= held.tokens
            if fits and now < held.taken_at + CREDIT_KEPT:
                return now
            self.release()
        if now < self._not_before:
            return self._not_before
        if self._asked is None:
            self._asked = self._create_credit(demand.tokens)
            self._limits.enqueue(functools.partial(self._ask, self._asked, demand))
        return float("inf")

    async def _ask(self, credit: Credit, demand: Demand) -> None:
        most = -1.0 if demand.tokens_limit is None else demand.tokens_limit
        limits = demand.requests_limit, most
        wait = await self._call("take", credit.member, credit.tokens, *limits, self._limits.length, RESERVED)
        self._asked = None
        if wait < 0:
            raise _LostError
        if wait == 0:
            self._held = self._credits[credit.member] = credit
        else:
            self._not_before = self._limits.now() + min(wait / 1000, ASK_AGAIN)
        self.wake()

    def _create_credit(self, tokens: float) -> Credit:
        return Credit(self, self._limits.create_member(), tokens, self._limits.now())

    def take(self, tokens: float) -> Credit:
        """Return the credit of a request that is granted now, also if Redis was not asked about it."""
        credit, self._held = self._held, None
        self._forget_old()
        if credit is None:
            credit = self._create_credit(tokens)
            self._credits[credit.member] = credit
            self.tell(self.add, credit)
        return credit

    def _forget_old(self) -> None:
        oldest = self._limits.now() - self._limits.length / 1000
        while self._credits:
            first = next(iter(self._credits.values()))
            if first.sent_at is None or first.sent_at > oldest:
                break
            del self._credits[first.member]
        while self._unneeded:  # those that Redis does not count any more by now
            first = next(iter(self._unneeded.values()))
            if first.taken_at > oldest - RESERVED / 1000:
                break
            del self._unneeded[first.member]

    def release(self) -> None:
        """Return a credit that nobody needs now."""
        if self._held is not None:
            self.forget(self._held)
            self._held = None

    def forget(self, credit: Credit) -> None:
        """Return a credit, or do that when Redis is back."""
        self._credits.pop(credit.member, None)
        self._unneeded[credit.member] = credit
        self.tell(self.cancel, credit)

    def tell(self, change: Callable[[Credit], Awaitable[None]], credit: Credit) -> None:
        """Tell Redis of a change, unless it is away: it is told everything when it returns."""
        if self._limits.is_connected:
            self._limits.enqueue(functools.partial(change, credit))

    async def add(self, credit: Credit) -> None:
        await self._call("add", credit.member, RESERVED, credit.tokens)

    async def mark(self, credit: Credit) -> None:
        await self._call("mark", credit.member, self._age(credit))

    async def cancel(self, credit: Credit) -> None:
        await self._call("cancel", credit.member)
        self._unneeded.pop(credit.member, None)

    async def correct(self, credit: Credit) -> None:
        await self._call("correct", credit.member, credit.tokens)

    async def join(self) -> None:
        """Tell Redis what this gateway has sent in the window, and what it is sending."""
        self._forget_old()
        for each in list(self._unneeded.values()):
            await self.cancel(each)
        told = [part for each in self._credits.values() for part in (each.member, self._age(each), each.tokens)]
        settings, name = self._limits.settings, self._limits.name
        await self._call("join", name, settings.gateways, self._limits.length, RESERVED, *told)

    async def keep(self) -> None:
        """Keep what Redis knows from expiring."""
        if not await self._call("keep", KEPT_IN_REDIS):
            raise _LostError

    def lose(self) -> None:
        """Note that Redis is away."""
        for credit in (self._held, self._asked):
            if credit is not None:
                self.forget(credit)
        self._held, self._asked, self._not_before = None, None, float("-inf")
        self.wake()

    def close(self) -> None:
        """Forget an upstream that is not configured any more."""
        self._limits.remove_window(self)

    def _age(self, credit: Credit) -> int:
        """Return for how many milliseconds a request is sent, -1 if it is not."""
        return -1 if credit.sent_at is None else max(0, int(1000 * (self._limits.now() - credit.sent_at)))

    async def _call(self, script: str, *arguments: str | float) -> int:
        return await self._limits.call(script, self._keys, arguments)


class SharedLimits:
    """The connection with Redis. `name` tells this gateway from the others; `length` is the window in milliseconds."""

    def __init__(self, settings: SharedSettings, name: str, now: Callable[[], float], length: int = LENGTH) -> None:
        self.settings, self.name, self.now, self.length = settings, name, now, length
        self.is_connected = self.is_available = False  # while it is connected only, Redis is told, but not asked
        self._seen_at = now()
        self._process, self._numbers = secrets.token_hex(4), itertools.count()
        self._windows: list[SharedWindow] = []
        self._changes: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._is_failing = False
        password = settings.password.get_secret_value() if settings.password is not None else None
        self._redis = Redis.from_url(
            settings.redis, username=settings.username, password=password, single_connection_client=True,
            socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0),
            driver_info=None,  # its version would be read from files at each connection
        )  # fmt: skip
        self._scripts = {name: self._redis.register_script(text) for name, text in SCRIPTS.items()}

    @property
    def alone_from(self) -> float:
        """The time from which on this gateway uses its own part of the rate, as long as Redis is away."""
        return self._seen_at + self.length / 1000

    def create_window(self, key: bytes, wake: Callable[[], None]) -> SharedWindow:
        """Return the window of an upstream."""
        window = SharedWindow(self, key, wake)
        self._windows.append(window)
        self.enqueue(window.join)
        return window

    def remove_window(self, window: SharedWindow) -> None:
        if window in self._windows:
            self._windows.remove(window)

    def create_member(self) -> str:
        """Return a name for a request that no gateway has used."""
        return f"{self._process}:{next(self._numbers)}"

    def enqueue(self, change: Callable[[], Awaitable[None]]) -> None:
        self._changes.put_nowait(change)

    async def call(self, script: str, keys: list[str], arguments: tuple[str | float, ...]) -> int:
        """Run a script of Redis. Raises RedisError, _LostError, OSError and TimeoutError."""
        try:
            found = int(await self._scripts[script](keys=keys, args=list(arguments)) or 0)
        except _UNEXPECTED as error:
            raise _LostError("Redis has not answered with a number") from error
        finally:
            _raise_if_cancelled()
        if abs(found) > _LARGEST:
            raise _LostError("Redis has answered with a number that no script returns")
        self._seen_at = self.now()
        return found

    async def run(self) -> None:
        """Use Redis, and connect with it again when it was away, until cancelled."""
        try:
            while True:
                try:
                    await self._serve()
                except (RedisError, _LostError, OSError, TimeoutError) as error:
                    self._lose(error)
                await asyncio.sleep(CHECK_EVERY)
        finally:
            await self._redis.aclose()

    async def _serve(self) -> None:
        self._changes, self.is_connected = asyncio.Queue(), True
        for window in list(self._windows):
            await window.join()
        checked_at = self.now()
        available_at = checked_at + (OTHERS_RETURN if self._is_failing else 0.0)
        while True:
            if not self.is_available and self.now() >= available_at:
                self._begin_asking()
            if (change := await self._next_change()) is not None:
                await change()
            if self.now() >= checked_at + CHECK_EVERY:
                checked_at = self.now()
                for window in list(self._windows):
                    await window.keep()

    def _begin_asking(self) -> None:
        self.is_available, self._is_failing = True, False
        log.info("shared_limits_available")
        for window in list(self._windows):
            window.wake()

    async def _next_change(self) -> Callable[[], Awaitable[None]] | None:
        try:
            async with asyncio.timeout(CHECK_EVERY):
                return await self._changes.get()
        except TimeoutError:
            return None

    def _lose(self, error: Exception) -> None:
        if not self._is_failing:
            effect = f"this gateway waits for up to {self.length // 1000} s, then uses its part of the rates"
            log.error("shared_limits_lost", error=f"{type(error).__name__}: {error}", effect=effect)
        self.is_connected = self.is_available = False
        self._is_failing = True
        for window in list(self._windows):
            window.lose()
