"""Pings of heartbeats in the name of a person, as both programs receive them."""

from typing import Annotated, Literal

from pydantic import Field

from runtime.request_bodies import RequestBody

PingKind = Literal["start", "success", "fail", "log"]
BODY_LIMIT = 10_000  # bytes of a ping's body that are kept; characters of a person's message


class PingBody(RequestBody):
    """The body of a request that sends a ping."""

    kind: PingKind = "success"
    exit_status: Annotated[int, Field(ge=0, le=255)] | None = None
    message: Annotated[str, Field(max_length=BODY_LIMIT)] = ""
