"""HTTP requests: their options, and their bytes."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, field_validator, model_validator
from yarl import URL

from exporter.probes.expectations import quote_excerpt
from exporter.probes.net.connections import DialOptions
from exporter.probes.net.tls_contexts import ProbeTls
from exporter.probes.net.urls import check_host, connectable_host, request_target, resolve_reference, without_zone
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import (
    REFERENCES_ARE_SECRET,
    BasicAuth,
    ChoiceModel,
    ConfigModel,
    Endpoint,
    ExistingFile,
    HttpAuth,
    Url,
)
from fleet.inventory.units import Size
from runtime import VERSION
from runtime.addresses import NAME_LIMIT, has_long_host

_RESERVED_HEADERS = (
    "content-length",
    "transfer-encoding",
    "connection",
    "upgrade",
    "sec-websocket-key",
    "sec-websocket-version",
)
LOCATION_LIMIT = 8192  # characters of the URL of a redirect
_DEFAULT_HEADERS = {"User-Agent": f"defib/{VERSION}", "Accept": "*/*"}
TOKEN = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"  # noqa: S105 - the syntax of names in RFC 9110, not a secret
RequestUrl = Annotated[Url, AfterValidator(check_host)]
RequestHeaderName = Annotated[str, Field(pattern=TOKEN)]


def _check_headers(headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """Refuse headers that the client sets, and values that would end the header."""
    for name, value in headers.items():
        if name.lower() in _RESERVED_HEADERS:
            raise ValueError(f"the header {name} cannot be set: the exporter sets it")
        if any(character in value.get_secret_value() for character in "\r\n\0"):
            raise ValueError(f"the header {name} must be a single line")
    return headers


Headers = Annotated[dict[RequestHeaderName, SecretStr], AfterValidator(_check_headers)]


@dataclass(slots=True)
class _CachedToken:
    """A cached token. It does not count in comparisons, so that options with and without one are equal."""

    token: str = field(default="", compare=False)
    expires_at: float = field(default=0.0, compare=False)  # monotonic clock


class OAuth2(ConfigModel):
    """OAuth 2 client credentials (RFC 6749, 4.4); the token is cached until it expires or is refused."""

    token_url: Endpoint
    client_id: str
    client_secret: SecretStr
    scopes: list[str] = []
    endpoint_params: dict[str, SecretStr] = Field(default_factory=dict)
    _cached: _CachedToken = PrivateAttr(default_factory=_CachedToken)

    @field_validator("token_url")
    @classmethod
    def _no_auth(cls, token_url: Endpoint) -> Endpoint:
        if token_url.auth is not None:
            raise ValueError("must not have auth: client_id and client_secret are sent")
        return token_url

    @property
    def cached_token(self) -> str | None:
        """The cached token, None if there is none or it has expired."""
        return self._cached.token if self._cached.token and time.monotonic() < self._cached.expires_at else None

    def cache_token(self, token: str, lifetime: float) -> None:
        """Cache a token for its `lifetime` in seconds, less a margin for the duration of a probe."""
        self._cached.token, self._cached.expires_at = token, time.monotonic() + max(lifetime - 30, lifetime / 2)

    def drop_token(self) -> None:
        self._cached.token = ""


class TokenAuth(HttpAuth):
    choices: ClassVar[tuple[str, ...]] = ("basic", "bearer", "bearer_file")
    bearer_file: ExistingFile | None = None  # read for each probe


class ProbeAuth(TokenAuth):
    choices = ("basic", "bearer", "bearer_file", "oauth2")
    oauth2: OAuth2 | None = None


class HttpProxy(Endpoint):
    """An HTTP proxy; `headers` are sent to the proxy only."""

    url: RequestUrl
    tls: ProbeTls = ProbeTls()
    headers: Headers = Field(default_factory=dict)

    @cached_property
    def sent_headers(self) -> dict[str, str]:
        """The headers that are sent to the proxy."""
        authorization = {"Proxy-Authorization": format_authorization(self.auth)} if self.auth else {}
        return authorization | {name: value.get_secret_value() for name, value in self.headers.items()}


class UploadedFile(ChoiceModel):
    choices: ClassVar[tuple[str, ...]] = ("path", "content")
    path: ExistingFile | None = None
    content: Annotated[str | None, REFERENCES_ARE_SECRET] = None
    filename: str | None = None
    content_type: str = "application/octet-stream"
    _version: tuple[int, int] | None = PrivateAttr(None)

    def model_post_init(self, _context: Any) -> None:
        """Record the version of the file, so that a reload notices that its content has changed."""
        if isinstance(self.path, Path) and self.path.is_file():
            stat = self.path.stat()
            self._version = (stat.st_mtime_ns, stat.st_size)


def _version_as_text(value: object) -> object:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


class HttpRequestOptions(DialOptions):
    """The options that all HTTP probes share."""

    url: RequestUrl
    headers: Headers = Field(default_factory=dict)
    auth: ProbeAuth | None = None
    follow_redirects: bool = True
    tls: ProbeTls = ProbeTls()
    proxy: HttpProxy | None = None
    strict: bool = False
    version: Annotated[
        Literal["1.1", "2", "auto"], BeforeValidator(_version_as_text, json_schema_input_type=str | float)
    ] = "1.1"
    max_body: Size = 10 * 1024 * 1024

    @model_validator(mode="after")
    def _check_version(self) -> "HttpRequestOptions":
        if self.version == "2" and self.proxy is not None:
            raise ValueError('version: "2" cannot be used through a proxy')
        return self

    @property
    def request_url(self) -> str:
        """The URL of the request."""
        return self.url

    @property
    def verb(self) -> str:
        return "GET"

    @property
    def credentials(self) -> ProbeAuth | None:
        return self.auth

    @cached_property
    def content(self) -> tuple[bytes, str]:
        """The request's body and its content type."""
        return b"", ""

    @cached_property
    def request(self) -> "HttpRequest":
        """The request to the configured URL, without an OAuth 2 token."""
        body, content_type = self.content
        headers = {name.lower(): (name, value) for name, value in _DEFAULT_HEADERS.items()}
        if body:
            headers["content-type"] = ("Content-Type", content_type)
        auth = self.credentials
        if auth is not None and auth.kind in ("basic", "bearer"):
            headers["authorization"] = ("Authorization", format_authorization(auth))
        # Configured headers replace the default ones, whatever their case; an empty one removes the default.
        defaults = set(headers)
        headers |= {name.lower(): (name, value.get_secret_value()) for name, value in self.headers.items()}
        sent = dict(each for name, each in headers.items() if each[1] or name not in defaults)
        return HttpRequest(self.request_url, self.verb, sent, body, self.proxy)

    @cached_property
    def token_options(self) -> "HttpRequestOptions":
        """The options of a request for a token: the same connection options, with the TLS options of its own URL."""
        endpoint = self.auth.options.token_url if self.auth else Endpoint(url=self.url)
        tls = ProbeTls.model_validate(endpoint.tls.model_dump())
        dial = {"ip": self.ip, "source": self.source, "resolver": self.resolver}
        return HttpRequestOptions(url=endpoint.url, tls=tls, proxy=self.proxy, strict=self.strict, **dial)

    @property
    def sends_credentials(self) -> bool:
        return self.credentials is not None or any(name.lower() in ("authorization", "cookie") for name in self.headers)


