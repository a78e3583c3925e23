"""Thresholds of the alerts of hosts and services.

The defaults in these models are the built-in thresholds. The rules in `alerts/rules` have the same values for hosts and
services without thresholds of their own; a test compares them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, GetJsonSchemaHandler, PlainSerializer, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import (
    DURATION_SCHEMA,
    SIZE_SCHEMA,
    format_duration,
    format_ratio,
    format_size,
    format_value,
    parse_positive_duration,
    parse_ratio,
    parse_size,
)

OFF = math.inf
_OFF_SCHEMA = {"enum": ["off", False, None]}  # without a value: the built-in default
_RATIO_SCHEMA = {
    "anyOf": [
        {"type": "string", "pattern": r"^\d+(\.\d+)?%$"},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    ]
}


def _is_off(value: object) -> bool:
    return value is False or value in ("off", "false")  # YAML reads `off` as false


def _drop_empty(value: Any) -> Any:
    """Return a map without what has no value: that is the built-in default."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _threshold(parse: Callable[[object], float], show: Callable[[float], object], schema: dict[str, Any]) -> Any:
    """Return the type of a threshold that `parse` reads and `show` writes, unless it is off."""
    return Annotated[
        float,
        BeforeValidator(lambda value: OFF if _is_off(value) else parse(value)),
        PlainSerializer(lambda value: "off" if value == OFF else show(value)),
        WithJsonSchema({"anyOf": [schema, _OFF_SCHEMA]}),
    ]


def _number_above(least: int, example: int) -> Any:
    def parse(value: object) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if isinstance(value, bool) or not least < number < math.inf:
            raise ValueError(f"must be a number greater than {least}, such as {example}, not {format_value(value)}")
        return number

    def show(number: float) -> float:
        return int(number) if number.is_integer() else number

    return _threshold(parse, show, {"type": "number", "exclusiveMinimum": least})


Ratio: Any = _threshold(parse_ratio, format_ratio, _RATIO_SCHEMA)
Span: Any = _threshold(parse_positive_duration, format_duration, DURATION_SCHEMA)
Space: Any = _threshold(lambda value: float(parse_size(value)), format_size, SIZE_SCHEMA)
Load: Any = _number_above(0, example=4)
Count: Any = _number_above(0, example=5)
Celsius: Any = _number_above(0, example=88)
Factor: Any = _number_above(1, example=3)


