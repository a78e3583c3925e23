"""The `openai` probe: a chat completion timed to its first token, a vector, or the list of models."""

import codecs
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import check_lacks, check_matches, quote_excerpt, recode_as_utf8
from exporter.probes.http import check_status, decode_unless_refused
from exporter.probes.json_conditions import parse_json
from exporter.probes.net.http_client import fetch
from exporter.probes.net.http_request import HttpRequestOptions, ProbeAuth
from exporter.probes.net.http_response import HttpResponse, HttpResponseReader
from exporter.probes.peer_work import run_in_thread
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel, Token
from fleet.inventory.units import Patterns, PositiveDuration

PATHS = {"chat": "/chat/completions", "embeddings": "/embeddings", "models": "/models"}
EXPECTED_STATUS = [(200, 200)]
LINES_PER_TOKEN = 20  # limit of the lines of a stream, including comments and blank lines
OTHER_LIMIT = 10_000  # bytes outside of events
LINE_LIMIT = 1024 * 1024
MAX_USAGE = 10**9  # tokens; a greater number reported by a server is ignored
# Parameters that the probe sets, or that would produce more than `max_tokens`.
_RESERVED = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "best_of", "input",
    "encoding_format",
)  # fmt: skip
# The options that an endpoint does not have; those after the dot are of `expect`.
_OF_CHAT = (
    "max_tokens", "max_completion_tokens", "stream", "expect.body_matches", "expect.body_lacks",
    "expect.first_token_faster_than", "expect.tokens_per_second_above",
)  # fmt: skip
_MISSING: Mapping[str, tuple[str, ...]] = {
    "chat": ("expect.dimensions",),
    "embeddings": _OF_CHAT,
    "models": (*_OF_CHAT, "prompt", "parameters", "expect.dimensions"),
}


class OpenaiExpect(ConfigModel):
    body_matches: Patterns = []
    body_lacks: Patterns = []
    faster_than: PositiveDuration | None = None
    first_token_faster_than: PositiveDuration | None = None
    tokens_per_second_above: float | None = Field(None, gt=0)
    dimensions: int | None = Field(None, ge=1)


