"""JSON over HTTP with one server of the fleet."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import httpx
from pydantic import SecretStr

from fleet.inventory.endpoints import Endpoint, TlsSettings
from runtime.errors import DefibError, StartError
from runtime.http_clients import find_cause, limit_interim_responses
from runtime.payloads import ACCEPT_ENCODING, SHORT, decode_json, parse_body, read_body
from runtime.times import parse_http_date
from runtime.tls import create_client_context

TIMEOUT = httpx.Timeout(10.0, connect=3.0)
DEADLINE = 60.0  # seconds for a whole exchange without a timeout of its own
CONCURRENT = 50  # requests of a client; httpx makes up to 100 connections
RESPONSE_LIMIT = 32 * 1024 * 1024  # bytes, after decoding
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ClientError(DefibError):
    """The server did not respond as expected."""

    retryable = True


class HttpStatusError(ClientError):
    """The server responded with an HTTP error status; `code` and `message` are those of Defib's own responses."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(f"HTTP {status}{message}")
        self.status, self.code, self.message = status, code, message.removeprefix(": ")


class JsonClient:
    """A client of one server, whose responses have at most `response_limit` bytes and are parsed by `decode`."""

    def __init__(
        self,
        endpoint: Endpoint,
        token: SecretStr | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        *,
        auth: httpx.Auth | None = None,
        response_limit: int = RESPONSE_LIMIT,
        decode: Callable[[bytes], Any] = decode_json,
    ) -> None:
        self._response_limit, self._decode = response_limit, decode
        # Requests that are cancelled while they wait for a connection of httpx would take it from others for ever.
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._client = http_client(endpoint, token)
        if auth is not None:
            self._client.auth = auth
        self._client.headers.update({"Accept-Encoding": ACCEPT_ENCODING, **headers})

    async def request(
        self,
        method: str,
        path: str,
        timeout: float | None = None,
        body: Any = None,
        form: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the parsed response; `body` is sent as JSON. Raises ClientError."""
        response, _ = await self.request_with_date(method, path, timeout, body, form)
        return response

    async def request_with_date(
        self,
        method: str,
        path: str,
        timeout: float | None = None,
        body: Any = None,
        form: Mapping[str, Any] | None = None,
    ) -> tuple[Any, float]:
        """Return the parsed response and the Unix time of its Date header, or of our clock without one."""
        limits = TIMEOUT if timeout is None else httpx.Timeout(timeout, connect=3.0)
        received = bytearray()
        try:
            async with (
                asyncio.timeout(timeout or DEADLINE),
                self._slots,
                self._client.stream(method, path, timeout=limits, json=body, data=form) as response,
            ):
                complete = await read_body(response, received, self._response_limit)
                response.raise_for_status()
                if not complete:
                    raise ClientError(f"the response is longer than {self._response_limit} bytes")
            return await parse_body(self._decode, bytes(received)), _date(response)
        except httpx.HTTPStatusError as error:
            raise HttpStatusError(error.response.status_code, *_parse_error(received)) from error
        except httpx.ConnectError as error:  # such as an unknown name, or a certificate that cannot be verified
            raise ClientError(f"cannot connect: {find_cause(error)}") from error
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError) as error:
            raise ClientError(f"{type(error).__name__}") from error

    async def close(self) -> None:
        await self._client.aclose()


def _date(response: httpx.Response) -> float:
    date = parse_http_date(response.headers.get("Date", ""))
    return time.time() if date is None else date


def _parse_error(body: bytearray) -> tuple[str, str]:
    """Return the message and the code of an error response of Defib; empty for others."""
    if len(body) > SHORT:
        return "", ""
    try:
        error = decode_json(bytes(body))["error"]
        return f": {str(error['message'])[:300]}", str(error["code"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", ""


def http_client(endpoint: Endpoint, token: SecretStr | None = None) -> httpx.AsyncClient:
    """Create a client with the endpoint's URL, credentials and TLS settings. Raises StartError."""
    auth = endpoint.auth
    headers: dict[str, str] = {}
    basic = None
    if auth is not None and auth.basic is not None:
        basic = httpx.BasicAuth(auth.basic.username, auth.basic.password.get_secret_value())
    elif (bearer := auth.bearer if auth is not None else token) is not None:
        headers["Authorization"] = f"Bearer {bearer.get_secret_value()}"
    verify = create_ssl_context(endpoint.url, endpoint.tls)
    # The proxy variables of the environment are not for servers of the fleet.
    client = httpx.AsyncClient(base_url=endpoint.base, auth=basic, headers=headers, verify=verify, trust_env=False)
    return limit_interim_responses(client)


def create_ssl_context(url: str, tls: TlsSettings) -> ssl.SSLContext | bool:
    """Return the context for requests to a URL; False without TLS. Raises StartError."""
    if not url.startswith("https:"):
        return False
    try:
        context = create_client_context(str(tls.ca_file) if tls.ca_file else None)
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"{url}: cannot use its certificate files: {error}") from error
    if not tls.verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@contextlib.contextmanager
def parsing_response() -> Iterator[None]:
    """Raise ClientError where a response lacks a field or has one of another type."""
    try:
        yield
    except KeyError as error:
        raise ClientError(f"the response has no field {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ClientError(f"the response does not have the expected fields: {error}") from error
