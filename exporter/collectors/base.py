"""What every collector is."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from exporter.exposition.collector_samples import CollectorSamples
from fleet.host.reading import NOT_READ, Output, Section
from fleet.inventory.endpoints import Part
from fleet.inventory.units import PositiveDuration
from fleet.shells import ENDED_BY_TIMEOUT

SHORTEST = 0.2  # seconds between two runs
ReadSections = Callable[[Sequence[Section]], Awaitable[Mapping[str, Output]]]


def _not_too_often(every: float) -> float:
    if every < SHORTEST:
        raise ValueError(f"is too often (at least {SHORTEST * 1000:g}ms)")
    return every


class CollectorOptions(Part):
    """How often a collector runs; `30s` stands for `{every: 30s}`."""

    every: Annotated[PositiveDuration, AfterValidator(_not_too_often)]

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"every": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The short form too."""
        part = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [dict(part["properties"]["every"]), part]} if "properties" in part else part


CollectorOptionsT = TypeVar("CollectorOptionsT", bound=CollectorOptions)


class CollectorFailure(Exception):  # noqa: N818 - the counterpart of a probe's failure
    """A collector could not read all that it should; what it could is in the samples. `late`: something hangs there."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Collector(Generic[CollectorOptionsT]):
    """One collector of one host. `shared` are those whose sections also answer probes of the host."""

    shared: ClassVar[bool] = False

    def __init__(self, options: CollectorOptionsT, host: str) -> None:
        self.options, self.host = options, host

    def sections(self) -> list[Section]:
        """Everything that it may want to be read."""
        raise NotImplementedError

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        """Read and add samples. Raises CollectorFailure and ShellError."""
        raise NotImplementedError


def require_output(outputs: Mapping[str, Output], name: str) -> str:
    """The text of a section that ended well. Raises CollectorFailure."""
    output = outputs.get(name)
    if output is None:
        raise CollectorFailure(f"{name} was not read to its end")
    if output.status == NOT_READ:
        raise CollectorFailure(f"{name} was not read to its end: {output.text}")
    if output.status in ENDED_BY_TIMEOUT:
        raise CollectorFailure(f"{name} did not answer in time", late=True)
    if output.status != 0:
        raise CollectorFailure(f"{name}: exit {output.status}: {output.last_line}")
    return output.text
