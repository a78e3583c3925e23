"""The `http` probe: one request over a connection of our own, each phase timed.

httptools (llhttp) parses; everything else is bytes, because this is what the exporter spends its time on.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

import httptools
from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr, field_validator, model_validator
from yarl import URL

from exporter.probes.connecting import connect, context_for
from exporter.probes.matching import compiled, excerpt, lacks, matches
from exporter.results import ProbeFailure, Seen
from fleet.endpoints import Auth, ExistingFile, OneOf, Part, Tls, Url
from fleet.shells import Shell
from fleet.units import Pattern, Patterns, PositiveDuration, Size, as_list
from runtime import VERSION

REDIRECTS = 10
HEAD_LIMIT = 256 * 1024
_OURS = ("content-length", "transfer-encoding", "connection")
_HARMLESS = ("user-agent", "accept", "content-type")
_TOKEN = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"  # noqa: S105 - RFC 9110 calls a method's or header's name a token
HeaderName = Annotated[str, Field(pattern=_TOKEN)]


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


class HttpExpect(Part):
    status: Annotated[
        list[tuple[int, int]],
        Field(min_length=1),
        BeforeValidator(_statuses, json_schema_input_type=Any),
        PlainSerializer(lambda ranges: [f"{low}-{high}" for low, high in ranges]),
    ] = [(200, 299)]
    body_matches: Patterns = []
    body_lacks: Patterns = []
    headers: dict[HeaderName, Pattern] = Field(default_factory=dict)
    faster_than: PositiveDuration | None = None


class File(OneOf):
    choices: ClassVar[tuple[str, ...]] = ("path", "content")
    path: ExistingFile | None = None
    content: str | None = None
    filename: str | None = None
    content_type: str = "application/octet-stream"


class HttpOptions(Part):
    url: Url
    method: Annotated[str, Field(pattern=_TOKEN)] = "GET"
    headers: dict[HeaderName, SecretStr] = Field(default_factory=dict)
    body: str | None = None
    json_: Any = Field(None, alias="json")
    form: dict[str, str] | None = None
    files: dict[str, File] | None = None
    auth: Auth | None = None
    follow_redirects: bool = True
    tls: Tls = Tls()
    max_body: Size = 10 * 1024 * 1024
    expect: HttpExpect = HttpExpect()

    @model_validator(mode="after")
    def _one_body(self) -> "HttpOptions":
        given = [name for name in ("body", "json", "files") if name.replace("json", "json_") in self.model_fields_set]
        if self.form is not None and self.files is None:
            given.append("form")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other (only form may join files)")
        if "json_" in self.model_fields_set:
            try:
                json.dumps(self.json_)
            except (TypeError, ValueError) as error:
                raise ValueError(f"json: {error}") from None
        return self

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            if name.lower() in _OURS:
                raise ValueError(f"the header {name} is ours to set")
            if any(character in value.get_secret_value() for character in "\r\n\0"):
                raise ValueError(f"the header {name} is more than one line")
        return headers

    @cached_property
    def content(self) -> tuple[bytes, str]:
        """The request's body and its content type; reads the files once."""
        if self.files is not None:
            return _multipart(self.form or {}, self.files)
        if self.form is not None:
            return URL.build(query=self.form).raw_query_string.encode(), "application/x-www-form-urlencoded"
        if "json_" in self.model_fields_set:
            return json.dumps(self.json_, ensure_ascii=False).encode(), "application/json"
        return (self.body or "").encode(), "text/plain; charset=utf-8"

    @cached_property
    def first(self) -> "Request":
        """The request as it is sent to `url`."""
        body, content_type = self.content
        headers = {"user-agent": ("User-Agent", f"defib/{VERSION}"), "accept": ("Accept", "*/*")}
        if body:
            headers["content-type"] = ("Content-Type", content_type)
        if self.auth is not None:
            headers["authorization"] = ("Authorization", _authorization(self.auth))
        # Whatever the user says stands in place of ours, however it is spelled.
        headers |= {name.lower(): (name, value.get_secret_value()) for name, value in self.headers.items()}
        return Request(URL(self.url), self.method, dict(headers.values()), body)


def _authorization(auth: Auth) -> str:
    if auth.basic is not None:
        return f"Basic {auth.basic.encoded}"
    return f"Bearer {auth.options.get_secret_value()}"


