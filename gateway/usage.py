"""How many tokens requests use: estimated from their size before they are sent, then read from the response."""

import asyncio
import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass

TAIL = 16 * 1024  # bytes at the end of a response in which `usage` is looked for; it is among the last keys
_STEP = 64 * 1024  # bytes that are decompressed in one step
_WEIGHT = 0.1  # of a new measurement
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass
class _Averages:
    per_byte: float = 0.25  # of the request
    completion: float = 256.0


class Estimator:
    """Estimates the tokens of requests to one upstream, and learns from those that are known.

    What it has learned of a client is only for that client: short requests that refer to long texts would make it
    overestimate those of others by far.
    """

    def __init__(self) -> None:
        self._averages: dict[str, _Averages] = defaultdict(_Averages)  # by client

    def estimate(self, client: str, size: int, max_completion: int | None) -> float:
        averages = self._averages[client]
        completion = averages.completion if max_completion is None else min(averages.completion, max_completion)
        return size * averages.per_byte + completion

    def learn(self, client: str, size: int, usage: Usage) -> None:
        averages = self._averages[client]
        if size > 0:
            averages.per_byte += _WEIGHT * (usage.prompt / size - averages.per_byte)
        averages.completion += _WEIGHT * (usage.completion - averages.completion)


def tells_usage(method: str, content_type: str) -> bool:
    """Whether a response may say what its request has used. Others, such as files, have what clients wrote there."""
    kind = content_type.partition(";")[0].strip().lower()
    return method == "POST" and (not kind or kind == "text/event-stream" or kind.endswith(("/json", "+json")))


class UsageReader:
    """Reads the usage from the end of a response, be it JSON or server-sent events, whose parts it is given."""

    def __init__(self, encoding: str, *, is_told: bool = True) -> None:
        self._tail = bytearray()
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None
        self._is_readable = is_told and encoding in ("", "identity", "gzip", "deflate")

    async def add(self, part: bytes) -> None:
        if not self._is_readable:
            return
        if self._decoder is None:
            self._keep(part)
            return
        try:
            while part:
                self._keep(self._decoder.decompress(part, _STEP))
                part = self._decoder.unconsumed_tail
                if part:  # it may become a thousand times as long
                    await asyncio.sleep(0)
        except zlib.error:
            self._is_readable = False

    def _keep(self, part: bytes) -> None:
        self._tail += part[-TAIL:]
        if len(self._tail) > 2 * TAIL:
            del self._tail[:-TAIL]

    def find(self) -> Usage | None:
        """Return the last usage in what was added."""
        matches = list(_USAGE.finditer(self._tail)) if self._is_readable else []
        if not matches:
            return None
        try:
            found, _ = _DECODER.raw_decode(self._tail[matches[-1].end() :].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
        prompt = _count(found, "prompt_tokens", "input_tokens")
        completion = _count(found, "completion_tokens", "output_tokens")
        return Usage(prompt or 0, completion or 0) if prompt is not None or completion is not None else None


def _count(usage: dict[str, object], *names: str) -> int | None:
    """Return a number of tokens, under the first of these names that is there."""
    found = next((usage[name] for name in names if name in usage), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**31 else None
