"""YAML of files that are no part of the inventory: its keys are text, and none stands twice in a map."""

import re
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


class _TextLoader(_Loader):
    """Reads only null, true, false and plain whole numbers as such; others, such as 012345 and 1.50, stay texts."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", "~nN\0"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"(?:0|-?[1-9][0-9]{0,17})", "-0123456789"),
):
    _TextLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"{_pattern}\Z"), list(_first))
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])


def load_unique(source: bytes, *, keeps_texts: bool = False) -> Any:
    """Return the document in a file. Raises yaml.YAMLError, RecursionError and `INVALID_VALUES`.

    With `keeps_texts`, most values without quotes are texts as they are written.
    """
    return yaml.load(source, _TextLoader if keeps_texts else _Loader)  # noqa: S506 - safe loaders
