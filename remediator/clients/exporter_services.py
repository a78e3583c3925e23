"""The services in the exporter's answers: which fields are used, and of which types they must be."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from runtime.validation_messages import describe_first

LATEST = 253_370_764_800.0  # the year 9999, in Unix time


def _check_time(text: str) -> str:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None or not 0 <= at.timestamp() < LATEST:
        raise ValueError("not a time in RFC 3339 since 1970")
    return text


Time = Annotated[str, AfterValidator(_check_time)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Component(_Strict):
    name: str
    up: bool


class _Result(_Strict):
    success: bool | None = None
    reason: str | None = None
    message: str | None = None
    started_at: Time | None = None
    duration_seconds: FiniteFloat | None = None


class _Agent(_Strict):
    status: str | None
    stuck: str


class _Service(_Strict):
    id: str
    up: bool | None
    last: _Result | None
    since: Time | None = None
    unchanged_for_seconds: FiniteFloat | None = None
    recent: str | None = None
    components: list[_Component] = []
    components_down: list[str] | None = None
    digest: str | None = None
    host_up: bool | None = None
    paused: bool | None = None
    created: bool = False
    job_started_at: Time | None = None
    agent: _Agent | None = None


_SERVICES, _RESULTS = TypeAdapter(list[_Service]), TypeAdapter(list[_Result])


def check_services(services: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the services, whose other fields are unchecked. Raises ValueError."""
    return _check(_SERVICES, services, "services")


def check_results(results: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the results of probes, whose other fields are unchecked. Raises ValueError."""
    return _check(_RESULTS, results, "results")


def _check(adapter: TypeAdapter[Any], values: Sequence[Mapping[str, Any]], name: str) -> Sequence[Mapping[str, Any]]:
    try:
        adapter.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{name}.{describe_first(error, '')}") from None
    return values