class HttpBodyOptions(HttpRequestOptions):
    """The options of a request with a method and a body."""

    method: Annotated[str, Field(pattern=TOKEN)] = "GET"
    body: Annotated[str | None, REFERENCES_ARE_SECRET] = None
    json_: Annotated[Any, REFERENCES_ARE_SECRET] = Field(None, alias="json")
    form: Annotated[dict[str, str] | None, REFERENCES_ARE_SECRET] = None
    files: dict[str, UploadedFile] | None = None

    @model_validator(mode="after")
    def _one_body(self) -> "HttpBodyOptions":
        bodies = [name for name in ("body", "json", "files") if name.replace("json", "json_") in self.model_fields_set]
        if self.form is not None and self.files is None:
            bodies.append("form")
        if len(bodies) > 1:
            raise ValueError(f"{' and '.join(bodies)} exclude each other (only form and files can be combined)")
        if "json_" in self.model_fields_set:
            try:
                json.dumps(self.json_, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"json: {error}") from None
        return self

    @property
    def verb(self) -> str:
        return self.method

    @cached_property
    def content(self) -> tuple[bytes, str]:
        """The request's body and its content type. Reads the files at the first access."""
        if self.files is not None:
            return _encode_multipart(self.form or {}, self.files)
        if self.form is not None:
            return _encode_form(self.form), "application/x-www-form-urlencoded"
        if "json_" in self.model_fields_set:
            return json.dumps(self.json_, ensure_ascii=False).encode(), "application/json"
        return (self.body or "").encode(), "text/plain; charset=utf-8"


