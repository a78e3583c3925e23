"""The `status` probe: a JSON page that reports the components of a service, such as a transcoder's channels."""

import math
from typing import Annotated, Any, ClassVar, TypeGuard

from jsonpath_rfc9535 import JSONPathNode
from pydantic import Field, PlainValidator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import recode_as_utf8
from exporter.probes.http import HttpExpect, check_response, decode_unless_refused
from exporter.probes.json_conditions import JsonExpect, JsonPath, Visits, find_json_problem, find_values, parse_json
from exporter.probes.net.http_client import fetch
from exporter.probes.net.http_request import HttpRequestOptions
from exporter.probes.net.http_response import HttpResponse
from exporter.probes.peer_work import run_in_thread
from exporter.probes.values import ValueName
from exporter.results import Component, ProbeDetails, ProbeFailure, Scalar, replace_unencodable
from fleet.inventory.endpoints import ConfigModel

COMPONENTS_LIMIT = 200  # that become series
VALUES_LIMIT = 10  # of each component
NAMED_IN_MESSAGE = 5  # components
NAME_LIMIT = VALUE_LIMIT = 100  # characters


class StatusComponents(ConfigModel):
    """Where the components are in the page, the name of each, when it is up, and which of its values are shown."""

    each: JsonPath
    name: JsonPath | None = None
    up: JsonExpect = Field(min_length=1)
    values: dict[ValueName, JsonPath] = Field(default_factory=dict, max_length=VALUES_LIMIT)


def _parse_up_when(value: object) -> str | float:
    if value in ("all", "any"):
        return str(value)
    text = str(value)
    try:
        ratio = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        ratio = 0.0
    if isinstance(value, bool) or not 0 < ratio <= 1:
        raise ValueError("must be all, any, or a ratio (write 0.8 or 80%)")
    return ratio


UpWhen = Annotated[str | float, PlainValidator(_parse_up_when, json_schema_input_type=str | float)]


class StatusProbeOptions(HttpRequestOptions):
    reports_components: ClassVar[bool] = True
    components: StatusComponents
    up_when: UpWhen = "all"
    expect: HttpExpect = HttpExpect()

    @property
    def min_ratio_up(self) -> float:
        """The ratio of components that must be up; 0 stands for at least one."""
        return {"all": 1.0, "any": 0.0}.get(self.up_when, 0.0) if isinstance(self.up_when, str) else self.up_when


async def probe_status(options: StatusProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    response = await fetch(options, details)
    components = await run_in_thread(options.request.host, _check_page, options, response, details)
    details.components = dict(list(components.items())[:COMPONENTS_LIMIT])
    down = [name for name, each in components.items() if not each.up]
    up_count = len(components) - len(down)
    details.evidence["components"] = f"{up_count} of {len(components)} up"
    if up_count / len(components) < options.min_ratio_up or not up_count:
        more = f" and {len(down) - NAMED_IN_MESSAGE} more" if len(down) > NAMED_IN_MESSAGE else ""
        required = options.up_when if isinstance(options.up_when, str) else f"{options.up_when:.0%}"
        names = details.redact(", ".join(down[:NAMED_IN_MESSAGE]))
        raise ProbeFailure(
            "state", f"{len(down)} of {len(components)} components are down: {names}{more}; expected {required} up"
        )


def _check_page(options: StatusProbeOptions, response: HttpResponse, details: ProbeDetails) -> dict[str, Component]:
    """Check a response, and return its components. Raises ProbeFailure."""
    response = decode_unless_refused(options, options.expect.status, response, details)
    check_response(options, options.expect, response, details)
    return _parse_components(options.components, response, details)


def _parse_components(options: StatusComponents, response: HttpResponse, details: ProbeDetails) -> dict[str, Component]:
    """Return the components by name; those of one name are all up or down, with the values of the first.

    Raises ProbeFailure.
    """
    page = parse_json(recode_as_utf8(response.header("content-type"), response.body))
    components: dict[str, Component] = {}
    visits = Visits()

    def is_up(component: Any) -> bool:
        return not any(
            find_json_problem(path, expected, component, visits, details) for path, expected in options.up.items()
        )

    for node in find_values(options.each, page, visits):
        name = details.redact.redact_head(_component_name(options, node, visits), NAME_LIMIT)
        up = is_up(node.value)
        first = components.get(name)
        if first is not None:
            components[name] = Component(first.up and up, first.values)
        else:
            is_shown = len(components) < COMPONENTS_LIMIT
            components[name] = Component(up, _read_values(options, node.value, visits, details) if is_shown else {})
    if not components:
        raise ProbeFailure("json", f"{options.each} selects no component")
    return components


def _component_name(options: StatusComponents, node: JSONPathNode, visits: Visits) -> str:
    """Return what `name` selects in the component, or else its key or index in the page."""
    names = find_values(options.name, node.value, visits).values() if options.name else []
    name = names[0] if names else node.location[-1] if node.location else "page"
    return replace_unencodable(str(name))


def _read_values(options: StatusComponents, component: Any, visits: Visits, details: ProbeDetails) -> dict[str, Scalar]:
    """Return the first value that each path selects, without those that are missing, too long or no scalars."""
    found = {name: find_values(path, component, visits).values()[:1] for name, path in options.values.items()}
    return {
        name: details.redact(replace_unencodable(value)) if isinstance(value, str) else value
        for name, values in found.items()
        for value in values
        if _is_shown(value)
    }


def _is_shown(value: Any) -> TypeGuard[Scalar]:
    if not isinstance(value, Scalar) or len(str(value)) > VALUE_LIMIT:
        return False
    return isinstance(value, str) or math.isfinite(value)  # 1e999 is a valid number of JSON


STATUS = ProbeKind(StatusProbeOptions, probe_status)
