"""The `http` probe: sends one request and checks the response."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import (
    check_lacks,
    check_matches,
    compile_cached,
    quote_excerpt,
    recode_as_utf8,
)
from exporter.probes.json_conditions import JsonExpect, check_json, parse_json
from exporter.probes.net.connections import Unreachable, UnreachableExpect, check_unreachable, expand_unreachable
from exporter.probes.net.cookies import Cookies, list_values
from exporter.probes.net.http_client import decode, fetch
from exporter.probes.net.http_request import HttpBodyOptions, HttpRequestOptions, RequestHeaderName
from exporter.probes.net.http_response import HttpResponse
from exporter.probes.net.kept_values import check_places, fill, find_names
from exporter.probes.peer_work import run_in_thread
from exporter.probes.values import HttpValues, find_texts, note_http_values
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Patterns, PositiveDuration, as_list
from runtime.redaction import Redactor

T = TypeVar("T")
VALUES_SHOWN = 3  # of a header that is sent several times
STEPS_LIMIT = 10  # requests before that of the probe
_OF_CONNECTIONS = ("ip", "source", "resolver", "tls", "proxy", "strict")  # keys of options
LONG_BODY, LONG_JSON = 128 * 1024, 4 * 1024  # bytes; a JSONPath may traverse a document many times
SECRETS_LIMIT, SECRETS_SIZE_LIMIT = 100, 64 * 1024  # values that servers choose, and their characters


def _parse_statuses(value: object) -> list[tuple[int, int]]:
    """Return `200`, `2xx`, `200-299`, or a list of these, as inclusive ranges."""
    ranges = []
    for item in as_list(value):
        text = str(item)
        low, _, high = text.partition("-")
        if text[1:] == "xx" and text[:1] in "12345":
            ranges.append((int(text[0]) * 100, int(text[0]) * 100 + 99))
        elif low.isdigit() and (not high or high.isdigit()) and 100 <= int(low) <= int(high or low) <= 999:  # noqa: PLR2004 - HTTP status codes
            ranges.append((int(low), int(high or low)))
        else:
            raise ValueError(f"{text} is not a status code (write 200, 2xx or 200-299)")
    return ranges


class HeaderExpect(ConfigModel):
    """What a response header must be; `optional` accepts that it is missing."""

    matches: Patterns = []
    lacks: Patterns = []
    optional: bool = False

    @model_validator(mode="after")
    def _can_fail(self) -> "HeaderExpect":
        if self.optional and not self.matches and not self.lacks:
            raise ValueError("can never fail: add matches or lacks, or remove `optional: true`")
        return self


def _expand_header(value: object) -> object:
    return {"matches": value} if isinstance(value, str | list) else value


HttpVersion = Literal["1.0", "1.1", "2"]
HttpVersions = Annotated[
    list[HttpVersion], BeforeValidator(as_list, json_schema_input_type=HttpVersion | list[HttpVersion])
]


class HttpExpect(ConfigModel):
    status: Annotated[
        list[tuple[int, int]],
        Field(min_length=1),
        BeforeValidator(_parse_statuses, json_schema_input_type=Any),
        PlainSerializer(lambda ranges: [f"{low}-{high}" for low, high in ranges]),
    ] = [(200, 299)]
    http_version: HttpVersions = []
    tls: bool | None = None
    headers: dict[
        RequestHeaderName,
        Annotated[HeaderExpect, BeforeValidator(_expand_header, json_schema_input_type=str | list[str] | HeaderExpect)],
    ] = Field(default_factory=dict)
    body_matches: Patterns = []
    body_lacks: Patterns = []
    json_: JsonExpect = Field(default_factory=dict, alias="json")
    faster_than: PositiveDuration | None = None

    @property
    def reads_body(self) -> bool:
        """Whether anything is expected of the body."""
        return bool(self.body_matches or self.body_lacks or self.json_)


class HttpProbeExpect(HttpExpect, UnreachableExpect):
    """What is expected of the response, or that there is none."""


class HttpStep(HttpBodyOptions):
    """A request before that of the probe; `keep` names values of its response for later requests."""

    expect: HttpExpect = HttpExpect()
    keep: HttpValues = Field(default_factory=dict)


class HttpProbeOptions(HttpBodyOptions):
    before: Annotated[list[HttpStep], Field(max_length=STEPS_LIMIT)] = []
    values: HttpValues = Field(default_factory=dict)
    expect: Annotated[
        HttpProbeExpect, BeforeValidator(expand_unreachable, json_schema_input_type=Unreachable | HttpProbeExpect)
    ] = HttpProbeExpect()

    @model_validator(mode="after")
    def _check_unreachable(self) -> "HttpProbeOptions":
        if self.expect.unreachable and (self.values or self.before):
            raise ValueError("`expect: unreachable` excludes values and before")
        if self.expect.unreachable and self.proxy is not None:
            raise ValueError("`expect: unreachable` cannot be checked through a proxy")
        return self

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, written: Any) -> Any:
        """Give the requests before that of the probe its options for connections."""
        if not isinstance(written, Mapping) or not isinstance(written.get("before"), list):
            return written
        inherited = {key: written[key] for key in _OF_CONNECTIONS if key in written}
        steps = [{**inherited, **step} if isinstance(step, Mapping) else step for step in written["before"]]
        return {**written, "before": steps}

    @model_validator(mode="after")
    def _check_kept(self) -> "HttpProbeOptions":
        known: set[str] = set()
        for step in (*self.before, self):
            check_places(step)
            missing = find_names(step) - known
            if missing:
                raise ValueError(f"{{kept.{min(missing)}}}: no request before keeps it")
            known |= set(step.keep) if isinstance(step, HttpStep) else set()
        return self


async def probe_http(options: HttpProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    expect = options.expect
    if expect.unreachable:
        await check_unreachable(options.request.host, options.request.port, context.timeout, details, options)
        return
    cookies = None
    if options.before:
        cookies, kept = await _take_steps(options.before, details)
        options = fill(options, kept)
    response = await fetch(options, details, cookies=cookies)
    check = partial(_check_response, options, response, details)
    await examine(options, response, check, has_json=bool(expect.json_ or options.values))


def _check_response(options: HttpProbeOptions, response: HttpResponse, details: ProbeDetails) -> None:
    expect = options.expect
    if options.values or expect.reads_body or not _is_expected(response.status, expect.status):
        response = decode_unless_refused(options, expect.status, response, details)
    if options.values:
        body = recode_as_utf8(response.header("content-type"), response.body)
        note_http_values(options.values, response.header, body, details)
    check_response(options, expect, response, details)


async def _take_steps(steps: Sequence[HttpStep], details: ProbeDetails) -> tuple[Cookies, Mapping[str, str]]:
    """Send the requests before that of the probe; return the cookies and the kept values. Raises ProbeFailure."""
    cookies, kept = Cookies(), dict[str, str]()
    secrets = _Secrets(details)
    for number, step in enumerate(steps, 1):
        details.timeout_failure = ProbeFailure("timeout", f"request {number} before: no answer in time")
        try:
            kept |= await _take_step(fill(step, kept), cookies, secrets, details)
        except ProbeFailure as failure:
            raise ProbeFailure(failure.reason, f"request {number} before: {failure.message}") from failure
        details.timeout_failure = None
    details.evidence.clear()  # which is that of the request before
    return cookies, kept


class _Secrets:
    """What servers have set or returned before the request of a probe, and nobody else may see."""

    def __init__(self, details: ProbeDetails) -> None:
        self._redact = details.redact = Redactor(base=details.redact)
        self._count = self._size = 0

    def add(self, values: Iterable[str]) -> None:
        """Mask values in all that is shown from now on, up to the limits."""
        masked = []
        for value in values:
            self._count += 1
            self._size += len(value)
            if self._are_too_many:
                break
            masked.append(value)
        self._redact.add_from_server(masked)

    @property
    def _are_too_many(self) -> bool:
        return self._count > SECRETS_LIMIT or self._size > SECRETS_SIZE_LIMIT

    def check(self) -> None:
        """Raise ProbeFailure if not all values are masked."""
        if self._are_too_many:
            limits = f"{SECRETS_LIMIT} cookies and kept values, or {SECRETS_SIZE_LIMIT} characters in them"
            raise ProbeFailure("protocol", f"the responses have more than {limits}")


async def _take_step(step: HttpStep, cookies: Cookies, secrets: _Secrets, details: ProbeDetails) -> Mapping[str, str]:
    """Send one request, and return what is kept of its response, which becomes secret. Raises ProbeFailure."""
    try:
        response = await fetch(step, details, cookies=cookies)
    except ProbeFailure:
        _mask_cookies(cookies, secrets, details)
        secrets.check()
        raise
    except asyncio.CancelledError:
        _mask_cookies(cookies, secrets, details)
        raise
    _mask_cookies(cookies, secrets, details)
    secrets.check()
    check = partial(_check_step, step, response, secrets, details)
    return await examine(step, response, check, has_json=bool(step.expect.json_ or step.keep))


def _mask_cookies(cookies: Cookies, secrets: _Secrets, details: ProbeDetails) -> None:
    """Mask the cookies of the last response, which may not have been read to its end, and of those before."""
    last = [value for name, value in details.evidence.get("headers", ()) if name == "set-cookie"]
    set_before, cookies.values = cookies.values, []
    secrets.add({*set_before, *list_values(last)})


def _check_step(step: HttpStep, response: HttpResponse, secrets: _Secrets, details: ProbeDetails) -> Mapping[str, str]:
    found: Mapping[str, str] = {}
    if step.keep or step.expect.reads_body:
        response = decode_unless_refused(step, step.expect.status, response, details)
    if step.keep:
        text = recode_as_utf8(response.header("content-type"), response.body)
        found = find_texts(step.keep, response.header, text)
    secrets.add(found.values())  # before they could be shown here
    secrets.check()
    check_response(step, step.expect, response, details)
    missing = [name for name in step.keep if name not in found]
    if missing:
        raise ProbeFailure("body", f"the response has no text or number for {missing[0]}")
    return found


async def examine(options: HttpRequestOptions, response: HttpResponse, check: Callable[[], T], *, has_json: bool) -> T:
    """Return what `check` returns: it runs in a thread if the body is long or encoded, so as not to delay others."""
    is_long = len(response.body) > (LONG_JSON if has_json else LONG_BODY)
    if is_long or (response.body and response.header("content-encoding") is not None):
        return await run_in_thread(options.request.host, check)
    return check()


def decode_unless_refused(
    options: HttpRequestOptions, expected: list[tuple[int, int]], response: HttpResponse, details: ProbeDetails
) -> HttpResponse:
    """Return the response with its body decoded. Raises ProbeFailure, but not if the status code is not as expected.

    Then the status code is the failure to report.
    """
    try:
        return decode(response, options, details)
    except ProbeFailure:
        if _is_expected(response.status, expected):
            raise
        return response


def _is_expected(status: int, expected: list[tuple[int, int]]) -> bool:
    return any(low <= status <= high for low, high in expected)


def check_status(
    options: HttpRequestOptions, expected: list[tuple[int, int]], response: HttpResponse, details: ProbeDetails
) -> None:
    """Raise ProbeFailure unless the status code is in one of the expected ranges."""
    status = response.status
    if _is_expected(status, expected):
        return
    sends_credentials = options.sends_credentials or (
        status == 407 and options.proxy is not None and options.proxy.sent_headers  # noqa: PLR2004 - HTTP status code
    )
    refused = status in (401, 403, 407) and sends_credentials
    ranges = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in expected)
    body = f"; the body begins with {quote_excerpt(response.body, details)}" if response.body else ""
    raise ProbeFailure("auth" if refused else "status", f"answered {status}, expected {ranges}{body}")


def check_response(
    options: HttpRequestOptions, expect: HttpExpect, response: HttpResponse, details: ProbeDetails
) -> None:
    """Check a response. Raises ProbeFailure. Its body is decoded, unless nothing is expected of it."""
    check_status(options, expect.status, response, details)
    if expect.http_version and response.version not in expect.http_version:
        versions = " or ".join(expect.http_version)
        raise ProbeFailure("protocol", f"answered with HTTP/{response.version}, expected {versions}")
    if expect.tls is not None and expect.tls != response.secure:
        received, expected = ("with", "without") if response.secure else ("without", "with")
        raise ProbeFailure("tls", f"answered {received} TLS, expected an answer {expected} TLS")
    for name, header_expect in expect.headers.items():
        _check_header(name, header_expect, response.header_values(name), details)
    if expect.reads_body:
        text = recode_as_utf8(response.header("content-type"), response.body)
        check_matches(expect.body_matches, text, "the body", details)
        check_lacks(expect.body_lacks, text, "the body", details)
        if expect.json_:
            check_json(expect.json_, parse_json(text), details)
    if expect.faster_than is not None and response.duration > expect.faster_than:
        raise ProbeFailure("latency", f"took {response.duration:.3f} s, expected less than {expect.faster_than:g} s")


def _check_header(name: str, expect: HeaderExpect, values: list[str], details: ProbeDetails) -> None:
    """Raise ProbeFailure unless a value matches each of `matches`, and no value matches any of `lacks`."""
    if not values:
        if expect.optional:
            return
        raise ProbeFailure("header", f"the header {name} is missing")
    texts = [value.encode() for value in values]
    for pattern in expect.matches:
        if not any(map(compile_cached(pattern).search, texts)):
            shown = " and ".join(quote_excerpt(text, details) for text in texts[:VALUES_SHOWN])
            raise ProbeFailure("header", f"the header {name} is {shown}, expected to match {pattern!r}")
    for pattern in expect.lacks:
        if (found := next(filter(compile_cached(pattern).search, texts), None)) is not None:
            shown = quote_excerpt(found, details)
            raise ProbeFailure("header", f"the header {name} is {shown}, expected not to match {pattern!r}")


HTTP = ProbeKind(HttpProbeOptions, probe_http)