def build_token_request(oauth2: OAuth2, proxy: HttpProxy | None, *, credentials_in_body: bool) -> "HttpRequest":
    """Build the request for a token, with the client credentials in the body or in a header."""
    params = {name: value.get_secret_value() for name, value in oauth2.endpoint_params.items()}
    form = {"grant_type": "client_credentials", **params}
    if oauth2.scopes:
        form["scope"] = " ".join(oauth2.scopes)
    headers = {"User-Agent": f"defib/{VERSION}", "Accept": "application/json"}
    if credentials_in_body:
        form |= {"client_id": oauth2.client_id, "client_secret": oauth2.client_secret.get_secret_value()}
    else:
        secret = SecretStr(quote(oauth2.client_secret.get_secret_value()))
        credentials = BasicAuth(username=quote(oauth2.client_id), password=secret)
        headers["Authorization"] = f"Basic {credentials.encoded}"
    headers["Content-Type"] = "application/x-www-form-urlencoded"
    return HttpRequest(oauth2.token_url.url, "POST", headers, _encode_form(form), proxy)


def with_server_name(tls: ProbeTls, host_header: str | None) -> ProbeTls:
    """Return TLS options with the host of a `Host` header as the server's name, unless they have one."""
    if host_header is None or tls.server_name is not None:
        return tls
    name = re.sub(r":[0-9]*$", "", host_header.strip()).strip("[]")
    return tls.model_copy(update={"server_name": name or None})


def _encode_form(fields: Mapping[str, str]) -> bytes:
    return URL.build(query=fields).raw_query_string.encode()


def format_authorization(auth: HttpAuth) -> str:
    """Return the value of the Authorization header for basic or bearer credentials."""
    if auth.basic is not None:
        return f"Basic {auth.basic.encoded}"
    return f"Bearer {auth.options.get_secret_value()}"


