"""HTTP requests: what may be asked for, and the bytes of it."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.cookies import BaseCookie
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, field_validator, model_validator
from yarl import URL

from exporter.probes.expectations import excerpt
from exporter.probes.net.connections import Dial, ProbeTls
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import BasicAuth, ChoiceModel, ConfigModel, Endpoint, ExistingFile, HttpAuth, Url
from fleet.inventory.units import Size
from runtime import VERSION

_OURS = ("content-length", "transfer-encoding", "connection", "upgrade", "sec-websocket-key", "sec-websocket-version")
_DEFAULT_HEADERS = {"User-Agent": f"defib/{VERSION}", "Accept": "*/*"}
TOKEN = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"  # noqa: S105 - RFC 9110 calls a method's or header's name a token
HeaderName = Annotated[str, Field(pattern=TOKEN)]


def _sendable(headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """Refuse headers that would be another request, or that only we can know."""
    for name, value in headers.items():
        if name.lower() in _OURS:
            raise ValueError(f"the header {name} is ours to set")
        if any(character in value.get_secret_value() for character in "\r\n\0"):
            raise ValueError(f"the header {name} is more than one line")
    return headers


Headers = Annotated[dict[HeaderName, SecretStr], AfterValidator(_sendable)]


@dataclass(slots=True)
class _Kept:
    """A token; options that differ in nothing else are the same."""

    token: str = field(default="", compare=False)
    until: float = field(default=0.0, compare=False)  # of the monotonic clock


class OAuth2(ConfigModel):
    """Client credentials (RFC 6749, 4.4); the token is kept until it expires or is refused."""

    token_url: Endpoint
    client_id: str
    client_secret: SecretStr
    scopes: list[str] = []
    endpoint_params: dict[str, SecretStr] = Field(default_factory=dict)
    _kept: _Kept = PrivateAttr(default_factory=_Kept)

    @field_validator("token_url")
    @classmethod
    def _no_auth(cls, token_url: Endpoint) -> Endpoint:
        if token_url.auth is not None:
            raise ValueError("takes no auth: the client's credentials are what it asks for")
        return token_url

    @property
    def kept(self) -> str | None:
        """The token, while it holds."""
        return self._kept.token if self._kept.token and time.monotonic() < self._kept.until else None

    def keep(self, token: str, lifetime: float) -> None:
        """Keep a token for its `lifetime` in seconds, less what a probe may take."""
        self._kept.token, self._kept.until = token, time.monotonic() + max(lifetime - 30, lifetime / 2)

    def forget(self) -> None:
        self._kept.token = ""


class ProbeAuth(HttpAuth):
    choices = ("basic", "bearer", "oauth2")
    oauth2: OAuth2 | None = None


class Proxy(Endpoint):
    """An HTTP proxy; `headers` go to it alone."""

    tls: ProbeTls = ProbeTls()
    headers: Headers = Field(default_factory=dict)

    @cached_property
    def sent(self) -> dict[str, str]:
        """The headers that it gets."""
        own = {"Proxy-Authorization": authorization(self.auth)} if self.auth else {}
        return own | {name: value.get_secret_value() for name, value in self.headers.items()}


class File(ChoiceModel):
    choices: ClassVar[tuple[str, ...]] = ("path", "content")
    path: ExistingFile | None = None
    content: str | None = None
    filename: str | None = None
    content_type: str = "application/octet-stream"
    _version: tuple[int, int] | None = PrivateAttr(None)

    def model_post_init(self, _context: Any) -> None:
        """Tell a file that has changed from what it was: a reload then reads it anew."""
        if isinstance(self.path, Path) and self.path.is_file():
            found = self.path.stat()
            self._version = (found.st_mtime_ns, found.st_size)


class RequestOptions(Dial):
    """What every probe that speaks HTTP may be told of its request."""

    url: Url
    headers: Headers = Field(default_factory=dict)
    auth: ProbeAuth | None = None
    follow_redirects: bool = True
    tls: ProbeTls = ProbeTls()
    proxy: Proxy | None = None
    max_body: Size = 10 * 1024 * 1024

    @property
    def target(self) -> str:
        """The URL that is asked."""
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
    def first(self) -> "Request":
        """The request as it is sent to the URL, but for a token of OAuth 2."""
        body, content_type = self.content
        headers = {name.lower(): (name, value) for name, value in _DEFAULT_HEADERS.items()}
        if body:
            headers["content-type"] = ("Content-Type", content_type)
        auth = self.credentials
        if auth is not None and auth.oauth2 is None:
            headers["authorization"] = ("Authorization", authorization(auth))
        # Whatever the user says stands in place of ours, however it is spelled.
        headers |= {name.lower(): (name, value.get_secret_value()) for name, value in self.headers.items()}
        return Request(URL(self.target), self.verb, dict(headers.values()), body, self.proxy)

    @cached_property
    def for_tokens(self) -> "RequestOptions":
        """How a token is asked for: on the same way, with the TLS of its own URL."""
        endpoint = self.auth.options.token_url if self.auth else Endpoint(url=self.url)
        tls = ProbeTls.model_validate(endpoint.tls.model_dump())
        return RequestOptions(url=endpoint.url, tls=tls, proxy=self.proxy, ip=self.ip, source=self.source)

    @property
    def sends_credentials(self) -> bool:
        return self.credentials is not None or any(name.lower() in ("authorization", "cookie") for name in self.headers)


class BodyOptions(RequestOptions):
    """A request with a method and a body."""

    method: Annotated[str, Field(pattern=TOKEN)] = "GET"
    body: str | None = None
    json_: Any = Field(None, alias="json")
    form: dict[str, str] | None = None
    files: dict[str, File] | None = None

    @model_validator(mode="after")
    def _one_body(self) -> "BodyOptions":
        given = [name for name in ("body", "json", "files") if name.replace("json", "json_") in self.model_fields_set]
        if self.form is not None and self.files is None:
            given.append("form")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other (only form may join files)")
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
        """The request's body and its content type; reads the files once."""
        if self.files is not None:
            return _multipart(self.form or {}, self.files)
        if self.form is not None:
            return _form(self.form), "application/x-www-form-urlencoded"
        if "json_" in self.model_fields_set:
            return json.dumps(self.json_, ensure_ascii=False).encode(), "application/json"
        return (self.body or "").encode(), "text/plain; charset=utf-8"


