"""Tables of the kinds of probes, controls, collectors and channels; a kind is imported when it is first used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from fleet.inventory.endpoints import ConfigModel

K = TypeVar("K")


class ConfigurableKind(Protocol):
    """A kind whose options stand in the configuration.

    The model of its options may have class variables: `needs_host`, `needs_root`, `needs_plain_shell` (the host's
    wrapper cannot run it), `wrapper_arguments` (the keys whose values the host's wrapper receives),
    `to_wrapper_argument` (a function that returns what it receives for such a value), `can_recreate`,
    `reports_components` (the probe says which parts of the service are up), `is_reported` (the service reports
    itself, and is not probed on a schedule), and `unique` (keys whose values no two services may share).
    """

    @property
    def options(self) -> type[ConfigModel]: ...


class LazyTable(Mapping[str, K]):
    """Kinds by name, imported at first use. `locations` maps each name to `module:attribute`."""

    def __init__(self, locations: Mapping[str, str]) -> None:
        self._locations = locations
        self._loaded: dict[str, K] = {}

    def __getitem__(self, name: str) -> K:
        if name not in self._loaded:
            module, _, attribute = self._locations[name].partition(":")
            self._loaded[name] = cast("K", getattr(import_module(module), attribute))
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, name: object) -> bool:
        return name in self._locations


@dataclass(frozen=True, eq=False)
class KindTables:
    """All kinds of probes, controls, channels and collectors, by their keys in the configuration."""

    probes: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    controls: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    channels: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    collectors: Mapping[str, ConfigurableKind] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class KindOptions:
    """Annotation of a field with the options of one kind, or None; the kind is imported when there is a value."""

    table: Mapping[str, ConfigurableKind]
    name: str

    @property
    def model(self) -> type[ConfigModel]:
        return self.table[self.name].options

    def _validate(self, value: Any) -> ConfigModel | None:
        return None if value is None else self.model.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(core_schema.nullable_schema(self.model.__pydantic_core_schema__))
