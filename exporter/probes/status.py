"""The `status` probe: a JSON page that tells of a service's parts, such as a transcoder's channels."""

from typing import Annotated, Any

from jsonpath_rfc9535 import JSONPathNode
from pydantic import Field, PlainValidator

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.probes.expectations import (
    EXAMINED,
    JsonExpect,
    JsonPath,
    describe_mismatch,
    find_values,
    parse_json,
    recode_as_utf8,
    run_in_thread,
)
from exporter.probes.http import HttpExpect, check_response
from exporter.probes.net.http_client import HttpResponse, fetch
from exporter.probes.net.http_request import HttpRequestOptions
from exporter.results import ProbeDetails, ProbeFailure, replace_unencodable
from fleet.inventory.endpoints import Part

SHOWN = 200  # components that become series
NAMED = 5  # components that a message names
NAME_LIMIT = 100


class StatusComponents(Part):
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


class StatusProbeOptions(HttpRequestOptions):
    components: StatusComponents
    up_when: UpWhen = "all"
    expect: HttpExpect = HttpExpect()

    @property
    def wanted_ratio(self) -> float:
        """The share of the components that must be up; 0 stands for any one."""
        return {"all": 1.0, "any": 0.0}.get(self.up_when, 0.0) if isinstance(self.up_when, str) else self.up_when


async def probe_status(options: StatusProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    answer = await fetch(options, details)
    await check_response(options, options.expect, answer, details)
    components = await run_in_thread(_components, options.components, answer, details)
    details.components = dict(list(components.items())[:SHOWN])
    down = [name for name, up in components.items() if not up]
    details.evidence["components"] = f"{len(components) - len(down)} of {len(components)} up"
    if (len(components) - len(down)) / len(components) < options.wanted_ratio or len(down) == len(components):
        more = f" and {len(down) - NAMED} more" if len(down) > NAMED else ""
        wanted = options.up_when if isinstance(options.up_when, str) else f"{options.up_when:.0%}"
        names = details.redact(", ".join(down[:NAMED]))
        raise ProbeFailure(
            "state", f"{len(down)} of {len(components)} components are down: {names}{more}; expected {wanted} up"
        )


def _components(wanted: StatusComponents, answer: HttpResponse, details: ProbeDetails) -> dict[str, bool]:
    """Whether each part is up, by name; parts of one name are up together. Raises ProbeFailure."""
    page = parse_json(recode_as_utf8(answer.header("content-type"), answer.body))
    found: dict[str, bool] = {}
    for node in find_values(wanted.each, page):
        name = details.redact(_name(wanted, node))[:NAME_LIMIT]
        found[name] = found.get(name, True) and all(
            _meets(find_values(path, node.value), expected, details) for path, expected in wanted.up.items()
        )
    if not found:
        raise ProbeFailure("json", f"{wanted.each} finds no component")
    return found


def _name(wanted: StatusComponents, node: JSONPathNode) -> str:
    """What `name` finds in the part, or else its key or index in the page."""
    names = find_values(wanted.name, node.value).values() if wanted.name else []
    name = names[0] if names else node.location[-1] if node.location else "page"
    return replace_unencodable(str(name)[:EXAMINED])


def _meets(found: list[JSONPathNode], expected: Any, details: ProbeDetails) -> bool:
    return bool(found) and not any(describe_mismatch(expected, node.value, details) for node in found)


STATUS = ProbeKind(StatusProbeOptions, probe_status)
