"""The `openai` probe: a real chat completion of an OpenAI-compatible server, timed to its first token."""

import json
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator, model_validator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import apart, excerpt, lacks, matches, parse_json
from exporter.probes.http import judge_status
from exporter.probes.net.http_client import Answer, fetch
from exporter.probes.net.http_request import ProbeAuth, RequestOptions
from exporter.probes.net.http_response import Exchange
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ConfigModel, Token
from fleet.inventory.units import Patterns, PositiveDuration

PATH = "/chat/completions"
LINES_PER_TOKEN = 20  # that a stream may send, comments and blank ones too
KEPT = 10_000  # bytes of an answer that is no stream
LINE_LIMIT = 1024 * 1024
MOST_TOKENS = 10**9  # that a server is believed to have counted
# What would be more tokens than `max_tokens`, or another request.
_OURS = ("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "best_of")


class OpenaiExpect(ConfigModel):
    body_matches: Patterns = []
    body_lacks: Patterns = []
    faster_than: PositiveDuration | None = None
    first_token_faster_than: PositiveDuration | None = None
    tokens_per_second_above: float | None = Field(None, gt=0)


class OpenaiOptions(RequestOptions):
    model: str = Field(min_length=1)
    api_key: Token | None = None
    prompt: str = "Reply with OK."
    max_tokens: int = Field(16, ge=1)
    stream: bool = True
    parameters: dict[str, Any] = Field(default_factory=dict)
    expect: OpenaiExpect = OpenaiExpect()

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in parameters:
            if name in _OURS:
                raise ValueError(f"{name} may not stand here")
        try:
            json.dumps(parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(str(error)) from None
        return parameters

    @model_validator(mode="after")
    def _one_credential(self) -> "OpenaiOptions":
        if self.api_key is not None and self.auth is not None:
            raise ValueError("api_key and auth exclude each other")
        if self.expect.first_token_faster_than is not None and not self.stream:
            raise ValueError("first_token_faster_than needs `stream: true`")
        return self

    @property
    def credentials(self) -> ProbeAuth | None:
        return ProbeAuth(bearer=self.api_key) if self.api_key is not None else self.auth

    @property
    def target(self) -> str:
        """`url` may be the server, its API's root (`…/v1`), or the whole path."""
        url, mark, query = self.url.partition("?")
        url = url.rstrip("/")
        if not url.endswith(PATH):
            bare = url.count("/") == 2  # noqa: PLR2004 - of the scheme's
            url = f"{url}/v1{PATH}" if bare else f"{url}{PATH}"
        return f"{url}{mark}{query}"

    @property
    def verb(self) -> str:
        return "POST"

    @cached_property
    def content(self) -> tuple[bytes, str]:
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "stream": self.stream,
        }
        if self.stream:
            wanted["stream_options"] = {"include_usage": True}
        return json.dumps({**self.parameters, **wanted}, ensure_ascii=False).encode(), "application/json"


class _Completion:
    """A completion as it comes: its text, its tokens, and when they came."""

    def __init__(self, max_tokens: int, seen: Seen) -> None:
        self._seen = seen
        self.text = ""
        self.pieces = 0
        self.first: float | None = None
        self.last: float | None = None
        self.ended = False
        self.other = bytearray()  # an answer that is no stream
        self._usage: int | None = None
        self._line = bytearray()
        self._max_tokens = max_tokens
        self._lines = 0

    @property
    def tokens(self) -> int:
        """As the server counts them; a server that does not sends one with each piece."""
        return self.pieces if self._usage is None else self._usage

    @property
    def rest(self) -> bytes:
        """What came beside events."""
        return bytes(self.other + self._line)[:KEPT]

    def take(self, exchange: Exchange, data: bytes) -> None:
        """Read on in a stream of server-sent events."""
        if exchange.status != 200:  # noqa: PLR2004
            self.other += data[: KEPT - len(self.other)]
            return
        self._line += data
        if b"\n" not in data and len(self._line) <= LINE_LIMIT:
            return
        *lines, rest = bytes(self._line).replace(b"\r\n", b"\n").split(b"\n")
        self._line = bytearray(rest)
        if len(rest) > LINE_LIMIT:
            exchange.end(ProbeFailure("protocol", "an event of the stream has no end"))
        try:
            for line in lines:
                self._event(line.strip(), exchange)
        except ProbeFailure as failure:
            exchange.end(failure)

    def _event(self, line: bytes, exchange: Exchange) -> None:
        self._lines += 1
        if self._lines > LINES_PER_TOKEN * (self._max_tokens + LINES_PER_TOKEN):
            raise ProbeFailure("protocol", f"{self._lines} lines came with {self.pieces} tokens")
        if not line.startswith(b"data:"):
            self.other += line[: KEPT - len(self.other)]
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.ended = True
            exchange.end(None)
            return
        event = parse_json(data)
        self.note(event, "delta")
        if self.pieces > self._max_tokens:
            # It does not keep to what it was asked; we do.
            self.ended = True
            exchange.end(None)

    def note(self, told: Any, part: str) -> None:
        """Read one event, or a whole completion, whose choices have their text in `part`. Raises ProbeFailure."""
        if not isinstance(told, dict):
            raise ProbeFailure("json", "the answer is not an object")
        if told.get("error"):
            said = excerpt(json.dumps(told["error"], ensure_ascii=False).encode("utf-8", "replace"), self._seen)
            raise ProbeFailure("status", f"the server told of an error: {said}")
        usage = told.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(counted) is int and 0 <= counted <= MOST_TOKENS:
            self._usage = counted
        choices = told.get("choices")
        if not isinstance(choices, list):
            raise ProbeFailure("json", "the answer has no choices")
        for choice in choices:
            if isinstance(choice, dict):
                self._choice(choice, part)

    def _choice(self, choice: Mapping[str, Any], part: str) -> None:
        said = choice.get(part)
        if isinstance(said, dict):
            content = said.get("content")
            # What a model thinks before it answers, or the tools it calls, are tokens too.
            others = (said.get(name) for name in ("reasoning_content", "reasoning", "tool_calls"))
            if (content and isinstance(content, str)) or any(others):
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.pieces += 1
            self.text += content if isinstance(content, str) else ""
        if choice.get("finish_reason"):
            self.ended = True


async def probe_openai(options: OpenaiOptions, _means: Means, seen: Seen) -> None:
    completion = _Completion(options.max_tokens, seen)
    started = time.perf_counter()
    answer = await fetch(options, seen, completion.take if options.stream else None)
    if options.stream:
        seen.evidence["body"] = completion.text or bytes(completion.other)
    judge_status(options, [(200, 200)], _with_body(answer, completion), seen)
    if not options.stream:
        completion.note(await apart(parse_json, answer.body), "message")
    elif not completion.ended:
        began = excerpt(completion.rest, seen)
        raise ProbeFailure("protocol", f"the stream ended before the completion did; beside events it said {began}")
    if not completion.pieces:
        raise ProbeFailure("body", "the completion has no token")
    _measure(options, completion, started, answer.took, seen)
    _judge(options.expect, completion, answer.took, seen)


def _with_body(answer: Answer, completion: _Completion) -> Answer:
    body = answer.body or bytes(completion.other)
    return Answer(answer.status, answer.version, answer.headers, body, answer.took, answer.secure)


def _measure(options: OpenaiOptions, completion: _Completion, started: float, took: float, seen: Seen) -> None:
    seen.evidence["tokens"] = completion.tokens
    if not options.stream:
        seen.gauges["service_llm_tokens_per_second"] = completion.tokens / took
    elif completion.first is not None and completion.last is not None:
        seen.gauges["service_llm_first_token_seconds"] = completion.first - started
        if completion.last > completion.first and completion.tokens > 1:
            rate = (completion.tokens - 1) / (completion.last - completion.first)
            seen.gauges["service_llm_tokens_per_second"] = rate


def _judge(expect: OpenaiExpect, completion: _Completion, took: float, seen: Seen) -> None:
    text = completion.text.encode("utf-8", "replace")
    matches(expect.body_matches, text, "the completion", seen)
    lacks(expect.body_lacks, text, "the completion", seen)
    for what, seconds, most in (
        ("the first token", seen.gauges.get("service_llm_first_token_seconds"), expect.first_token_faster_than),
        ("the completion", took, expect.faster_than),
    ):
        if seconds is not None and most is not None and seconds > most:
            raise ProbeFailure("latency", f"{what} took {seconds:.3f} s, expected less than {most:g} s")
    # What came in one piece has no rate of its own but that of the whole.
    rate = seen.gauges.get("service_llm_tokens_per_second", completion.tokens / took)
    least = expect.tokens_per_second_above
    if least is not None and rate < least:
        raise ProbeFailure("latency", f"{rate:.1f} tokens per second came, expected more than {least:g}")


OPENAI = Kind(OpenaiOptions, probe_openai)
