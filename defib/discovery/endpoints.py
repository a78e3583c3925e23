"""What answers on the ports of a host, asked from this machine, over HTTP.

A host names only port numbers: the address is that of the inventory. Redirects are followed on the same server only,
and no credentials are sent.
"""

import asyncio
import html
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx

from defib.discovery.known import PROTOCOLS
from defib.discovery.model import Endpoint, EndpointKind
from runtime.addresses import bracket, has_long_host
from runtime.http_clients import limit_interim_responses
from runtime.payloads import ACCEPT_ENCODING, decode_json, parse_body, read_body, replace_surrogates

TIMEOUT = 3.0  # seconds for each step of a request: to connect, for the handshake of TLS, for a part of the response
REQUEST_TIMEOUT = 7.0  # more than for connection and handshake: httpcore leaves a handshake that is cancelled open
BODY_LIMIT = 256 * 1024  # bytes; the rest is not read
TOGETHER = 8  # ports of a host
PORTS_LIMIT = 300  # ports of a host
REDIRECTS = 3
TITLE_LIMIT, MODELS_LIMIT, MODEL_LIMIT = 80, 50, 200  # characters, models, characters
_TITLE = re.compile(rb"<title[^>]{0,200}>([^<]{0,1000})", re.IGNORECASE)
_WANTS_TLS = re.compile(rb"HTTP request (was )?(sent )?to (an )?HTTPS", re.IGNORECASE)
HEALTH_PATHS = ("/health", "/healthz", "/-/healthy")
_OK, _BAD_REQUEST, _REFUSED, _MISSING = 200, 400, (401, 403), 404


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes

    async def json(self) -> Mapping[str, Any]:
        """Return the body as a map; an empty one for any other body."""
        try:
            value = await parse_body(decode_json, self.body)
        except (ValueError, RecursionError):
            return {}
        return value if self.status == _OK and isinstance(value, dict) else {}


class _NoAnswerError(Exception):
    """A request had no answer."""


class _UnreachableError(_NoAnswerError):
    """Nothing accepts connections."""


class _SilentError(_NoAnswerError):
    """The server accepts connections, but does not answer in time."""


class _CertificateError(_NoAnswerError):
    """The certificate cannot be verified."""


async def find_endpoints(address: str, ports: Iterable[int], *, within: float) -> dict[int, Endpoint]:
    """Return what answers on each port of an address; ports that were not asked in time are missing."""
    found: dict[int, Endpoint] = {}
    places = asyncio.Semaphore(TOGETHER)
    verifying, trusting = (_create_client(verify=verify) for verify in (True, False))

    async def ask(port: int) -> None:
        async with places:
            server = _Server(verifying, trusting, address, port)
            found[port] = await server.identify()

    async with verifying, trusting:
        tasks = [asyncio.create_task(ask(port)) for port in sorted(set(ports))[:PORTS_LIMIT]]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled():
                    task.result()
    return found


def _create_client(*, verify: bool) -> httpx.AsyncClient:
    headers = {"User-Agent": "defib-discover", "Accept": "*/*", "Accept-Encoding": ACCEPT_ENCODING}
    context: ssl.SSLContext | bool = ssl.create_default_context() if verify else False
    limits = httpx.Limits(max_connections=2 * TOGETHER, max_keepalive_connections=TOGETHER)
    client = httpx.AsyncClient(verify=context, trust_env=False, headers=headers, limits=limits, timeout=TIMEOUT)
    return limit_interim_responses(client)


