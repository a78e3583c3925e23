"""The `http` control: HTTP requests to a server that starts and stops the service, such as a transcoder."""

import asyncio
import json
from typing import Annotated, Any, ClassVar

import httpx
from pydantic import Field, SecretStr, field_validator, model_validator

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel, Endpoint
from fleet.shells import CompletedCommand, ShellError
from remediator.clients.json_client import http_client
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import ControlRunner, TargetState, UnknownVerbError, Verb
from runtime.payloads import ACCEPT_ENCODING, read_body

RESPONSE_LIMIT = 4000  # characters of a response that are recorded
BODY_LIMIT = 64 * 1024  # bytes of a response that are read
STATE_LIMIT = 200  # characters
TOKEN = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"  # noqa: S105 - the grammar of methods and header names (RFC 9110)


class HttpCall(Endpoint):
    """One request; any 2xx status is success. The method is POST by default, GET for `status`."""

    method: Annotated[str, Field(pattern=TOKEN)] | None = None
    headers: dict[Annotated[str, Field(pattern=TOKEN)], SecretStr] = Field(default_factory=dict)
    body: Annotated[str | None, REFERENCES_ARE_SECRET] = None
    json_: Annotated[Any, REFERENCES_ARE_SECRET] = Field(None, alias="json")

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            if not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
                raise ValueError(f"the value of header {name} must be printable ASCII")
        return headers

    @model_validator(mode="after")
    def _check_body(self) -> "HttpCall":
        if {"body", "json_"} <= self.model_fields_set:
            raise ValueError("body and json exclude each other")
        return self


class HttpControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = False
    start: HttpCall | None = None
    stop: HttpCall | None = None
    restart: HttpCall | None = None
    status: HttpCall | None = None

    @model_validator(mode="after")
    def _check_verbs(self) -> "HttpControlOptions":
        if not self.verbs:
            raise ValueError("at least one of start, stop, restart and status is required")
        return self

    @property
    def verbs(self) -> frozenset[Verb]:
        """The configured verbs, and `restart` if it can be done by `stop` and `start`."""
        calls: dict[Verb, HttpCall | None] = {
            "start": self.start, "stop": self.stop, "restart": self.restart, "status": self.status,
        }  # fmt: skip
        configured: set[Verb] = {verb for verb, call in calls.items() if call is not None}
        return frozenset(configured | ({"restart"} if {"start", "stop"} <= configured else set()))

    @property
    def target(self) -> str:
        """The request that starts the target; services with the same request share the target."""
        call = self.restart or self.start or self.stop or self.status
        if not isinstance(call, HttpCall):  # an unresolved reference
            return f"http:{call}"
        body = call.body or (json.dumps(call.json_, sort_keys=True) if call.json_ is not None else "")
        return " ".join(part for part in (f"http:{call.method or 'POST'}", call.url, body) if part)


async def run_http(verb: Verb, options: HttpControlOptions, runner: ControlRunner) -> CompletedCommand:
    call: HttpCall | None = getattr(options, verb, None)
    if call is not None:
        return await _send(call, "GET" if verb == "status" else "POST", runner.remaining)
    if verb == "restart" and options.stop and options.start:
        try:
            stopped = await _send(options.stop, "POST", runner.remaining)
        except ShellError:
            stopped = CompletedCommand(1, "", "")  # a service that has crashed may not accept connections
        # A failed stop does not prevent the start. Without a response, the service may still be stopping.
        return stopped if stopped.status is None else await _send(options.start, "POST", runner.remaining)
    raise UnknownVerbError(f"the control does not support `{verb}`")


async def _send(call: HttpCall, default_method: str, timeout: float) -> CompletedCommand:
    """Send a request; returns status 0 for 2xx, 1 for other responses, None without a response.

    Raises ShellError if it was not sent.
    """
    method = call.method or default_method
    headers = httpx.Headers({"Accept-Encoding": ACCEPT_ENCODING})
    headers.update({name: value.get_secret_value() for name, value in call.headers.items()})
    body: dict[str, Any] = {"content": call.body.encode()} if call.body is not None else {}
    if "json_" in call.model_fields_set:
        body = {"json": call.json_}
    received = bytearray()
    try:
        async with (
            asyncio.timeout(timeout),
            await asyncio.to_thread(http_client, call) as client,
            client.stream(method, call.url, headers=headers, timeout=None, **body) as response,
        ):
            await read_body(response, received, BODY_LIMIT)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ShellError(f"cannot connect to {call.url}: {type(error).__name__}") from error
    except TimeoutError:
        return CompletedCommand(None, "", "", f"no response within {timeout:g} s", late=True)
    except httpx.HTTPError as error:
        return CompletedCommand(None, "", "", f"no response: {type(error).__name__}")
    text = received.decode(response.charset_encoding or "utf-8", "replace")
    output = f"HTTP {response.status_code} {text[:RESPONSE_LIMIT]}".strip()
    return CompletedCommand(0 if response.is_success else 1, output, "")


async def read_http_state(options: HttpControlOptions, runner: ControlRunner) -> TargetState | None:
    """Return the first line of the response to `status` as the state."""
    if options.status is None:
        return None
    completed = await _send(options.status, "GET", runner.remaining)
    return TargetState(state=(completed.output or completed.why).splitlines()[0][:STATE_LIMIT])


HTTP = ControlKind(HttpControlOptions, run_http, read_http_state, reports_stops=False)
