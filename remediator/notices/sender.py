"""Takes notices from the outbox and sends them, within each bot's limits, until they are sent or dead."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
import structlog

from fleet.model import Channel, Inventory
from remediator.database import Database, StorageError
from remediator.metrics import Metrics
from remediator.notices import CHANNELS, outbox
from remediator.notices.feishu import Answer
from remediator.notices.outbox import Notice, State
from runtime.redaction import Redactor

LOOK_AGAIN = 15.0
FIRST_RETRY = 2.0
LONGEST_RETRY = 300.0
GIVE_UP_AFTER = 24 * 3600.0
RECORD_AGAIN = 5.0
BROKEN_TRIES = 5
log = structlog.get_logger()


class Sender:
    """One task per channel, started when there is something to send and ended when there is not."""

    def __init__(
        self,
        database: Database,
        inventory: Callable[[], Inventory],
        client: httpx.AsyncClient,
        metrics: Metrics,
        redact: Redactor,
        details: Callable[[Notice], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._database, self._inventory, self._client = database, inventory, client
        self._metrics, self._redact, self._details = metrics, redact, details
        self._now = database.clock.now
        self._sending: set[asyncio.Task[None]] = set()
        self._wakes: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """There may be something new to send, or a new channel to send it to."""
        self._changed.set()
        for wake in self._wakes.values():
            wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                await self._bury()
                for name in self._inventory().notify.channels.keys() - self._wakes.keys():
                    self._wakes[name] = asyncio.Event()
                    group.create_task(self._serve(name, self._wakes[name]), name=f"send {name}")
                await self._changed.wait()

    async def _bury(self) -> None:
        try:
            buried = await self._database.run(outbox.bury, list(self._inventory().notify.channels), self._now())
        except StorageError as error:
            log.error("the outbox cannot be used", error=str(error))  # noqa: TRY400 - it is its own explanation
        else:
            if buried:
                log.warning("notices of channels that were removed are given up", notices=buried)

    async def _serve(self, name: str, wake: asyncio.Event) -> None:
        while (channel := self._inventory().notify.channels.get(name)) is not None:
            wake.clear()
            pause = await self._drain(name, channel)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()
        del self._wakes[name]

    async def _drain(self, name: str, channel: Channel) -> float:
        """Send what a channel has; returns the seconds after which to look again."""
        try:
            while not self._stopping:
                ready, later = await self._database.run(outbox.pending, name, self._now())
                for notice in ready:
                    # A send that has begun is ended and kept, also when we are to stop: else it would be sent twice.
                    task = asyncio.create_task(self._try(name, channel, notice))
                    self._sending.add(task)
                    task.add_done_callback(self._sending.discard)
                    await asyncio.shield(task)
                if not ready:
                    return LOOK_AGAIN if later is None else min(max(later - self._now(), 0.05), LOOK_AGAIN)
        except StorageError as error:
            log.error("the outbox cannot be used", error=str(error))  # noqa: TRY400 - it is its own explanation
        return LOOK_AGAIN

    async def drain(self) -> None:
        """Begin no more sends, and wait for those that have begun."""
        self._stopping = True
        if self._sending:
            await asyncio.wait(self._sending)

    async def _try(self, name: str, channel: Channel, notice: Notice) -> None:
        """Send a notice; one that cannot even be made into a message must not hold the others back."""
        now = self._now()
        if now - notice.created_at > GIVE_UP_AFTER:
            await self._database.run(outbox.put_off, notice, now, dead=True, why="too old to be news")
            return
        try:
            await self._send(name, channel, notice)
        except StorageError:
            raise
        except Exception:  # a send is where a task begins
            log.exception("sending broke", channel=name, notice=notice.id)
            later, last = now + LOOK_AGAIN, notice.tries + 1 >= BROKEN_TRIES
            await self._database.run(
                outbox.put_off, notice, later, dead=last, why="an error of ours; the log says more"
            )

    async def _send(self, name: str, channel: Channel, notice: Notice) -> None:
        kind, options = CHANNELS[channel.kind], channel.options
        send = await self._reserve(notice, options.bot)
        if send is None:
            return
        message = self._redact.within(kind.message(await self._dated(notice), self._inventory(), options))
        answer = await kind.send(self._client, options, message, time.time())
        state, after, content = _what_next(notice, answer, self._now())
        self._metrics.notices.labels(name, state if state != "pending" else "retried").inc()
        say = log.info if state == "sent" else log.warning
        say("notice", notice=notice.id, kind=notice.kind, channel=name, state=state, answer=answer.words)
        await self._record(notice, send, answer, state, after, content)

    async def _dated(self, notice: Notice) -> Notice:
        """The notice with all that is to be told, and with its times by the calendar."""
        unix = self._database.clock.unix
        content = {**notice.content, **await self._details(notice)}
        if "since" in content:
            content["since"] = unix(content["since"])
        return replace(notice, content=content, created_at=unix(notice.created_at))

    async def _reserve(self, notice: Notice, bot: str) -> int | None:
        """Wait for room within the bot's limits; the send's id, or None when we are to stop."""
        while not self._stopping:
            send, at = await self._database.run(outbox.reserve, notice.id, bot, self._now())
            if send is not None:
                return send
            await asyncio.sleep(min(max(at - self._now(), 0.01), 1.0))  # and look whether we are to stop
        return None

    async def _record(
        self, notice: Notice, send: int, answer: Answer, state: State, after: float, content: Mapping[str, Any] | None
    ) -> None:
        """Keep what became of a send, however long the database takes to accept it."""
        while True:
            now = self._now()
            try:
                await self._database.run(
                    outbox.record, notice, send, answer.what, answer.words,
                    state=state, not_before=now + after, now=now, content=content,
                )  # fmt: skip
            except StorageError as error:
                log.error("a send cannot be recorded yet", error=str(error))  # noqa: TRY400
                await asyncio.sleep(RECORD_AGAIN)
            else:
                return


def _what_next(notice: Notice, answer: Answer, now: float) -> tuple[State, float, dict[str, object] | None]:
    """(the notice's next state, seconds to wait, its changed content) after an answer."""
    if answer.what == "sent":
        return "sent", 0.0, None
    if answer.what == "dead" or now - notice.created_at > GIVE_UP_AFTER:
        return "dead", 0.0, None
    if answer.what == "again":
        pause = min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(notice.tries, 16))
        return "pending", max(pause, answer.after or 0.0), None
    # Both may help once: a plainer message, a new signature.
    done = "plain" if answer.what == "degrade" else "signed_again"
    if not notice.content.get(done):
        return "pending", 0.0, {**notice.content, done: True}
    if done == "signed_again":
        log.error("Feishu refuses our signature: look at this machine's clock, and at the bot's secret")
    return "dead", 0.0, None
