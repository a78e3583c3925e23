"""What every collector is."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from exporter.exposition.samples import Samples
from fleet.host.sections import NOT_READ, Section, SectionOutput
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import PositiveDuration
from fleet.shells import ENDED_BY_TIMEOUT

SHORTEST = 0.2  # seconds between two runs
Read = Callable[[Sequence[Section]], Awaitable[Mapping[str, SectionOutput]]]


def _not_too_often(every: float) -> float:
    if every < SHORTEST:
        raise ValueError(f"is too often (at least {SHORTEST * 1000:g}ms)")
    return every


class Every(ConfigModel):
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


Options = TypeVar("Options", bound=Every)


class CollectFailure(Exception):  # noqa: N818 - the counterpart of a probe's failure
    """A collector could not read all that it should; what it could is in the samples. `late`: something hangs there."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Collecting(Generic[Options]):
    """One collector of one host. `shared` are those whose sections also answer probes of the host."""

    shared: ClassVar[bool] = False

    def __init__(self, options: Options, host: str) -> None:
        self.options, self.host = options, host

    def sections(self) -> list[Section]:
        """Everything that it may want to be read."""
        raise NotImplementedError

    async def collect(self, read: Read, samples: Samples) -> None:
        """Read and add samples. Raises CollectFailure and ShellError."""
        raise NotImplementedError


def good(outputs: Mapping[str, SectionOutput], name: str) -> str:
    """The text of a section that ended well. Raises CollectFailure."""
    output = outputs.get(name)
    if output is None:
        raise CollectFailure(f"{name} was not read to its end")
    if output.status == NOT_READ:
        raise CollectFailure(f"{name} was not read to its end: {output.text}")
    if output.status in ENDED_BY_TIMEOUT:
        raise CollectFailure(f"{name} did not answer in time", late=True)
    if output.status != 0:
        raise CollectFailure(f"{name}: exit {output.status}: {output.last_line}")
    return output.text
