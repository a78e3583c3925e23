"""The gateway's API: its status, and changes of its limits."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fleet.gateway_limits import GatewayLimits
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.gateway import Priority, WhenFull
from fleet.json_client import JsonClient, parsing_response
from remediator.clients.exporter_services import Time
from remediator.clients.token_auth import CALLER, TokenAuth
from runtime.access.roles import USER_HEADER
from runtime.tokens import ConfiguredToken
from runtime.validation_messages import describe_first

CHANGE_TIMEOUT = 10.0  # seconds
RESPONSE_LIMIT = 1024 * 1024  # bytes: thousands of clients
Count = Annotated[int, Field(ge=0, le=10**12)]
Amount = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(max_length=100)]


class _Answer(BaseModel):
    """A part of an answer, whose other fields are ignored: a later version may have more."""

    model_config = ConfigDict(strict=True, frozen=True)


class Depths(_Answer):
    """How many requests of each priority wait."""

    urgent: Count
    high: Count
    normal: Count
    low: Count


class Totals(_Answer):
    """How the requests since the start have ended; `limited` are those that the upstream has refused with 429."""

    requests: Count
    answered: Count
    limited: Count
    refused: Count
    errors: Count
    cancelled: Count


class AllTotals(Totals):
    passed_through: Count


class Latencies(_Answer):
    p50: Amount | None
    p95: Amount | None


class UpstreamStatus(_Answer):
    provider: Name
    rate_per_minute: Amount
    base_rate_per_minute: Amount
    requests_in_window: Count
    requests_available: Count
    tokens_per_minute: Amount | None
    tokens_in_window: Count
    burst: Count | None = None
    concurrency: Count | None
    in_flight: Count
    queue: Depths
    queue_size: Count
    when_full: WhenFull
    retreat: Literal["steady", "retreating", "floor", "recovering"]
    paused_seconds: Amount
    failing: bool
    sent_last_minute: dict[Name, Count]  # by client
    latency_seconds: Latencies


class Usage(_Answer):
    requests: Count
    tokens: Count


class Budget(_Answer):
    requests: Count | None
    tokens: Count | None


class ClientStatus(_Answer):
    priority: Priority
    share: Amount
    waiting: Count
    queue: Depths
    in_flight: Count
    sent_last_minute: Count
    today: Usage
    budget: Budget
    totals: Totals


class GatewayStatus(_Answer):
    """What the gateway does now, and has done since it was started."""

    started_at: Time
    uptime_seconds: Amount
    totals: AllTotals
    upstreams: dict[Name, UpstreamStatus]
    clients: dict[Name, ClientStatus]


class Gateway:
    def __init__(self, endpoint: Endpoint, token: ConfiguredToken) -> None:
        auth = TokenAuth(token, "gateway") if endpoint.auth is None else None
        headers = {USER_HEADER: CALLER}
        self._client = JsonClient(endpoint, headers=headers, auth=auth, response_limit=RESPONSE_LIMIT)
        self.close = self._client.close

    async def read_status(self) -> GatewayStatus:
        """Raises ClientError."""
        return _parse(await self._client.request("GET", "/api/v1/status"))

    async def change_limits(self, limits: GatewayLimits) -> GatewayStatus:
        """Change limits until the gateway reloads its configuration. Raises ClientError."""
        body = limits.model_dump(mode="json", exclude_unset=True)
        return _parse(await self._client.request("PUT", "/api/v1/limits", CHANGE_TIMEOUT, body=body))

    async def reset(self, upstream: str) -> None:
        """Return an upstream to its base rate, and end its pause. Raises ClientError."""
        await self._client.request("POST", f"/api/v1/upstreams/{quote(upstream, safe='')}/reset", CHANGE_TIMEOUT)


def _parse(answer: Mapping[str, Any]) -> GatewayStatus:
    with parsing_response():
        try:
            return GatewayStatus.model_validate(answer)
        except ValidationError as error:  # its own message would have what the server has sent
            raise ValueError(describe_first(error, "the response")) from None
