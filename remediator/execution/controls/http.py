"""The `http` control: HTTP requests to a server that starts and stops the service, such as a transcoder."""

import asyncio
import json
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

import httpx
import webencodings
from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel, Endpoint
from fleet.inventory.units import format_value
from fleet.inventory.yaml_files import TextWithBase
from fleet.json_client import http_client
from fleet.shells import CompletedCommand, ShellError
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import (
    ControlRunner,
    TargetState,
    UnknownComponentError,
    UnknownVerbError,
    Verb,
)
from runtime.http_clients import find_cause
from runtime.payloads import ACCEPT_ENCODING, read_body

RESPONSE_LIMIT = 4000  # characters of a response that are recorded
BODY_LIMIT = 64 * 1024  # bytes of a response that are read
STATE_LIMIT = 200  # characters
COMPONENT = "{component}"  # stands for a component's name in its requests
COMPONENTS_LIMIT, NAME_LIMIT = 200, 100  # as many, and as long, as the exporter reports
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

    @property
    def may_name_component(self) -> bool:
        """Whether it has `{component}` where that is replaced, or an unresolved reference that may contain it.

        Raises ValueError if it cannot be replaced.
        """
        if isinstance(self.body, TextWithBase) and self.body.pending:
            return True
        return self.for_component("") != self or "${" in f"{self.url}{self.json_}"

    def for_component(self, name: str) -> "HttpCall":
        """Return the request for one component: its name is percent-encoded in the URL, and put into strings of JSON.

        Raises ValueError if it stands in a body of another format.
        """
        filled: dict[str, Any] = {"url": self.url.replace(COMPONENT, quote(name, safe=""))}
        if self.body is not None and COMPONENT in self.body:
            try:
                filled["body"] = json.dumps(_fill_in(json.loads(self.body), name))
            except ValueError as error:
                raise ValueError(f"a body with {COMPONENT} must be JSON: {error}") from None
        if self.json_ is not None:
            filled["json_"] = _fill_in(self.json_, name)
        return self.model_copy(update=filled)


def _fill_in(value: Any, name: str) -> Any:
    """Return a value of JSON with a component's name in its strings; keys stay as they are."""
    if isinstance(value, dict):
        return {key: _fill_in(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item, name) for item in value]
    return value.replace(COMPONENT, name) if isinstance(value, str) else value


class _RestartCalls(ConfigModel):
    start: HttpCall | None = None
    stop: HttpCall | None = None
    restart: HttpCall | None = None


class ComponentCalls(_RestartCalls):
    """The requests that restart one component: `restart`, or `stop` and `start`, with `{component}` for its name.

    `automatic`: components that are down are restarted without an operator, too.
    """

    automatic: bool = False

    @property
    def calls(self) -> dict[str, HttpCall]:
        """The configured requests, by verb."""
        return {verb: call for verb in ("start", "stop", "restart") if (call := getattr(self, verb)) is not None}

    @model_validator(mode="after")
    def _check_calls(self) -> "ComponentCalls":
        calls = self.calls
        if calls.keys() not in ({"restart"}, {"stop", "start"}):
            raise ValueError("must have either restart, or stop and start")
        # An unresolved reference is text.
        named = [not isinstance(call, HttpCall) or call.may_name_component for call in calls.values()]
        if not any(named):
            raise ValueError(f"none of its requests has {COMPONENT} in its url, json or body")
        return self


def _check_component_name(name: str) -> str:
    if not name.isprintable() or name in (".", ".."):  # the latter have a meaning in URLs, also percent-encoded
        raise ValueError(
            f"{format_value(name)} cannot be the name of a component: it must be printable, and not . or .."
        )
    return name


ComponentName = Annotated[str, Field(min_length=1, max_length=NAME_LIMIT), AfterValidator(_check_component_name)]


class HttpControlOptions(_RestartCalls):
    needs_host: ClassVar[bool] = False
    status: HttpCall | None = None
    components: Annotated[list[ComponentName], Field(min_length=1, max_length=COMPONENTS_LIMIT)] | None = None
    component: ComponentCalls | None = None

    @model_validator(mode="after")
    def _check_verbs(self) -> "HttpControlOptions":
        if not self.verbs and self.component is None:
            raise ValueError("at least one of start, stop, restart, status and component is required")
        return self

    @model_validator(mode="after")
    def _check_components(self) -> "HttpControlOptions":
        if self.component is None and self.components is not None:
            raise ValueError("components needs component: the requests that restart one of them")
        if self.component is not None and self.components is None:
            raise ValueError("component needs components: the names of those that may be restarted")
        if isinstance(self.components, list) and len(set(self.components)) < len(self.components):
            raise ValueError("components: each may be listed once")
        return self

    @property
    def verbs(self) -> frozenset[Verb]:
        """The configured verbs, and `restart` if it can be done by `stop` and `start`."""
        calls: dict[Verb, HttpCall | None] = {
            "start": self.start, "stop": self.stop, "restart": self.restart, "status": self.status,
        }  # fmt: skip
        configured: set[Verb] = {verb for verb, call in calls.items() if call is not None}
        return frozenset(configured | ({"restart"} if {"start", "stop"} <= configured else set()))

    def for_component(self, name: str) -> "HttpControlOptions":
        """Return options whose verb `restart` restarts one of `components`. Raises UnknownComponentError."""
        if self.component is None or name not in (self.components or ()):
            raise UnknownComponentError(name, self.components or ())
        return HttpControlOptions(**{verb: call.for_component(name) for verb, call in self.component.calls.items()})

    @property
    def target(self) -> str:
        """The request that starts the target; services with the same request share the target."""
        call = self.restart or self.start or self.stop or self.status
        if call is None and isinstance(self.component, ComponentCalls):
            call = self.component.restart or self.component.start
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
        raise ShellError(f"cannot connect to {call.url}: {find_cause(error)}") from error
    except TimeoutError:
        return CompletedCommand(None, "", "", f"no response within {timeout:g} s", late=True)
    except httpx.HTTPError as error:
        return CompletedCommand(None, "", "", f"no response: {type(error).__name__}")
    charset = webencodings.lookup(response.charset_encoding or "") or webencodings.UTF8
    text, _ = webencodings.decode(bytes(received), charset, "replace")
    output = f"HTTP {response.status_code} {text[:RESPONSE_LIMIT]}".strip()
    return CompletedCommand(0 if response.is_success else 1, output, "")


async def read_http_state(options: HttpControlOptions, runner: ControlRunner) -> TargetState | None:
    """Return the first line of the response to `status` as the state."""
    if options.status is None:
        return None
    completed = await _send(options.status, "GET", runner.remaining)
    return TargetState(state=(completed.output or completed.why).splitlines()[0][:STATE_LIMIT])


HTTP = ControlKind(HttpControlOptions, run_http, read_http_state, reports_stops=False)
