"""Takes notices from the outbox and sends them, within each bot's limits, until they are sent or dead."""

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
import structlog

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel, Notify
from remediator.metrics import RemediatorMetrics
from remediator.notifications import cards, outbox, reader, rendering
from remediator.notifications.channels import CHANNELS
from remediator.notifications.channels.feishu import Answer, Letter, Session
from remediator.notifications.channels.feishu_cards import Card
from remediator.notifications.outbox import Batch, State
from remediator.notifications.reader import Story
from remediator.notifications.rendering import Templates
from remediator.record.database import Database, StorageError
from runtime.redaction import Redactor

LOOK_AGAIN = 15.0
FIRST_RETRY = 2.0
LONGEST_RETRY = 300.0
LONGEST_PAUSE = 60.0
STILL_SENT = 230049  # the answer that is about one message alone
GIVE_UP_AFTER = 24 * 3600.0
RECORD_AGAIN = 5.0
BROKEN_TRIES = UNKNOWN_TRIES = 5  # of what we cannot make a message of, or Feishu answers what nobody knows
log = structlog.get_logger()


@dataclass
class _Pace:
    """When a bot may be tried again that is busy, or cannot be reached: it is so for all that it is to tell."""

    until: float = 0.0
    failures: int = 0

    def after(self, answer: Answer, now: float) -> None:
        if answer.what != "again" or answer.code == STILL_SENT:
            self.failures = 0
            return
        self.until = now + max(answer.after or 0.0, min(LONGEST_PAUSE, FIRST_RETRY * 2.0 ** min(self.failures, 16)))
        self.failures += 1


