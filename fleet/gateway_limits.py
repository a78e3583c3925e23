"""The limits of the gateway that people change while it runs, as the gateway and the remediator receive them."""

from pydantic import Field

from fleet.inventory.gateway import Rate, WhenFull
from runtime.request_bodies import RequestBody


class UpstreamLimits(RequestBody):
    """What is left out stays as it is; what is null, except `rate`, becomes unlimited."""

    rate: Rate = 1.0
    tokens: Rate | None = None
    burst: int | None = Field(None, ge=1, le=1_000_000, strict=True)
    concurrency: int | None = Field(None, ge=1, le=1_000_000, strict=True)


class GatewayLimits(RequestBody):
    """What is left out stays as it is."""

    queue_size: int = Field(0, ge=0, le=100_000, strict=True)
    when_full: WhenFull = "reject"
    upstreams: dict[str, UpstreamLimits] = Field(default_factory=dict)
