"""The `http` control: requests to something that starts and stops the service, such as a transcoder's channel."""

import asyncio
import json
from typing import Annotated, Any, ClassVar

import httpx
from pydantic import Field, SecretStr, field_validator, model_validator

from fleet.inventory.endpoints import ConfigModel, Endpoint
from fleet.shells import Completed, ShellError
from remediator.clients.json_client import http_client
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import ControlRunner, TargetState, UnknownVerbError, Verb

SAID = 4000  # characters of an answer that are kept
TOKEN = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"  # noqa: S105 - RFC 9110 calls a method's or header's name a token


class Request(Endpoint):
    """One request; any 2xx is success. A URL alone is a POST, or for `status` a GET."""

    method: Annotated[str, Field(pattern=TOKEN)] | None = None
    headers: dict[Annotated[str, Field(pattern=TOKEN)], SecretStr] = Field(default_factory=dict)
    body: str | None = None
    json_: Any = Field(None, alias="json")

    @field_validator("headers")
    @classmethod
    def _one_line_each(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            if not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
                raise ValueError(f"the header {name} holds what no header may")
        return headers

    @model_validator(mode="after")
    def _one_body(self) -> "Request":
        if {"body", "json_"} <= self.model_fields_set:
            raise ValueError("body and json exclude each other")
        return self


class HttpOptions(ConfigModel):
    needs_host: ClassVar[bool] = False
    start: Request | None = None
    stop: Request | None = None
    restart: Request | None = None
    status: Request | None = None

    @model_validator(mode="after")
    def _something(self) -> "HttpOptions":
        if not self.verbs:
            raise ValueError("wants at least one of start, stop, restart, status")
        return self

    @property
    def verbs(self) -> frozenset[Verb]:
        named: dict[Verb, Request | None] = {
            "start": self.start, "stop": self.stop, "restart": self.restart, "status": self.status,
        }  # fmt: skip
        said: set[Verb] = {verb for verb, request in named.items() if request is not None}
        return frozenset(said | ({"restart"} if {"start", "stop"} <= said else set()))

    @property
    def target(self) -> str:
        """The request that makes it run; what sends the same one acts on the same thing."""
        request = self.restart or self.start or self.stop or self.status
        if not isinstance(request, Request):  # a reference that this program does not resolve
            return f"http:{request}"
        body = request.body or (json.dumps(request.json_, sort_keys=True) if request.json_ is not None else "")
        return " ".join(part for part in (f"http:{request.method or 'POST'}", request.url, body) if part)


async def control_http(verb: Verb, options: HttpOptions, runner: ControlRunner) -> Completed:
    request: Request | None = getattr(options, verb, None)
    if request is not None:
        return await _ask(request, "GET" if verb == "status" else "POST", runner.remaining)
    if verb == "restart" and options.stop and options.start:
        try:
            stopped = await _ask(options.stop, "POST", runner.remaining)
        except ShellError:
            stopped = Completed(1, "", "")  # what is dead may not even be there to be stopped
        # It may refuse to be stopped, too; only what has not answered may still be stopping.
        return stopped if stopped.status is None else await _ask(options.start, "POST", runner.remaining)
    raise UnknownVerbError(f"the control has no `{verb}`")


async def _ask(request: Request, method: str, within: float) -> Completed:
    """What came of a request, as a command's: 0 for 2xx, 1 for another answer, None where none came.

    Raises ShellError where it was never made.
    """
    headers = {name: value.get_secret_value() for name, value in request.headers.items()}
    body: dict[str, Any] = {"content": request.body.encode()} if request.body is not None else {}
    if "json_" in request.model_fields_set:
        body = {"json": request.json_}
    try:
        async with asyncio.timeout(within), await asyncio.to_thread(http_client, request) as client:
            answer = await client.request(request.method or method, request.url, headers=headers, timeout=None, **body)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ShellError(f"cannot connect to {request.url}: {type(error).__name__}") from error
    except TimeoutError:
        return Completed(None, "", "", f"no answer within {within:g} s", late=True)
    except httpx.HTTPError as error:
        return Completed(None, "", "", f"the answer did not come: {type(error).__name__}")
    said = f"HTTP {answer.status_code} {answer.text[:SAID]}".strip()
    return Completed(0 if answer.is_success else 1, said, "")


async def facts_http(options: HttpOptions, runner: ControlRunner) -> TargetState | None:
    if options.status is None:
        return None
    done = await _ask(options.status, "GET", runner.remaining)
    return TargetState(state=(done.output or done.why).splitlines()[0][:200])


HTTP = ControlKind(HttpOptions, control_http, facts_http, reports_stops=False)
