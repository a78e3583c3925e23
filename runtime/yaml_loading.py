"""YAML of files that are no part of the inventory: its keys are text, and none stands twice in a map."""

from typing import Any

import yaml

DUPLICATE = "duplicate key"  # the beginning of that problem
# What PyYAML raises for a value that does not have the form of its type, such as the date 2026-13-45.
INVALID_VALUES = (ValueError, LookupError, AttributeError, OverflowError, TypeError)


class _Loader(yaml.SafeLoader):
    """Refuses keys that are lists or maps, and duplicate ones: the later one would silently replace the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be text; one that starts with { or [ must be in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{DUPLICATE} {key.value!r}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_unique(source: bytes) -> Any:
    """Return the document in a file. Raises yaml.YAMLError, RecursionError and `INVALID_VALUES`."""
    return yaml.load(source, _Loader)  # noqa: S506 - a safe loader