def _multipart(form: Mapping[str, str], files: Mapping[str, File]) -> tuple[bytes, str]:
    """A multipart/form-data body (RFC 7578) and its content type."""
    boundary = f"defib{secrets.token_hex(16)}"
    parts = []
    for name, value in form.items():
        parts.append(_part(boundary, f'name="{_quoted(name)}"', "", value.encode()))
    for name, file in files.items():
        path = file.path
        content = path.read_bytes() if path is not None else (file.content or "").encode()
        filename = file.filename or (path.name if path is not None else name)
        disposition = f'name="{_quoted(name)}"; filename="{_quoted(filename)}"'
        parts.append(_part(boundary, disposition, f"Content-Type: {file.content_type}\r\n", content))
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _part(boundary: str, disposition: str, headers: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n{headers}\r\n"
    return head.encode() + content + b"\r\n"


def _quoted(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


class Request:
    """A request and the bytes of it."""

    __slots__ = ("body", "data", "headers", "host", "method", "port", "secure", "url")

    def __init__(self, url: URL, method: str, headers: Mapping[str, str], body: bytes) -> None:
        self.url, self.method, self.headers, self.body = url, method, headers, body
        self.host = url.raw_host or ""
        self.secure = url.scheme == "https"
        self.port = url.port or (443 if self.secure else 80)
        own_host = next((value for name, value in headers.items() if name.lower() == "host"), None)
        lines = [f"{method} {url.raw_path_qs or '/'} HTTP/1.1", f"Host: {own_host or url.host_port_subcomponent}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "host"]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        lines.append("Connection: close")
        self.data = "\r\n".join([*lines, "", ""]).encode() + body

    def redirected(self, status: int, location: str) -> "Request":
        """The request that follows a redirect (RFC 9110, 15.4); credentials stay with their origin."""
        try:
            url = self.url.join(URL(location))
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise ProbeFailure("protocol", f"redirected to {location[:200]!r}, which is no URL")
        headers = dict(self.headers)
        if url.origin() != self.url.origin():
            # Any header of the user's may be a credential.
            headers = {name: value for name, value in headers.items() if name.lower() in _HARMLESS}
        if status == 303 or (status in (301, 302) and self.method == "POST"):  # noqa: PLR2004
            headers = {k: v for k, v in headers.items() if k.lower() != "content-type"}
            return Request(url, "HEAD" if self.method == "HEAD" else "GET", headers, b"")
        return Request(url, self.method, headers, self.body)


class Exchange(asyncio.Protocol):
    """One response, read to its end; `done` is None when it is whole, or the failure it ended with."""

    def __init__(self, method: str, max_body: int, seen: Seen) -> None:
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.status = 0
        self.first_byte: float | None = None
        self.done: asyncio.Future[ProbeFailure | None] = asyncio.get_running_loop().create_future()
        self._seen = seen
        self._method = method
        self._max_body = max_body
        self._head = 0  # bytes of headers and trailers
        self._unparsed = 0  # bytes of a head that has not ended
        self._framed = False  # the response itself tells where it ends
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        if self.first_byte is None:
            self.first_byte = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end(None)
        except httptools.HttpParserError as error:
            began = excerpt(data, self._seen)
            self._end(ProbeFailure("protocol", f"the answer is not HTTP: {error}; it begins {began}"))
        # The parser tells of a name or value only once it has ended.
        self._unparsed = 0 if self.status_known else self._unparsed + len(data)
        self._bound_head(self._unparsed)

    def _bound_head(self, size: int) -> None:
        if size > HEAD_LIMIT:
            self._end(ProbeFailure("protocol", f"the response's headers are longer than {HEAD_LIMIT} bytes"))

    @property
    def status_known(self) -> bool:
        return self.status != 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.done.done():
            return  # what follows the answer is none of it
        self._head += len(name) + len(value)
        self._bound_head(self._head)
        if not self.status_known:  # trailers count, and tell nothing
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        status = int(self._parser.get_status_code())
        if self.done.done():
            return
        if status < 200 and status != 101:  # noqa: PLR2004 - an interim answer; the real one follows
            self.headers.clear()
            return
        self.status = status
        self._framed = any(
            name == "content-length" or (name == "transfer-encoding" and "chunked" in value.lower())
            for name, value in self.headers
        )
        if self._method == "HEAD":
            self._end(None)

    def on_body(self, data: bytes) -> None:
        if self.done.done():
            return
        self.body += data
        if len(self.body) > self._max_body:
            self._end(ProbeFailure("body", f"the body is longer than max_body, {self._max_body} bytes"))

    def on_message_complete(self) -> None:
        if self.status_known:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if self.status_known and not self._framed and error is None:
            self._end(None)  # a body without a length ends with its connection
        elif self.status_known:
            self._end(ProbeFailure("protocol", f"the body was cut short after {len(self.body)} bytes"))
        elif self.first_byte is not None:
            self._end(ProbeFailure("protocol", "the connection was closed in the middle of the headers"))
        else:
            why = getattr(error, "strerror", None) or "closed"
            self._end(ProbeFailure("protocol", f"the connection was lost before any answer: {str(why).lower()}"))

    def _end(self, failure: ProbeFailure | None) -> None:
        if not self.done.done():
            self.done.set_result(failure)

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name.lower()]
        return ", ".join(values) if values else None


async def probe_http(options: HttpOptions, _timeout: float, seen: Seen, _shell: Callable[[], Shell]) -> None:
    started = time.perf_counter()
    if options.files is not None:
        await asyncio.to_thread(lambda: options.first)
    request = options.first
    exchange = await _exchange(request, options, seen)
    redirects = 0
    while options.follow_redirects and exchange.status in (301, 302, 303, 307, 308):
        location = exchange.header("location")
        if location is None:
            break
        redirects += 1
        if redirects > REDIRECTS:
            raise ProbeFailure("protocol", f"redirected more than {REDIRECTS} times, last to {location[:200]}")
        request = request.redirected(exchange.status, location)
        exchange = await _exchange(request, options, seen)
    _judge(options, exchange, seen, time.perf_counter() - started)


_NOT_FOR_OTHERS = {"server_name": None, "cert_file": None, "key_file": None}


async def _exchange(request: Request, options: HttpOptions, seen: Seen) -> Exchange:
    own = request.url.origin() == options.first.url.origin()
    tls = options.tls if own else options.tls.model_copy(update=_NOT_FOR_OTHERS)
    context = context_for(tls) if request.secure else None
    transport, exchange = await connect(
        request.host,
        request.port,
        lambda: Exchange(request.method, options.max_body, seen),
        seen,
        context,
        tls.server_name or request.host,
    )
    sent = time.perf_counter()
    try:
        transport.write(request.data)
        failure = await exchange.done
    finally:
        transport.abort()
        ended = time.perf_counter()
        first = exchange.first_byte or ended
        seen.phases["processing"] = seen.phases.get("processing", 0.0) + first - sent
        seen.phases["transfer"] = seen.phases.get("transfer", 0.0) + ended - first
    seen.status_code = exchange.status or None
    if failure is not None:
        raise failure
    return exchange


def _judge(options: HttpOptions, exchange: Exchange, seen: Seen, took: float) -> None:
    """Hold the answer against what is expected. Raises ProbeFailure."""
    expect = options.expect
    status = exchange.status
    body = bytes(exchange.body)
    seen.evidence["headers"] = exchange.headers
    seen.evidence["body"] = body[:1000]
    if not any(low <= status <= high for low, high in expect.status):
        sends_credentials = options.auth is not None or any(n.lower() == "authorization" for n in options.headers)
        refused = status in (401, 403, 407) and sends_credentials
        wanted = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in expect.status)
        what = f"answered {status}, expected {wanted}"
        raise ProbeFailure(
            "auth" if refused else "status", f"{what}; the body begins {excerpt(body, seen)}" if body else what
        )
    for name, pattern in expect.headers.items():
        value = exchange.header(name)
        if value is None:
            raise ProbeFailure("header", f"the header {name} is missing, expected to match {pattern!r}")
        if compiled(pattern).search(value.encode()) is None:
            raise ProbeFailure("header", f"the header {name} is {excerpt(value.encode(), seen)}, expected {pattern!r}")
    if expect.body_matches or expect.body_lacks:
        text = _utf8(exchange.header("content-type"), body)
        matches(expect.body_matches, text, "the body", seen)
        lacks(expect.body_lacks, text, "the body", seen)
    if expect.faster_than is not None and took > expect.faster_than:
        raise ProbeFailure("latency", f"took {took:.3f} s, expected less than {expect.faster_than:g} s")


def _utf8(content_type: str | None, body: bytes) -> bytes:
    """The body as UTF-8, which is what patterns are matched against."""
    _, found, charset = (content_type or "").lower().partition("charset=")
    charset = charset.split(";")[0].strip(" \"'") if found else "utf-8"
    if charset in ("utf-8", "utf8", "us-ascii"):
        charset = "utf-8"
    try:
        return body.decode(charset, "replace").encode()
    except (LookupError, UnicodeError):  # no charset, or none that a web page has
        return body.decode("utf-8", "replace").encode()
