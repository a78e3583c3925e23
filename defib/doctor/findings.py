"""Findings: what the doctor checked, the result, and how to fix a problem."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

CheckResult = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One check of one subject; `fix` says what to do unless it passed."""

    subject: str
    check: str
    result: CheckResult
    detail: str = ""
    fix: str = ""

    def __str__(self) -> str:
        detail = f": {' '.join(self.detail.split())}" if self.detail else ""
        fix = f" → {self.fix}" if self.fix and self.result != "pass" else ""
        return f"{self.result.upper()}  {self.subject}: {self.check}{detail}{fix}"


async def check_with_timeout(
    seconds: float, subject: str, check: Callable[[], Awaitable[Sequence[Finding]]]
) -> Sequence[Finding]:
    """Return the findings of a check, or a failure if it takes too long."""
    try:
        async with asyncio.timeout(seconds):
            return await check()
    except TimeoutError:
        fix = "find out why it is slow, and whether it can be reached from this machine"
        return [Finding(subject, "reachable", "fail", f"no answer within {seconds:g} s", fix)]
