"""Expectations of text, shared by the probes that have them."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from exporter.results import ProbeFailure, Reason
from fleet.units import compile_pattern

SHOWN = 120


@lru_cache(maxsize=50_000)
def compiled(pattern: str) -> Any:
    return compile_pattern(pattern)


def matches(patterns: Iterable[str], text: bytes, reason: Reason, what: str) -> None:
    """Raise ProbeFailure unless every pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        if compiled(pattern).search(text) is None:
            raise ProbeFailure(reason, f"{what} does not match {pattern!r}; it begins {excerpt(text)}")


def lacks(patterns: Iterable[str], text: bytes, reason: Reason, what: str) -> None:
    """Raise ProbeFailure if any pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        found = compiled(pattern).search(text)
        if found is not None:
            raise ProbeFailure(reason, f"{what} matches {pattern!r}, which it must lack: {excerpt(found.group())}")


def excerpt(text: bytes) -> str:
    shown = repr(text[:SHOWN].decode("utf-8", "replace"))
    return f"{shown}…" if len(text) > SHOWN else shown
