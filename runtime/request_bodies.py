"""Bodies of requests."""

from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import ApiError
from runtime.payloads import load_json
from runtime.validation_messages import MESSAGES, describe_first

MAX_REQUEST = 64 * 1024  # bytes of a body that is parsed
_MESSAGES = {
    **MESSAGES,
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "must be an object"),
    "extra_forbidden": "unknown key",
}


class RequestBody(BaseModel):
    """What a request may have as JSON; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


B = TypeVar("B", bound=RequestBody)


async def read_request_body(request: web.Request, limit: int) -> bytes:
    """Return the body of a request. Raises ApiError: 413 if it exceeds `limit` bytes, 400 if its end is missing."""
    body = b""
    try:
        async for part in request.content.iter_any():
            body += part
            if len(body) > limit:
                raise ApiError(413, "too_large", f"the body is larger than {limit // 1024} KiB")
    except (web.RequestPayloadError, ConnectionError) as error:  # the client has gone, or its chunks are malformed
        raise ApiError(400, "bad_request", "cannot read the body") from error
    return body


async def parse_request(request: web.Request, model: type[B]) -> B:
    """Parse the JSON body; an empty body is an empty object. Raises ApiError."""
    text = await read_request_body(request, MAX_REQUEST)
    try:
        values = load_json(text or b"{}")
    except ValueError as error:
        raise ApiError(400, "bad_request", "the body is not JSON") from error
    return validate_body(values, model)


def validate_body(values: Any, model: type[B]) -> B:
    """Return the body that has these values. Raises ApiError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ApiError(400, "bad_request", describe_first(error, "the body", _MESSAGES)) from None
