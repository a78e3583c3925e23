"""The `status` probe: a JSON page that tells of a service's parts, such as a transcoder's channels."""

from typing import Annotated, Any

from jsonpath_rfc9535 import JSONPathNode
from pydantic import Field, PlainValidator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import EXAMINED, JsonExpect, JsonPath, apart, parse_json, unmet_by, utf8, values_at
from exporter.probes.http import HttpExpect, judged
from exporter.probes.net.http_client import Answer, fetch
from exporter.probes.net.http_request import RequestOptions
from exporter.results import ProbeFailure, Seen, sayable
from fleet.inventory.endpoints import ConfigModel

SHOWN = 200  # components that become series
NAMED = 5  # components that a message names
NAME_LIMIT = 100


class Components(ConfigModel):
    """Where the parts stand in the page, what each is called, and when it is up."""

    each: JsonPath
    name: JsonPath | None = None
    up: JsonExpect = Field(min_length=1)


def _up_when(value: object) -> str | float:
    if value in ("all", "any"):
        return str(value)
    text = str(value)
    try:
        ratio = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        ratio = 0.0
    if isinstance(value, bool) or not 0 < ratio <= 1:
        raise ValueError("is not all, any, or a ratio (write 0.8 or 80%)")
    return ratio


UpWhen = Annotated[str | float, PlainValidator(_up_when, json_schema_input_type=str | float)]


class StatusOptions(RequestOptions):
    components: Components
    up_when: UpWhen = "all"
    expect: HttpExpect = HttpExpect()

    @property
    def wanted_ratio(self) -> float:
        """The share of the components that must be up; 0 stands for any one."""
        return {"all": 1.0, "any": 0.0}.get(self.up_when, 0.0) if isinstance(self.up_when, str) else self.up_when


async def probe_status(options: StatusOptions, _means: Means, seen: Seen) -> None:
    answer = await fetch(options, seen)
    await judged(options, options.expect, answer, seen)
    components = await apart(_components, options.components, answer, seen)
    seen.components = dict(list(components.items())[:SHOWN])
    down = [name for name, up in components.items() if not up]
    seen.evidence["components"] = f"{len(components) - len(down)} of {len(components)} up"
    if (len(components) - len(down)) / len(components) < options.wanted_ratio or len(down) == len(components):
        more = f" and {len(down) - NAMED} more" if len(down) > NAMED else ""
        wanted = options.up_when if isinstance(options.up_when, str) else f"{options.up_when:.0%}"
        names = seen.redact(", ".join(down[:NAMED]))
        raise ProbeFailure(
            "state", f"{len(down)} of {len(components)} components are down: {names}{more}; expected {wanted} up"
        )


def _components(wanted: Components, answer: Answer, seen: Seen) -> dict[str, bool]:
    """Whether each part is up, by name; parts of one name are up together. Raises ProbeFailure."""
    page = parse_json(utf8(answer.header("content-type"), answer.body))
    found: dict[str, bool] = {}
    for node in values_at(wanted.each, page):
        name = seen.redact(_name(wanted, node))[:NAME_LIMIT]
        found[name] = found.get(name, True) and all(
            _meets(values_at(path, node.value), expected, seen) for path, expected in wanted.up.items()
        )
    if not found:
        raise ProbeFailure("json", f"{wanted.each} finds no component")
    return found


def _name(wanted: Components, node: JSONPathNode) -> str:
    """What `name` finds in the part, or else its key or index in the page."""
    names = values_at(wanted.name, node.value).values() if wanted.name else []
    name = names[0] if names else node.location[-1] if node.location else "page"
    return sayable(str(name)[:EXAMINED])


def _meets(found: list[JSONPathNode], expected: Any, seen: Seen) -> bool:
    return bool(found) and not any(unmet_by(expected, node.value, seen) for node in found)


STATUS = Kind(StatusOptions, probe_status)