class Thresholds(ConfigModel):
    """The thresholds of one resource by severity; `off` is short for all of them."""

    fires_below: ClassVar[bool] = False  # the alert fires for values below the threshold, not above it
    off_fires: ClassVar[bool] = False  # without this threshold, the alert depends on others alone

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        if _is_off(value):
            return dict.fromkeys(cls.model_fields, "off")
        return _drop_empty(value)

    @model_validator(mode="after")
    def _check_order(self) -> "Thresholds":
        values = dict(self)
        warning, critical = values.get("warning", OFF), values.get("critical", OFF)
        # A reference that is not resolved is text.
        if not isinstance(warning, float) or not isinstance(critical, float) or OFF in (warning, critical):
            return self
        if warning <= critical if self.fires_below else warning >= critical:
            relation = "greater" if self.fires_below else "less"
            raise ValueError(f"{self._describe('warning')} must be {relation} than {self._describe('critical')}")
        return self

    def _describe(self, severity: str) -> str:
        origin = "" if severity in self.model_fields_set else ", the default"
        return f"{severity} ({self.model_dump()[severity]}{origin})"

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a schema that allows the short form."""
        part = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [_OFF_SCHEMA, part]} if "properties" in part else part


class FilesystemThresholds(Thresholds):
    warning: Ratio = 0.8
    critical: Ratio = 0.9


class AvailableSpaceThresholds(Thresholds):
    """How much space may be left at most for the alert of a full filesystem to fire."""

    fires_below: ClassVar[bool] = True
    off_fires: ClassVar[bool] = True
    warning: Space = 200.0 * 2**30
    critical: Space = 100.0 * 2**30


class MemoryThresholds(Thresholds):
    warning: Ratio = 0.85
    critical: Ratio = 0.95


class LoadThresholds(Thresholds):
    warning: Load = 4.0
    critical: Load = 8.0


class GpuTemperatureThresholds(Thresholds):
    warning: Celsius = 88.0


class GpuMemoryTemperatureThresholds(Thresholds):
    warning: Celsius = 98.0


class ClockOffsetThresholds(Thresholds):
    warning: Span = 1.0


class UsageThresholds(Thresholds):
    """The share of a limit of the kernel that is in use."""

    warning: Ratio = 0.8
    critical: Ratio = 0.95


class NetworkErrorThresholds(Thresholds):
    """The share of packets with errors."""

    warning: Ratio = 0.01


class DiskQueueThresholds(Thresholds):
    """The average number of requests to a disk that wait or are in progress."""

    warning: Count = 10.0


class RestartThresholds(Thresholds):
    """How often a container or unit is restarted automatically within 30 minutes."""

    warning: Count = 5.0


class LogMatchThresholds(Thresholds):
    """How many lines of a log match a pattern within 5 minutes."""

    warning: Count = 10.0


class HttpErrorThresholds(Thresholds):
    """The share of requests in an access log that failed with 5xx."""

    warning: Ratio = 0.01


class CertificateThresholds(Thresholds):
    """How long before a certificate expires the alert fires.

    The built-in ones are limits: an alert about a certificate with a short lifetime fires when 20 % (warning) or 10 %
    (critical) of it are left.
    """

    fires_below: ClassVar[bool] = True
    warning: Span = 21 * 86400.0
    critical: Span = 7 * 86400.0


class SlowdownThresholds(Thresholds):
    """How many times slower than on the last day a service is when the alert fires."""

    warning: Factor = 3.0


class TokenRateThresholds(Thresholds):
    """The share of the last day's tokens per second below which the alert fires."""

    fires_below: ClassVar[bool] = True
    warning: Ratio = 0.5


class ChangedThreshold(NamedTuple):
    """A threshold that differs from the built-in one, in base units; infinite, in its direction, if it is off."""

    resource: str
    severity: str
    value: float


class ThresholdTable(ConfigModel):
    """Thresholds by resource."""

    @model_validator(mode="before")
    @classmethod
    def _use_defaults(cls, value: Any) -> Any:
        return _drop_empty(value)

    def list_changed(self) -> Iterator[ChangedThreshold]:
        """Yield the thresholds that differ from the built-in ones."""
        for resource, thresholds in self:
            for severity, field in type(thresholds).model_fields.items():
                value = getattr(thresholds, severity)
                if value != field.default:
                    is_negative = value == OFF and thresholds.fires_below and not thresholds.off_fires
                    yield ChangedThreshold(resource, severity, -value if is_negative else value)


class HostThresholds(ThresholdTable):
    filesystem: FilesystemThresholds = FilesystemThresholds()
    filesystem_available: AvailableSpaceThresholds = AvailableSpaceThresholds()
    inodes: FilesystemThresholds = FilesystemThresholds()
    memory: MemoryThresholds = MemoryThresholds()
    load: LoadThresholds = LoadThresholds()
    clock_offset: ClockOffsetThresholds = ClockOffsetThresholds()
    conntrack: UsageThresholds = UsageThresholds()
    file_descriptors: UsageThresholds = UsageThresholds()
    network_errors: NetworkErrorThresholds = NetworkErrorThresholds()
    disk_queue: DiskQueueThresholds = DiskQueueThresholds()
    restarts: RestartThresholds = RestartThresholds()
    log_matches: LogMatchThresholds = LogMatchThresholds()
    http_errors: HttpErrorThresholds = HttpErrorThresholds()
    gpu_temperature: GpuTemperatureThresholds = GpuTemperatureThresholds()
    gpu_memory_temperature: GpuMemoryTemperatureThresholds = GpuMemoryTemperatureThresholds()


class ServiceThresholds(ThresholdTable):
    certificate: CertificateThresholds = CertificateThresholds()
    slowdown: SlowdownThresholds = SlowdownThresholds()
    token_rate: TokenRateThresholds = TokenRateThresholds()
