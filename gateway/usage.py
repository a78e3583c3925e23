"""How many tokens requests use: estimated from their size before they are sent, then read from the response."""

import json
import re
import zlib
from dataclasses import dataclass

TAIL = 16 * 1024  # bytes at the end of a response in which `usage` is looked for; it is among the last keys
_STEP = 64 * 1024  # bytes that are decompressed in one step
MAX_DECODED = 8 * 2**20  # bytes: of a response that becomes longer, usage is not read
MAX_TOKENS = 4 * 10**6  # of one request; more are not believed
_WEIGHT = 0.1  # of a new measurement
_MOST_PER_BYTE = 2.0  # tokens
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class Estimator:
    """Estimates the tokens of a client's requests to an upstream, and learns from those that are known.

    Each client has its own: what one sends, and how, says nothing of the others.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Learned] = {}

    def estimate(self, client: str, size: int, max_completion: int | None) -> float:
        learned = self._clients.get(client, _Learned())
        completion = learned.completion if max_completion is None else min(learned.completion, max_completion)
        return size * learned.per_byte + completion

    def learn(self, client: str, size: int, usage: Usage) -> None:
        learned = self._clients.setdefault(client, _Learned())
        if size > 0:  # the prompt may be elsewhere, such as in an earlier response
            learned.per_byte += _WEIGHT * (min(usage.prompt / size, _MOST_PER_BYTE) - learned.per_byte)
        learned.completion += _WEIGHT * (usage.completion - learned.completion)


@dataclass
class _Learned:
    per_byte: float = 0.25  # tokens, of the request
    completion: float = 256.0


class UsageReader:
    """Reads the usage from the end of a response, be it JSON or server-sent events, whose parts it is given."""

    def __init__(self, encoding: str) -> None:
        self._tail = bytearray()
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None
        self.is_readable = encoding in ("", "identity", "gzip", "deflate")
        self._decoded = 0

    def add(self, part: bytes) -> None:
        if not self.is_readable:
            return
        if self._decoder is None:
            self._keep(part)
            return
        try:
            while part and self.is_readable:
                decoded = self._decoder.decompress(part, _STEP)
                self._keep(decoded)
                self._decoded += len(decoded)
                self.is_readable = self._decoded <= MAX_DECODED
                part = self._decoder.unconsumed_tail
        except zlib.error:
            self.is_readable = False

    def _keep(self, part: bytes) -> None:
        self._tail += part[-TAIL:]
        if len(self._tail) > 2 * TAIL:
            del self._tail[:-TAIL]

    def find(self) -> Usage | None:
        """Return the last usage in what was added."""
        matches = list(_USAGE.finditer(self._tail)) if self.is_readable else []
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
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= MAX_TOKENS else None
