"""Entries of the audit log, and the aggregation of refused requests."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import structlog

from runtime.access.roles import Identity, Means

Outcome = Literal["done", "refused", "failed"]
AGGREGATE_FOR = 15.0  # seconds during which equal refusals become one entry
FLUSH_EVERY = 1.0
# Kinds of refusals in that time; what exceeds them is one entry for each known caller, or address, and then one.
MAX_KINDS_OF_CALLER, MAX_KINDS_OF_ADDRESS, MAX_KINDS = 50, 10, 200
_MORE = "more refusals"
log = structlog.get_logger()


@dataclass(frozen=True)
class AuditEntry:
    """Who did what, from where, by which means, and the outcome. `count` is more than 1 for aggregated refusals."""

    event: str  # sign_in, sign_out, access, or the name of an operation
    name: str
    means: Means
    address: str
    target: str = ""
    outcome: Outcome = "done"
    detail: str = ""
    count: int = 1
    verified: bool = True
    action: int | None = None  # the id of the action that the operation has started
    at: float | None = None  # of the first of aggregated refusals; None: the time at which the entry is stored

    @classmethod
    def of(
        cls,
        identity: Identity,
        event: str,
        target: str = "",
        *,
        outcome: Outcome = "done",
        detail: str = "",
        action: int | None = None,
    ) -> "AuditEntry":
        """Return an entry about what an authenticated caller did."""
        return cls(
            event, identity.label, identity.means, identity.address, target, outcome, detail,
            verified=not identity.claimed_user, action=action,
        )  # fmt: skip


class Refusals:
    """Aggregates entries about refused requests: the first of a kind is written, the others with their count later."""

    def __init__(self, write: Callable[[AuditEntry], Awaitable[None]], now: Callable[[], float]) -> None:
        self._write, self._now = write, now
        self._counts: dict[AuditEntry, int] = {}
        self._first_at: dict[AuditEntry, float] = {}
        self._written_at: dict[AuditEntry, float] = {}

    def add(self, entry: AuditEntry) -> None:
        kinds = self._counts.keys() | self._written_at.keys()
        if entry not in kinds and entry.verified:
            if sum(each.verified and each.name == entry.name for each in kinds) >= MAX_KINDS_OF_CALLER:
                entry = replace(entry, target="(various)", detail=_MORE)
        elif entry not in kinds:
            unknown = [each for each in kinds if not each.verified]
            same = sum(each.address == entry.address for each in unknown)
            if same >= MAX_KINDS_OF_ADDRESS or len(unknown) >= MAX_KINDS:
                address = entry.address if len(unknown) < 2 * MAX_KINDS else ""
                entry = AuditEntry(
                    entry.event, "(various)", entry.means, address, outcome="refused", detail=_MORE, verified=False
                )
        self._counts[entry] = self._counts.get(entry, 0) + 1
        self._first_at.setdefault(entry, self._now())

    async def run(self) -> None:
        """Write the entries, until cancelled; then write what is left."""
        try:
            while True:
                await asyncio.sleep(FLUSH_EVERY)
                await self._flush(asyncio.get_running_loop().time() - AGGREGATE_FOR)
        finally:
            await self._flush(float("inf"))

    async def _flush(self, before: float) -> None:
        """Write the entries of kinds that were not written after a time."""
        now = asyncio.get_running_loop().time()
        self._written_at = {
            entry: at for entry, at in self._written_at.items() if at >= before or entry in self._counts
        }
        for entry in [each for each in self._counts if self._written_at.get(each, float("-inf")) <= before]:
            self._written_at[entry] = now
            await self._write(replace(entry, count=self._counts.pop(entry), at=self._first_at.pop(entry)))


async def write_to_log(entry: AuditEntry) -> None:
    """Write an entry to the log: the audit log of programs without a record."""
    fields = asdict(entry)
    del fields["at"]  # of this machine's clock since its start: the log has its own times
    log.info("audit", operation=fields.pop("event"), **fields)