def _encode_multipart(form: Mapping[str, str], files: Mapping[str, UploadedFile]) -> tuple[bytes, str]:
    """Encode a multipart/form-data body (RFC 7578); return it and its content type."""
    boundary = f"defib{secrets.token_hex(16)}"
    parts = []
    for name, value in form.items():
        parts.append(_encode_part(boundary, f'name="{_escape_name(name)}"', "", value.encode()))
    for name, file in files.items():
        path = file.path
        content = path.read_bytes() if path is not None else (file.content or "").encode()
        filename = file.filename or (path.name if path is not None else name)
        disposition = f'name="{_escape_name(name)}"; filename="{_escape_name(filename)}"'
        parts.append(_encode_part(boundary, disposition, f"Content-Type: {file.content_type}\r\n", content))
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _encode_part(boundary: str, disposition: str, headers: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n{headers}\r\n"
    return head.encode() + content + b"\r\n"


def _escape_name(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


class HttpRequest:
    """A request, and its bytes in `data`. `written_url` is sent as it is written, `url` is normalized."""

    __slots__ = (
        "body", "data", "headers", "host", "host_header", "method", "port", "proxy", "secure", "url", "written_url"
    )  # fmt: skip

    def __init__(
        self, written_url: str, method: str, headers: Mapping[str, str], body: bytes, proxy: HttpProxy | None = None
    ) -> None:
        """Raises ValueError and IndexError, as yarl does, if the URL is not valid."""
        self.written_url, self.method, self.headers, self.body, self.proxy = written_url, method, headers, body, proxy
        self.url = url = URL(written_url)
        self.host = connectable_host(url)
        self.secure = url.scheme == "https"
        self.port = url.port or (443 if self.secure else 80)
        self.host_header = next((value for name, value in headers.items() if name.lower() == "host"), None)
        target = request_target(written_url)
        authority = without_zone(url.host_port_subcomponent or "")
        if proxy and not self.secure:
            target, headers = f"http://{authority}{target}", {**headers, **proxy.sent_headers}
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host_header or authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "host"]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        lines.append("Connection: close")
        self.data = "\r\n".join([*lines, "", ""]).encode() + body

    @property
    def http2_headers(self) -> list[tuple[str, str]]:
        """The headers of the request in HTTP/2 (RFC 9113, 8.3.1)."""
        authority = self.host_header or without_zone(self.url.host_port_subcomponent or "")
        length = [("content-length", f"{len(self.body)}")] if self.body else []
        return [
            (":method", self.method),
            (":scheme", self.url.scheme),
            (":authority", authority),
            (":path", request_target(self.written_url)),
            *((name.lower(), value) for name, value in self.headers.items() if name.lower() != "host"),
            *length,
        ]

    def redirected(self, status: int, location: str, details: ProbeDetails) -> "HttpRequest":
        """Return the request that follows a redirect (RFC 9110, 15.4). Raises ProbeFailure.

        Configured headers, any of which may be a credential, are not sent to another origin. A request that could
        change something there is refused.
        """
        if len(location) > LOCATION_LIMIT:
            raise ProbeFailure("protocol", f"redirected to a URL that is longer than {LOCATION_LIMIT} characters")
        if has_long_host(location):
            raise ProbeFailure("protocol", f"redirected to a host whose name is longer than {NAME_LIMIT} characters")
        written_url = resolve_reference(self.written_url, location)
        try:
            url = URL(written_url)
            valid = url.scheme in ("http", "https") and bool(url.host) and url.port != 0
        except (ValueError, IndexError):  # yarl raises either
            url, valid = URL(), False
        if not valid:
            raise ProbeFailure(
                "protocol", f"redirected to {quote_excerpt(location.encode(), details)}, which is not a URL"
            )
        headers = dict(self.headers)
        if url.origin() != self.url.origin():
            if self.body or self.method not in ("GET", "HEAD"):
                sent = f"a {self.method} request{' with a body' if self.body else ''}"
                origin = quote_excerpt(str(url.origin()).encode(), details)
                raise ProbeFailure("redirect", f"the redirect of {sent} to another origin, {origin}, is refused")
            headers = dict(_DEFAULT_HEADERS)
        if status == 303 or (status in (301, 302) and self.method == "POST"):  # noqa: PLR2004 - HTTP status codes
            headers = {k: v for k, v in headers.items() if k.lower() != "content-type"}
            return HttpRequest(written_url, "HEAD" if self.method == "HEAD" else "GET", headers, b"", self.proxy)
        return HttpRequest(written_url, self.method, headers, self.body, self.proxy)

    def with_cookies(self, cookies: Mapping[str, str]) -> "HttpRequest":
        """Return the same request with additional cookies."""
        configured = [value for name, value in self.headers.items() if name.lower() == "cookie"]
        pairs = [*configured, *(f"{name}={value}" for name, value in cookies.items())]
        return self.with_header("Cookie", "; ".join(pairs)) if pairs else self

    def with_header(self, name: str, value: str) -> "HttpRequest":
        """Return the same request with one header added or replaced."""
        others = {key: old for key, old in self.headers.items() if key.lower() != name.lower()}
        return HttpRequest(self.written_url, self.method, {**others, name: value}, self.body, self.proxy)
