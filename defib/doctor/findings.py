"""What the doctor found: what was looked at, how it is, and what to do."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One check of one subject: its result, what was seen, and what to do unless it passed."""

    subject: str
    check: str
    result: Result
    seen: str = ""
    mend: str = ""

    def __str__(self) -> str:
        seen = f": {' '.join(self.seen.split())}" if self.seen else ""
        mend = f" → {self.mend}" if self.mend and self.result != "pass" else ""
        return f"{self.result.upper()}  {self.subject}: {self.check}{seen}{mend}"


async def within(seconds: float, subject: str, look: Callable[[], Awaitable[Sequence[Finding]]]) -> Sequence[Finding]:
    """What `look` finds, or that it found nothing in time."""
    try:
        async with asyncio.timeout(seconds):
            return await look()
    except TimeoutError:
        mend = "something holds it up; see whether it can be reached from here"
        return [Finding(subject, "answers", "fail", f"nothing within {seconds:g} s", mend)]
