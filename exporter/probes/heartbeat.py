"""The `heartbeat` probe: the service reports itself, and is up while its pings arrive in time.

The options are here. `exporter.heartbeats` receives the pings and determines the state.
"""

from datetime import datetime
from itertools import islice, pairwise
from typing import Annotated, ClassVar
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, SecretStr, model_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import check_lacks, check_matches
from exporter.probes.json_conditions import JsonExpect, check_json, parse_json
from exporter.results import ProbeDetails
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.heartbeats import check_every, is_uuid
from fleet.inventory.notify import check_timezone
from fleet.inventory.units import Duration, Identifier, Patterns, PositiveDuration, format_duration

CRON_FIELDS = 5
COMPARED_TIMES = 50  # of a cron expression
_SOME_DAY = datetime(2000, 1, 1, tzinfo=ZoneInfo("UTC"))


def _check_cron(expression: str) -> str:
    hint = "write '*/10 * * * *', in quotes"
    if len(expression.split()) != CRON_FIELDS:
        raise ValueError(f"{expression!r} is not a cron expression: it needs {CRON_FIELDS} fields; {hint}")
    try:
        next(CronSim(expression, _SOME_DAY))
    except CronSimError as error:
        raise ValueError(f"{expression!r} is not a cron expression: {error}; {hint}") from None
    except StopIteration:
        raise ValueError(f"{expression!r} never comes: there is no such day") from None
    return expression


def _check_uuid(value: SecretStr) -> SecretStr:
    if not is_uuid(value.get_secret_value()):
        raise ValueError("is not a UUID; write 01234567-89ab-cdef-0123-456789abcdef")
    return SecretStr(value.get_secret_value().lower())


class HeartbeatExpect(ConfigModel):
    """What the body of a successful ping must be; a ping with another one counts as failed."""

    body_matches: Patterns = []
    body_lacks: Patterns = []
    json_: JsonExpect = Field(default_factory=dict, alias="json")


class HeartbeatProbeOptions(ConfigModel):
    is_reported: ClassVar[bool] = True
    unique: ClassVar[tuple[str, ...]] = ("uuid",)
    every: Annotated[PositiveDuration, AfterValidator(check_every)] | None = None
    cron: Annotated[str, AfterValidator(_check_cron)] | None = None
    timezone: Annotated[str, AfterValidator(check_timezone)] | None = None  # of `cron`; otherwise `notify.timezone`
    grace: Duration = 300.0
    start_grace: PositiveDuration = 3600.0
    slug: Identifier | None = None
    uuid: Annotated[SecretStr, AfterValidator(_check_uuid)] | None = None
    expect: HeartbeatExpect = HeartbeatExpect()

    @model_validator(mode="after")
    def _has_one_schedule(self) -> "HeartbeatProbeOptions":
        if (self.every is None) is (self.cron is None):
            raise ValueError("must have exactly one of every, cron")
        if self.timezone is not None and self.cron is None:
            raise ValueError("timezone: only `cron` has a time zone")
        return self

    def longest_interval(self) -> float:
        """Return the longest time in seconds between two pings, among the first times of a cron expression."""
        if self.cron is None:
            return self.every or 0.0
        times = [each.timestamp() for each in islice(CronSim(self.cron, _SOME_DAY), COMPARED_TIMES)]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def describe_schedule(self) -> str:
        """Return when pings are due, in words."""
        return f"every {format_duration(self.every)}" if self.every is not None else f"at {self.cron!r}"


def check_body(expect: HeartbeatExpect, body: bytes, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless the body of a ping is as expected."""
    check_matches(expect.body_matches, body, "the ping's body", details)
    check_lacks(expect.body_lacks, body, "the ping's body", details)
    if expect.json_:
        check_json(expect.json_, parse_json(body), details)


async def probe_heartbeat(_options: HeartbeatProbeOptions, context: ProbeContext, _details: ProbeDetails) -> None:
    context.check_heartbeat()


HEARTBEAT = ProbeKind(HeartbeatProbeOptions, probe_heartbeat)