class _Server:
    """One port, of which the scheme is not known at first."""

    def __init__(self, verifying: httpx.AsyncClient, trusting: httpx.AsyncClient, address: str, port: int) -> None:
        self._clients = {True: verifying, False: trusting}
        self._port, self._address = port, bracket(address)
        self._raw_address = address
        self._scheme: Literal["http", "https"] = "http"
        self._verify = True

    async def identify(self) -> Endpoint:
        if self._port in PROTOCOLS:
            return await self._connect()
        try:
            page = await self._find_page()
        except _UnreachableError:
            return Endpoint(self._port, "closed")
        except _SilentError:
            page = None
        if page is None:
            return Endpoint(self._port, "tcp")
        endpoint = Endpoint(
            self._port, "http", self._scheme, "/", page.status, _find_title(page.body), verified=self._verify
        )
        return await self._identify_api(endpoint, page)

    async def _connect(self) -> Endpoint:
        try:
            async with asyncio.timeout(TIMEOUT):
                _, writer = await asyncio.open_connection(self._raw_address, self._port)
        except (OSError, TimeoutError):
            return Endpoint(self._port, "closed")
        writer.close()
        return Endpoint(self._port, "tcp")

    async def _find_page(self) -> _Answer | None:
        """Return the answer of `/`, over HTTP or HTTPS; None if neither is spoken. Raises _NoAnswerError."""
        page = await self._get("/")
        if page is not None and not (page.status == _BAD_REQUEST and _WANTS_TLS.search(page.body)):
            return page
        self._scheme = "https"
        try:
            secure = await self._get("/")
        except _CertificateError:
            self._verify = False
            secure = await self._get("/")
        if secure is None:
            self._scheme, self._verify = "http", True
        return secure or page

    async def _identify_api(self, endpoint: Endpoint, page: _Answer) -> Endpoint:
        """Return the endpoint with the API that it serves, if it is a known one."""
        if page.body.startswith(b"Ollama is running"):
            return await self._identify_ollama(endpoint)
        listed = await self._ask("/v1/models")
        models, owners = _parse_models(await listed.json())
        if "vllm" in owners:
            return replace(endpoint, kind="vllm", models=models)
        if models:
            ollama = await self._identify_ollama(endpoint)
            return ollama if ollama.kind == "ollama" else await self._identify_vllm(endpoint, models)
        if listed.status in _REFUSED and page.status not in _REFUSED:
            refused = await self._identify_vllm(replace(endpoint, needs_key=True), ())
            return refused if refused.kind == "vllm" else replace(endpoint, needs_key=False)
        return await self._identify_documented(endpoint, page)

    async def _identify_documented(self, endpoint: Endpoint, page: _Answer) -> Endpoint:
        """Return an endpoint with what its OpenAPI document says, and a path that answers better than `/`."""
        if page.status == _OK and b"swagger" not in page.body.lower():
            return endpoint
        document = await (await self._ask("/openapi.json")).json()
        paths, info = document.get("paths"), document.get("info")
        if isinstance(paths, dict) and "/file_parse" in paths:
            return replace(endpoint, kind="mineru")
        if isinstance(info, dict) and isinstance(info.get("title"), str):
            endpoint = replace(endpoint, title=_shorten(replace_surrogates(info["title"])))
        for path in HEALTH_PATHS if page.status == _MISSING else ():
            if (await self._ask(path)).status == _OK:
                return replace(endpoint, path=path, status=_OK)
        return endpoint

    async def _identify_ollama(self, endpoint: Endpoint) -> Endpoint:
        tags = (await (await self._ask("/api/tags")).json()).get("models")
        if not isinstance(tags, list):
            return endpoint
        names = _clean(each.get("name") for each in tags if isinstance(each, dict))
        return replace(endpoint, kind="ollama", models=names)

    async def _identify_vllm(self, endpoint: Endpoint, models: tuple[str, ...]) -> Endpoint:
        metrics = await self._ask("/metrics")
        by_metrics = metrics.status == _OK and b"\nvllm:" in metrics.body
        kind: EndpointKind = "vllm" if by_metrics or (endpoint.needs_key and await self._has_version()) else "openai"
        return replace(endpoint, kind=kind, models=models)

    async def _has_version(self) -> bool:
        """Whether `/version` answers as vLLM's, which needs no key; only together with a refused list of models."""
        return list(await (await self._ask("/version")).json()) == ["version"]

    async def _ask(self, path: str) -> _Answer:
        """Return the answer of a path; one without status if there is none."""
        try:
            return await self._get(path) or _Answer(0, b"")
        except _NoAnswerError:
            return _Answer(0, b"")

    async def _get(self, path: str) -> _Answer | None:
        """Return an answer, or None if it is not HTTP. Raises _NoAnswerError."""
        origin = f"{self._scheme}://{self._address}:{self._port}"
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                url = httpx.URL(origin + path)
                answer, target = await self._request(url)
                for _ in range(REDIRECTS):
                    if target is None or _origin(target) != _origin(url):
                        break
                    answer, target = await self._request(target)
                return answer
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise _CertificateError from error
            if self._scheme == "https":
                return None  # no TLS: the port has answered before
            raise _UnreachableError from error
        except httpx.ConnectTimeout as error:
            raise _UnreachableError from error
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _SilentError from error
        except (httpx.HTTPError, httpx.InvalidURL):
            return None

    async def _request(self, url: httpx.URL) -> tuple[_Answer, httpx.URL | None]:
        """Return the answer, whose body may be cut, and where it redirects to."""
        body = bytearray()
        async with self._clients[self._verify].stream("GET", url) as response:
            await read_body(response, body, BODY_LIMIT)
            location = response.headers.get("location") if response.is_redirect else None
            return _Answer(response.status_code, bytes(body)), url.join(location) if location and not has_long_host(
                location
            ) else None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _find_title(body: bytes) -> str:
    match = _TITLE.search(body)
    text = html.unescape(match[1].decode("utf-8", "replace")) if match else ""
    return _shorten(text)


def _shorten(text: str) -> str:
    return " ".join(text.split())[:TITLE_LIMIT]


def _parse_models(answer: Mapping[str, Any]) -> tuple[tuple[str, ...], set[str]]:
    """Return the models of an OpenAI-compatible API, and their owners."""
    data = answer.get("data")
    models = [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
    return _clean(each.get("id") for each in models), {str(each.get("owned_by")) for each in models}


def _clean(names: Iterable[Any]) -> tuple[str, ...]:
    texts = (replace_surrogates(name) for name in names if isinstance(name, str))
    return tuple(text for text in texts if 0 < len(text) <= MODEL_LIMIT)[:MODELS_LIMIT]
