"""The JSON Schema of configuration files, for editors.

It describes files as they are written, before `fleet.inventory.expansion`: a host or service may have only the keys
that it does not inherit, so that none is required there.
"""

from typing import Any

from fleet.inventory.kinds import KindTables
from fleet.inventory.model import RemediationStep, SudoOptions, inventory_model

_RANGE = r"^[a-z0-9._-]*\[[0-9]{1,6}-[0-9]{1,6}\][a-z0-9._-]*$"
_INSERTED = {"type": "string", "pattern": r"\$\{|\{n([+-][0-9]+)?\}"}  # a reference, or the number of a range's host


def json_schema(kinds: KindTables) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    schema = inventory_model(kinds).model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Defib configuration"
    _describe_written_form(schema["$defs"], kinds)
    _allow_references(schema)
    for section in schema["properties"]:
        schema["properties"][section] = {"anyOf": [schema["properties"][section], {"type": "null"}]}
    hosts = schema["properties"]["hosts"]["anyOf"][0]["patternProperties"]
    hosts[_RANGE] = next(iter(hosts.values()))
    schema["patternProperties"] = {"^x-": {}}
    return schema


def _describe_written_form(models: dict[str, Any], kinds: KindTables) -> None:
    for name, table in (("Probe", kinds.probes), ("Control", kinds.controls), ("Channel", kinds.channels)):
        models[name].pop("required", None)  # `defaults` may provide it
        chosen = [{"required": [kind]} for kind in table]
        inherited = [] if name == "Channel" else [{"not": {"anyOf": chosen}}]
        models[name]["oneOf"] = [*chosen, *inherited]
    inheriting = [models[name] for name in ("Host", "Service")]
    inheriting += [
        models[reference.removeprefix("#/$defs/")]
        for name in ("Probe", "Control", "Collect")
        for part in models[name]["properties"].values()
        for reference in _find_references(part)
    ]
    for model in inheriting:
        for form in (model, *model.get("anyOf", ())):
            form.pop("required", None)
    for name in ("Host", "HostDefaults"):  # where an empty value removes a default
        properties = models[name]["properties"]
        properties.update({key: {"anyOf": [part, {"type": "null"}]} for key, part in properties.items()})
    for model, short in (
        (SudoOptions, {"enum": ["none", "passwordless"]}),
        (RemediationStep, {"enum": list(RemediationStep.choices)}),
    ):
        models[model.__name__] = {"anyOf": [short, models[model.__name__]]}


def _find_references(part: Any) -> list[str]:
    """Return the models of an option, which may have a short form or be left out."""
    return [each["$ref"] for each in (part, *part.get("anyOf", ())) if "$ref" in each]


def _allow_references(part: Any) -> None:
    """Allow `${NAME}` in place of numbers, booleans and patterns; refuse keys that match no pattern."""
    if isinstance(part, list):
        for item in part:
            _allow_references(item)
    if not isinstance(part, dict):
        return
    if "patternProperties" in part:
        part["additionalProperties"] = False
    for key, item in list(part.items()):
        if key in ("properties", "patternProperties", "$defs"):
            for name, each in list(item.items()):
                _allow_references(each)
                if key == "properties" and _is_narrow(each):
                    item[name] = {"anyOf": [each, _INSERTED]}
        else:
            _allow_references(item)


def _is_narrow(part: Any) -> bool:
    return isinstance(part, dict) and (
        part.get("type") in ("integer", "number", "boolean")
        or "pattern" in part
        or any(map(_is_narrow, part.get("anyOf", ())))
    )