class Sender:
    """One task per channel, started when there is something to send and ended when there is not."""

    def __init__(
        self,
        database: Database,
        client: httpx.AsyncClient,
        metrics: RemediatorMetrics,
        redact: Redactor,
        details: Callable[[Batch], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._database, self._session = database, Session(client)
        self._metrics, self._redact, self._details = metrics, redact, details
        self._now = database.clock.now
        self._paces: defaultdict[str, _Pace] = defaultdict(_Pace)
        self._sending: set[asyncio.Task[None]] = set()
        self._wakes: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._known: Notify | None = None  # by which what stands in the outbox was looked through
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
                for name in self._database.inventory.notify.channels.keys() - self._wakes.keys():
                    self._wakes[name] = asyncio.Event()
                    group.create_task(self._serve(name, self._wakes[name]), name=f"send {name}")
                await self._changed.wait()

    async def _bury(self) -> None:
        """Give up what cannot be told any more as it was to be."""
        notify = self._database.inventory.notify
        try:
            buried = await self._database.write(outbox.bury, list(notify.channels))
            if notify is not self._known:
                plain = [name for name in notify.channels if not notify.can_update_cards(name)]
                await self._database.write(outbox.retire_cards, plain)
                self._known = notify
        except StorageError as error:
            log.error("the outbox cannot be used", error=str(error))  # noqa: TRY400 - it is its own explanation
        else:
            if buried:
                log.warning("notices of channels that were removed are given up", notices=buried)

    async def _serve(self, name: str, wake: asyncio.Event) -> None:
        for outcome in ("sent", "retried", "dead"):
            self._metrics.notices.labels(name, outcome)  # from nothing there is no increase
        while name in self._database.inventory.notify.channels:
            wake.clear()
            pause = await self._drain(name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()
        del self._wakes[name]

    async def _drain(self, name: str) -> float:
        """Send what a channel has; returns the seconds after which to look again."""
        try:
            while not self._stopping and (channel := self._database.inventory.notify.channels.get(name)) is not None:
                bot = channel.options.bot
                chosen = await self._database.write(outbox.choose, name, bot)
                if isinstance(chosen, Batch) and self._paces[bot].until > self._now():
                    chosen = self._paces[bot].until
                if not isinstance(chosen, Batch):
                    return min(max(chosen - self._now(), 0.01), LOOK_AGAIN)
                # A send that has begun is ended and kept, also when we are to stop: else it would be sent twice.
                task = asyncio.create_task(self._try(name, channel, chosen))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
                await asyncio.shield(task)
        except StorageError as error:
            log.error("the outbox cannot be used", error=str(error))  # noqa: TRY400 - it is its own explanation
        return LOOK_AGAIN

    async def drain(self) -> None:
        """Begin no more sends, and wait for those that have begun."""
        self._stopping = True
        if self._sending:
            await asyncio.wait(self._sending)

    async def _try(self, name: str, channel: Channel, batch: Batch) -> None:
        """Send a batch; one that cannot even be made into a message must not hold the others back."""
        try:
            await self._send(name, channel, batch)
        except StorageError:
            raise
        except Exception:  # a send is where a task begins
            log.exception("sending broke", channel=name, notice=batch.first.id)
            why, later = "internal error; see the log", self._now() + LOOK_AGAIN
            await self._database.write(outbox.broke, batch, why, later, most=BROKEN_TRIES)

    async def _send(self, name: str, channel: Channel, batch: Batch) -> None:
        inventory, kind, options = self._database.inventory, CHANNELS[channel.kind], channel.options
        told = await self._database.read(reader.read, batch)
        more = await self._details(batch)
        told = [self._masked(replace(story, facts={**story.facts, **more})) for story in told]
        card = await asyncio.to_thread(_made, told, batch, inventory, options)
        # The limits are looked at last, so that nothing stands between that and the send.
        send = await self._database.write(outbox.reserve, batch, options.bot)
        if send is None:
            return
        letter = Letter(card, _uuid(name, batch), batch.message_id, batch.reply_to, batch.degraded)
        answer = await kind.send(self._session, options, letter, time.time())
        self._paces[options.bot].after(answer, self._now())
        state, after = self._what_next(batch, answer)
        self._metrics.notices.labels(name, state if state != "pending" else "retried").inc()
        if answer.offset is not None:
            self._metrics.clock_offset.set(answer.offset)
        say = log.info if state == "sent" else log.warning
        say(
            "notice", notice=batch.first.id, kind=batch.first.kind, told=len(batch.ids), channel=name, state=state,
            answer=answer.words,
        )  # fmt: skip
        await self._record(batch, send, answer, state, after)

    def _masked(self, story: Story) -> Story:
        """A story without secrets in what came from outside; once escaped, they would not be known any more."""
        mask = self._redact
        return replace(
            story, labels=mask.redact_all(story.labels), annotations=mask.redact_all(story.annotations),
            facts=mask.redact_all(story.facts), decision=mask.redact_all(story.decision),
            links=mask.redact_all(story.links),
            attempts=[replace(each, why=mask(each.why)) for each in story.attempts],
        )  # fmt: skip

    async def _record(self, batch: Batch, send: int, answer: Answer, state: State, after: float) -> None:
        """Keep what became of a send, however long the database takes to accept it."""
        while True:
            now = self._now()
            try:
                await self._database.write(
                    outbox.record, batch, send, answer.what, self._redact(answer.words),
                    state=state, not_before=now + after, message_id=answer.message_id, degraded=answer.wants,
                )  # fmt: skip
            except StorageError as error:
                log.error("a send cannot be recorded yet", error=str(error))  # noqa: TRY400
                await asyncio.sleep(RECORD_AGAIN)
            else:
                return

    def _what_next(self, batch: Batch, answer: Answer) -> tuple[State, float]:
        """(the state of what was told, seconds to wait) after an answer."""
        if answer.what == "sent":
            return "sent", 0.0
        if answer.what == "dead" or self._now() - batch.since > GIVE_UP_AFTER:
            return "dead", 0.0
        if answer.what == "unknown" and batch.tries + 1 >= UNKNOWN_TRIES:
            return "dead", 0.0
        if answer.what in ("again", "unknown"):
            pause = min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(batch.tries, 16))
            return "pending", max(pause, answer.after or 0.0)
        # Both may help once: a plainer message, a new signature.
        if batch.degraded < answer.wants if answer.what == "degrade" else not batch.signed_again:
            return "pending", 0.0
        return "dead", 0.0


def _made(told: list[Story], batch: Batch, inventory: Inventory, options: Any) -> Card:
    """A batch's card; by our own templates where the user's fail."""
    try:
        return _card(told, batch, rendering.of(inventory), options)
    except Exception:
        if inventory.notify.templates is None:
            raise
        log.exception("the templates of notify.templates cannot be used: see `defib check`", form=batch.form)
        return _card(told, batch, rendering.ours(inventory), options)


def _card(told: list[Story], batch: Batch, words: Templates, options: Any) -> Card:
    # That a card is changed calls nobody, whatever stands in it.
    mention = options.mention if batch.message_id is None else {}
    first = batch.first
    return cards.card(
        told, batch.form, words, mention, answers=options.answers, notice=first.id, told_at=first.created_at
    )


def _uuid(channel: str, batch: Batch) -> str:
    return hashlib.sha256(f"{channel} {batch.uuid}".encode()).hexdigest()[:40]
