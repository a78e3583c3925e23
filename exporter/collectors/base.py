"""The base class of collectors, their common options, and their failure."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import AfterValidator, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from exporter.exposition.collector_samples import CollectorSamples
from fleet.host.sections import NOT_READ, Section, SectionOutput
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import PositiveDuration
from fleet.shells import ENDED_BY_TIMEOUT

MIN_INTERVAL = 0.2  # seconds between two runs
DEADLINE = 10.0  # seconds of a reading; the interval, if that is shorter
ReadSections = Callable[[Sequence[Section]], Awaitable[Mapping[str, SectionOutput]]]


def check_interval(every: float) -> float:
    if every < MIN_INTERVAL:
        raise ValueError(f"must be at least {MIN_INTERVAL * 1000:g}ms")
    return every


class CollectorOptions(ConfigModel):
    """The interval of a collector; `30s` is short for `{every: 30s}`."""

    every: Annotated[PositiveDuration, AfterValidator(check_interval)]

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return {"every": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a schema that allows the short form."""
        part = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [dict(part["properties"]["every"]), part]} if "properties" in part else part


@dataclass(frozen=True)
class LogExcerpt:
    """The last matching lines of a log, not masked, and when they were read (Unix time)."""

    source: str
    pattern: str
    read_at: float
    lines: Sequence[str]


CollectorOptionsT = TypeVar("CollectorOptionsT", bound=CollectorOptions)


class CollectorFailure(Exception):  # noqa: N818 - the counterpart of ProbeFailure
    """A collector could not read everything; what it read is in the samples. `late`: a command did not end in time."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Collector(Generic[CollectorOptionsT]):
    """A collector of one host. A `shared` collector uses the readings that probes of the host use, too."""

    shared: ClassVar[bool] = False
    max_readings: ClassVar[int] = 1  # of a run

    def __init__(self, options: CollectorOptionsT, host: str) -> None:
        self.options, self.host = options, host

    @property
    def deadline(self) -> float:
        """The longest duration of a reading, in seconds."""
        return min(DEADLINE, self.options.every)

    def sections(self) -> list[Section]:
        """Return all sections that the collector may read."""
        raise NotImplementedError

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        """Read sections and add samples. Raises CollectorFailure and ShellError."""
        raise NotImplementedError

    def list_excerpts(self) -> Sequence[LogExcerpt]:
        """Return the last matching lines of the logs that the collector reads."""
        return ()


class SteadyCounters:
    """Counters of a host that do not go back a little, as some of the kernel's do: Prometheus would see a reset.

    A value that goes back further is one: the device, the container or the host began anew.
    """

    _STEADY = 0.9  # of the last value

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}

    def start_run(self, samples: CollectorSamples) -> "CountSamples":
        """Return a function that adds counters to the samples of a run; those that it does not add are forgotten."""
        before, self._last = self._last, {}

        def count(metric: str, value: float | None, **labels: str) -> None:
            if value is None:
                return
            key = (metric, *labels.values())
            last = before.get(key, value)
            self._last[key] = last if self._STEADY * last <= value < last else value
            samples.add(metric, self._last[key], **labels)

        return count


class CountSamples(Protocol):
    """Adds a counter to samples, as CollectorSamples.add() does."""

    def __call__(self, metric: str, value: float | None, **labels: str) -> None: ...


def record_truncation(outputs: Mapping[str, SectionOutput], samples: CollectorSamples) -> None:
    """Record the lines that are missing because a section's output exceeded a limit."""
    for name, output in outputs.items():
        if output.truncated:
            samples.leave_out(output.truncated, f"the output of {name} is too long; lines left out: {output.truncated}")


def require_output(outputs: Mapping[str, SectionOutput], name: str) -> str:
    """Return the output of the section `name`. Raises CollectorFailure if it is missing or its script failed."""
    output = outputs.get(name)
    if output is None:
        raise CollectorFailure(f"the output of {name} is missing")
    if output.status == NOT_READ:
        raise CollectorFailure(f"cannot read {name}: {output.text}")
    if output.status in ENDED_BY_TIMEOUT:
        raise CollectorFailure(f"{name} did not answer in time", late=True)
    if output.status != 0:
        raise CollectorFailure(f"{name}: exit status {output.status}: {output.last_line}")
    return output.text