class OpenaiProbeOptions(HttpRequestOptions):
    endpoint: Literal["chat", "embeddings", "models"] = "chat"
    model: str = Field(min_length=1)
    api_key: Token | None = None
    prompt: str = "Reply with OK."
    max_tokens: int = Field(16, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = True
    parameters: Annotated[dict[str, Any], REFERENCES_ARE_SECRET] = Field(default_factory=dict)
    expect: OpenaiExpect = OpenaiExpect()

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in parameters:
            if name in _RESERVED:
                raise ValueError(f"{name} has its own key or is set by the probe; remove it from parameters")
        try:
            json.dumps(parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(str(error)) from None
        return parameters

    @model_validator(mode="after")
    def _check_combinations(self) -> "OpenaiProbeOptions":
        if self.api_key is not None and self.auth is not None:
            raise ValueError("api_key and auth exclude each other")
        if self.expect.first_token_faster_than is not None and not self.stream:
            raise ValueError("first_token_faster_than needs `stream: true`")
        if {"max_tokens", "max_completion_tokens"} <= self.model_fields_set:
            raise ValueError("max_tokens and max_completion_tokens exclude each other")
        given = self.model_fields_set | {f"expect.{name}" for name in self.expect.model_fields_set}
        for name in _MISSING[self.endpoint]:
            if name in given:
                raise ValueError(f"`endpoint: {self.endpoint}` has no {name}")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens

    @property
    def credentials(self) -> ProbeAuth | None:
        return ProbeAuth(bearer=self.api_key) if self.api_key is not None else self.auth

    @property
    def request_url(self) -> str:
        """The URL of the request; `url` may be the server, the API's root (`…/v1`), or the complete URL."""
        path = PATHS[self.endpoint]
        url, mark, query = self.url.partition("?")
        url = url.rstrip("/")
        if not url.endswith(path):
            has_path = url.count("/") > 2  # noqa: PLR2004 - the slashes of the scheme
            url = f"{url}{path}" if has_path else f"{url}/v1{path}"
        return f"{url}{mark}{query}"

    @property
    def verb(self) -> str:
        return "GET" if self.endpoint == "models" else "POST"

    @cached_property
    def content(self) -> tuple[bytes, str]:
        if self.endpoint == "models":
            return b"", ""
        request: dict[str, Any] = {"model": self.model}
        if self.endpoint == "embeddings":
            request["input"] = self.prompt
        else:
            request |= {
                "messages": [{"role": "user", "content": self.prompt}],
                "max_completion_tokens" if self.max_completion_tokens else "max_tokens": self.token_limit,
                "stream": self.stream,
            }
            if self.stream:
                request["stream_options"] = {"include_usage": True}
        return json.dumps({**self.parameters, **request}, ensure_ascii=False).encode(), "application/json"


class _StreamedCompletion:
    """A completion while it is received: its text, its tokens, and their times."""

    def __init__(self, max_tokens: int, details: ProbeDetails) -> None:
        self._details = details
        self._texts: list[str] = []
        self.chunk_count = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.ended = False
        self.other = bytearray()  # data outside of events
        self._usage: int | None = None
        self._line = bytearray()
        self._max_tokens = max_tokens
        self._lines = 0

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def tokens(self) -> int:
        """The number of tokens that the server reports, or else the number of chunks that contained a token."""
        return self.chunk_count if self._usage is None else self._usage

    @property
    def outside_events(self) -> bytes:
        """The data received outside of events."""
        return bytes(self.other + self._line)[:OTHER_LIMIT]

    def receive(self, reader: HttpResponseReader, data: bytes) -> None:
        """Process the next data of a stream of server-sent events."""
        if reader.status != 200:  # noqa: PLR2004 - HTTP status code
            self.other += data[: OTHER_LIMIT - len(self.other)]
            return
        self._line += data
        if b"\n" not in data and len(self._line) <= LINE_LIMIT:
            return
        *lines, rest = bytes(self._line).replace(b"\r\n", b"\n").split(b"\n")
        self._line = bytearray(rest)
        if len(rest) > LINE_LIMIT:
            reader.end(ProbeFailure("protocol", f"an event of the stream is longer than {LINE_LIMIT} bytes"))
        try:
            for line in lines:
                self._process_line(line.strip(), reader)
        except ProbeFailure as failure:
            reader.end(failure)

    def _process_line(self, line: bytes, reader: HttpResponseReader) -> None:
        self._lines += 1
        if self._lines == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if self._lines > LINES_PER_TOKEN * (self._max_tokens + LINES_PER_TOKEN):
            raise ProbeFailure("protocol", f"received {self._lines} lines with only {self.chunk_count} tokens")
        if not line.startswith(b"data:"):
            self.other += line[: OTHER_LIMIT - len(self.other)]
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.ended = True
            reader.end(None)
            return
        self.add_event(parse_json(data), "delta")
        if self.chunk_count > self._max_tokens:
            # The server exceeds max_tokens; stop reading.
            self.ended = True
            reader.end(None)

    def add_event(self, event: Any, text_key: str) -> None:
        """Add an event or a complete response, whose choices have their text under `text_key`. Raises ProbeFailure."""
        check_answer(event, self._details)
        usage = event.get("usage")
        reported = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(reported) is int and 0 <= reported <= MAX_USAGE:
            self._usage = reported
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise ProbeFailure("json", "the answer has no choices")
        for choice in choices:
            if isinstance(choice, dict):
                self._add_choice(choice, text_key)

    def _add_choice(self, choice: Mapping[str, Any], text_key: str) -> None:
        message = choice.get(text_key)
        if isinstance(message, dict):
            text = _join_parts(message.get("content"))
            # Reasoning and tool calls are tokens, too.
            others = (message.get(name) for name in ("reasoning_content", "reasoning", "tool_calls"))
            if text or any(others):
                self.last_token_at = time.perf_counter()
                self.first_token_at = self.first_token_at or self.last_token_at
                self.chunk_count += 1
            self._texts.append(text)
        if choice.get("finish_reason"):
            self.ended = True


def _join_parts(content: Any) -> str:
    """Return the text of a content, which some servers send as a list of parts; empty for anything else."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def check_answer(answer: Any, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless this is a JSON object that reports no error."""
    if not isinstance(answer, dict):
        raise ProbeFailure("json", "the answer is not a JSON object")
    if answer.get("error"):
        error = quote_excerpt(json.dumps(answer["error"], ensure_ascii=False).encode("utf-8", "replace"), details)
        raise ProbeFailure("status", f"the server reported an error: {error}")


async def probe_openai(options: OpenaiProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    if options.endpoint == "chat":
        await _probe_chat(options, details)
        return
    response = await fetch(options, details)
    objects = _list_objects(await _parse(options, response, details), details)
    check = _check_embedding if options.endpoint == "embeddings" else _check_models
    check(options, objects, details)
    limit = options.expect.faster_than
    if limit is not None and response.duration > limit:
        raise ProbeFailure("latency", f"the answer took {response.duration:.3f} s, expected less than {limit:g} s")


async def _parse(options: OpenaiProbeOptions, response: HttpResponse, details: ProbeDetails) -> Any:
    """Return the JSON of a whole response. Raises ProbeFailure."""

    def parse() -> Any:
        decoded = decode_unless_refused(options, EXPECTED_STATUS, response, details)
        check_status(options, EXPECTED_STATUS, decoded, details)
        return parse_json(recode_as_utf8(decoded.header("content-type"), decoded.body))

    return await run_in_thread(options.request.host, parse)


def _list_objects(answer: Any, details: ProbeDetails) -> list[Mapping[str, Any]]:
    """Return the objects in the list of an answer. Raises ProbeFailure."""
    check_answer(answer, details)
    if not isinstance(answer.get("data"), list):
        raise ProbeFailure("json", "the answer has no list `data`")
    return [each for each in answer["data"] if isinstance(each, dict)]


def _check_embedding(options: OpenaiProbeOptions, objects: Sequence[Mapping[str, Any]], details: ProbeDetails) -> None:
    vector = next((each.get("embedding") for each in objects), None)
    if not isinstance(vector, list) or not vector or not all(type(each) in (int, float) for each in vector):
        raise ProbeFailure("body", "the answer has no vector of numbers")
    details.evidence["dimensions"] = len(vector)
    expected = options.expect.dimensions
    if expected is not None and len(vector) != expected:
        raise ProbeFailure("body", f"the vector has {len(vector)} dimensions, expected {expected}")


def _check_models(options: OpenaiProbeOptions, objects: Sequence[Mapping[str, Any]], details: ProbeDetails) -> None:
    names = [each["id"] for each in objects if isinstance(each.get("id"), str)]
    if options.model not in names:
        listed = quote_excerpt(", ".join(names).encode("utf-8", "replace"), details) if names else "no model"
        raise ProbeFailure("body", f"the server does not list the model {options.model!r}; it lists {listed}")


async def _probe_chat(options: OpenaiProbeOptions, details: ProbeDetails) -> None:
    completion = _StreamedCompletion(options.token_limit, details)
    started = time.perf_counter()
    response = await fetch(options, details, completion.receive if options.stream else None)
    if options.stream:
        details.evidence["body"] = completion.text or bytes(completion.other)
        check_status(options, EXPECTED_STATUS, _with_body(response, completion), details)
    else:
        completion.add_event(await _parse(options, response, details), "message")
    if options.stream and not completion.ended:
        beginning = quote_excerpt(completion.outside_events, details)
        raise ProbeFailure(
            "protocol", f"the stream ended before the completion; outside of events it contained {beginning}"
        )
    if not completion.chunk_count:
        raise ProbeFailure("body", "the completion has no token")
    _measure(options, completion, started, response.duration, details)
    _check(options.expect, completion, response.duration, details)


def _with_body(response: HttpResponse, completion: _StreamedCompletion) -> HttpResponse:
    body = response.body or bytes(completion.other)
    return replace(response, body=body)


def _measure(
    options: OpenaiProbeOptions, completion: _StreamedCompletion, started: float, duration: float, details: ProbeDetails
) -> None:
    details.evidence["tokens"] = completion.tokens
    if not options.stream:
        details.gauges["service_llm_tokens_per_second"] = completion.tokens / duration
    elif completion.first_token_at is not None and completion.last_token_at is not None:
        details.gauges["service_llm_first_token_seconds"] = completion.first_token_at - started
        if completion.last_token_at > completion.first_token_at and completion.tokens > 1:
            rate = (completion.tokens - 1) / (completion.last_token_at - completion.first_token_at)
            details.gauges["service_llm_tokens_per_second"] = rate


def _check(expect: OpenaiExpect, completion: _StreamedCompletion, duration: float, details: ProbeDetails) -> None:
    text = completion.text.encode("utf-8", "replace")
    check_matches(expect.body_matches, text, "the completion", details)
    check_lacks(expect.body_lacks, text, "the completion", details)
    for name, seconds, limit in (
        ("the first token", details.gauges.get("service_llm_first_token_seconds"), expect.first_token_faster_than),
        ("the completion", duration, expect.faster_than),
    ):
        if seconds is not None and limit is not None and seconds > limit:
            raise ProbeFailure("latency", f"{name} took {seconds:.3f} s, expected less than {limit:g} s")
    # A completion in one chunk has no rate between tokens; use that of the whole response.
    rate = details.gauges.get("service_llm_tokens_per_second", completion.tokens / duration)
    minimum = expect.tokens_per_second_above
    if minimum is not None and rate < minimum:
        raise ProbeFailure("latency", f"{rate:.1f} tokens per second, expected more than {minimum:g}")


OPENAI = ProbeKind(OpenaiProbeOptions, probe_openai)
