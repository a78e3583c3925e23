"""Expectations of text, shared by the probes that have them."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from exporter.results import ProbeFailure, Seen
from fleet.units import compile_pattern

SHOWN = 120
EXAMINED = 10_000


@lru_cache(maxsize=50_000)
def compiled(pattern: str) -> Any:
    return compile_pattern(pattern)


def matches(patterns: Iterable[str], text: bytes, what: str, seen: Seen) -> None:
    """Raise ProbeFailure unless every pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        if compiled(pattern).search(text) is None:
            raise ProbeFailure("body", f"{what} does not match {pattern!r}; it begins {excerpt(text, seen)}")


def lacks(patterns: Iterable[str], text: bytes, what: str, seen: Seen) -> None:
    """Raise ProbeFailure if any pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        found = compiled(pattern).search(text)
        if found is not None:
            raise ProbeFailure("body", f"{what} matches {pattern!r}, which it must not: {excerpt(found.group(), seen)}")


def excerpt(text: bytes, seen: Seen) -> str:
    """The beginning of what a peer said, quoted; secrets that it repeats are masked before it is cut."""
    shown = seen.redact(text[:EXAMINED].decode("utf-8", "replace"))
    return repr(shown[:SHOWN]) + ("…" if len(shown) > SHOWN else "")
