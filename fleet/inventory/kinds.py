"""Tables of kinds: the kinds of probes, controls, collectors and channels, each loaded when it is first used."""

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
    """What the inventory must know of a kind: the model of its options."""

    @property
    def options(self) -> type[ConfigModel]: ...


class LazyTable(Mapping[str, K]):
    """Kinds by name. `places` has each one's place as `module:attribute`; the module is imported at first use."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._loaded: dict[str, K] = {}

    def __getitem__(self, name: str) -> K:
        if name not in self._loaded:
            module, _, attribute = self._places[name].partition(":")
            self._loaded[name] = cast("K", getattr(import_module(module), attribute))
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


@dataclass(frozen=True, eq=False)
class KindTables:
    """Every kind of probe, control, channel and collector, by the key that names it in the configuration."""

    probes: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    controls: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    channels: Mapping[str, ConfigurableKind] = field(default_factory=dict)
    collectors: Mapping[str, ConfigurableKind] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class KindOptions:
    """Annotates a field that holds the options of one kind, or None; the kind is loaded when there is a value."""

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
