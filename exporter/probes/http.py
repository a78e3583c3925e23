"""The `http` probe: one request over a connection of our own, its answer held against what is expected."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import (
    JsonExpect,
    apart,
    compiled,
    excerpt,
    judge_json,
    lacks,
    matches,
    parse_json,
    utf8,
)
from exporter.probes.net.http_client import LONG, Answer, fetch
from exporter.probes.net.http_request import BodyOptions, HeaderName, RequestOptions
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Pattern, Patterns, PositiveDuration, as_list

LONG_JSON = 4 * 1024  # bytes: a path may look at much of it, again and again


def _statuses(value: object) -> list[tuple[int, int]]:
    """`200`, `2xx`, `200-299`, or a list of these, as inclusive ranges."""
    found = []
    for item in as_list(value):  # type: ignore[attr-defined] # always a list
        text = str(item)
        low, _, high = text.partition("-")
        if text[1:] == "xx" and text[:1] in "12345":
            found.append((int(text[0]) * 100, int(text[0]) * 100 + 99))
        elif low.isdigit() and (not high or high.isdigit()) and 100 <= int(low) <= int(high or low) <= 599:  # noqa: PLR2004
            found.append((int(low), int(high or low)))
        else:
            raise ValueError(f"{text} is not a status (write 200, 2xx or 200-299)")
    return found


class HeaderExpect(ConfigModel):
    """What a header must be; `optional` lets it be missing."""

    matches: Pattern | None = None
    lacks: Pattern | None = None
    optional: bool = False


def _header(value: object) -> object:
    return {"matches": value} if isinstance(value, str) else value


Version = Literal["1.0", "1.1"]
Versions = Annotated[list[Version], BeforeValidator(as_list, json_schema_input_type=Version | list[Version])]


class HttpExpect(ConfigModel):
    status: Annotated[
        list[tuple[int, int]],
        Field(min_length=1),
        BeforeValidator(_statuses, json_schema_input_type=Any),
        PlainSerializer(lambda ranges: [f"{low}-{high}" for low, high in ranges]),
    ] = [(200, 299)]
    http_version: Versions = []
    tls: bool | None = None
    headers: dict[
        HeaderName, Annotated[HeaderExpect, BeforeValidator(_header, json_schema_input_type=str | HeaderExpect)]
    ] = Field(default_factory=dict)
    body_matches: Patterns = []
    body_lacks: Patterns = []
    json_: JsonExpect = Field(default_factory=dict, alias="json")
    faster_than: PositiveDuration | None = None


class HttpOptions(BodyOptions):
    expect: HttpExpect = HttpExpect()


async def probe_http(options: HttpOptions, _means: Means, seen: Seen) -> None:
    await judged(options, options.expect, await fetch(options, seen), seen)


async def judged(options: RequestOptions, expect: HttpExpect, answer: Answer, seen: Seen) -> None:
    """Hold an answer against what is expected; a long body does not hold up the other probes. Raises ProbeFailure."""
    if len(answer.body) > (LONG_JSON if expect.json_ else LONG):
        await apart(_judge, options, expect, answer, seen)
    else:
        _judge(options, expect, answer, seen)


def judge_status(options: RequestOptions, expected: list[tuple[int, int]], answer: Answer, seen: Seen) -> None:
    """Raise ProbeFailure unless the status is one of the expected ranges."""
    status = answer.status
    if any(low <= status <= high for low, high in expected):
        return
    sent = options.sends_credentials or (status == 407 and options.proxy is not None and options.proxy.sent)  # noqa: PLR2004
    refused = status in (401, 403, 407) and sent
    wanted = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in expected)
    began = f"; the body begins {excerpt(answer.body, seen)}" if answer.body else ""
    raise ProbeFailure("auth" if refused else "status", f"answered {status}, expected {wanted}{began}")


def _judge(options: RequestOptions, expect: HttpExpect, answer: Answer, seen: Seen) -> None:
    judge_status(options, expect.status, answer, seen)
    if expect.http_version and answer.version not in expect.http_version:
        wanted = " or ".join(expect.http_version)
        raise ProbeFailure("protocol", f"answered with HTTP/{answer.version}, expected {wanted}")
    if expect.tls is not None and expect.tls != answer.secure:
        came, wanted = ("with TLS", "without") if answer.secure else ("without TLS", "with")
        raise ProbeFailure("tls", f"the answer came {came}, expected {wanted}")
    for name, wanted_of in expect.headers.items():
        _judge_header(name, wanted_of, answer.header(name), seen)
    if expect.body_matches or expect.body_lacks or expect.json_:
        text = utf8(answer.header("content-type"), answer.body)
        matches(expect.body_matches, text, "the body", seen)
        lacks(expect.body_lacks, text, "the body", seen)
        if expect.json_:
            judge_json(expect.json_, parse_json(text), seen)
    if expect.faster_than is not None and answer.took > expect.faster_than:
        raise ProbeFailure("latency", f"took {answer.took:.3f} s, expected less than {expect.faster_than:g} s")


def _judge_header(name: str, wanted: HeaderExpect, value: str | None, seen: Seen) -> None:
    if value is None:
        if wanted.optional:
            return
        raise ProbeFailure("header", f"the header {name} is missing")
    text = value.encode()
    if wanted.matches is not None and compiled(wanted.matches).search(text) is None:
        raise ProbeFailure("header", f"the header {name} is {excerpt(text, seen)}, expected {wanted.matches!r}")
    if wanted.lacks is not None and compiled(wanted.lacks).search(text) is not None:
        raise ProbeFailure("header", f"the header {name} is {excerpt(text, seen)}, expected no {wanted.lacks!r}")


HTTP = Kind(HttpOptions, probe_http)