def token_request(oauth2: OAuth2, proxy: Proxy | None, *, in_body: bool) -> "Request":
    """The request for a token, the client's credentials in its body or in a header."""
    params = {name: value.get_secret_value() for name, value in oauth2.endpoint_params.items()}
    form = {"grant_type": "client_credentials", **params}
    if oauth2.scopes:
        form["scope"] = " ".join(oauth2.scopes)
    headers = {"User-Agent": f"defib/{VERSION}", "Accept": "application/json"}
    if in_body:
        form |= {"client_id": oauth2.client_id, "client_secret": oauth2.client_secret.get_secret_value()}
    else:
        secret = SecretStr(quote(oauth2.client_secret.get_secret_value()))
        client = BasicAuth(username=quote(oauth2.client_id), password=secret)
        headers["Authorization"] = f"Basic {client.encoded}"
    headers["Content-Type"] = "application/x-www-form-urlencoded"
    return Request(URL(oauth2.token_url.url), "POST", headers, _form(form), proxy)


def _form(fields: Mapping[str, str]) -> bytes:
    return URL.build(query=fields).raw_query_string.encode()


def authorization(auth: HttpAuth) -> str:
    """The value of the header that sends `auth`, basic or bearer."""
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

    __slots__ = ("body", "data", "headers", "host", "method", "port", "proxy", "secure", "url")

    def __init__(
        self, url: URL, method: str, headers: Mapping[str, str], body: bytes, proxy: Proxy | None = None
    ) -> None:
        self.url, self.method, self.headers, self.body, self.proxy = url, method, headers, body, proxy
        self.host = url.raw_host or ""
        self.secure = url.scheme == "https"
        self.port = url.port or (443 if self.secure else 80)
        own_host = next((value for name, value in headers.items() if name.lower() == "host"), None)
        path = url.raw_path_qs or "/"
        if proxy and not self.secure:
            path, headers = f"http://{url.host_port_subcomponent}{path}", {**headers, **proxy.sent}
        lines = [f"{method} {path} HTTP/1.1", f"Host: {own_host or url.host_port_subcomponent}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "host"]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        lines.append("Connection: close")
        self.data = "\r\n".join([*lines, "", ""]).encode() + body

    def redirected(self, status: int, location: str, seen: Seen) -> "Request":
        """The request that follows a redirect (RFC 9110, 15.4). Raises ProbeFailure.

        What was configured stays with its origin: headers, any of which may be a credential, and a request that could
        change something there.
        """
        try:
            url = self.url.join(URL(location))
            good = url.scheme in ("http", "https") and bool(url.host) and url.port != 0
        except (ValueError, IndexError):  # yarl has both for what is no URL
            url, good = URL(), False
        if not good:
            raise ProbeFailure("protocol", f"redirected to {excerpt(location.encode(), seen)}, which is no URL")
        headers = dict(self.headers)
        if url.origin() != self.url.origin():
            if self.body or self.method not in ("GET", "HEAD"):
                what = f"a {self.method} request{' with a body' if self.body else ''}"
                to = excerpt(str(url.origin()).encode(), seen)
                raise ProbeFailure("redirect", f"{what} was redirected to another origin, {to}, which is refused")
            headers = dict(_DEFAULT_HEADERS)
        if status == 303 or (status in (301, 302) and self.method == "POST"):  # noqa: PLR2004
            headers = {k: v for k, v in headers.items() if k.lower() != "content-type"}
            return Request(url, "HEAD" if self.method == "HEAD" else "GET", headers, b"", self.proxy)
        return Request(url, self.method, headers, self.body, self.proxy)

    def with_cookies(self, cookies: BaseCookie[str]) -> "Request":
        """The same request with these cookies beside its own."""
        own = [value for name, value in self.headers.items() if name.lower() == "cookie"]
        pairs = [*own, *(f"{name}={morsel.coded_value}" for name, morsel in cookies.items())]
        return self.with_header("Cookie", "; ".join(pairs)) if pairs else self

    def with_header(self, name: str, value: str) -> "Request":
        """The same request with one more header, in place of any of that name."""
        others = {key: old for key, old in self.headers.items() if key.lower() != name.lower()}
        return Request(self.url, self.method, {**others, name: value}, self.body, self.proxy)
