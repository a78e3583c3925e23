"""Reading a directory of YAML files into one document that remembers where everything stands."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from runtime.errors import DefibError

Location = Sequence[str | int]
DEPTH_LIMIT = 100
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as fast


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong with the configuration, and where."""

    file: str
    line: int
    path: str
    what: str

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}: {where}{self.what}"


class ConfigurationError(DefibError):
    """The configuration cannot be used; `wrongs` has every reason."""

    def __init__(self, wrongs: Sequence[Wrong]) -> None:
        super().__init__("\n".join(map(str, wrongs)))
        self.wrongs = list(wrongs)


class Text(str):
    """A string of a YAML file, with the directory that its relative paths start from."""

    __slots__ = ("base", "checked", "pending")
    base: Path
    pending: bool  # a reference in it is left unresolved: somebody else's business, and no value to validate
    checked: bool  # this program uses it, so a file it names must be there

    def __new__(cls, text: str, base: Path, *, pending: bool = False, checked: bool = True) -> Self:
        made = super().__new__(cls, text)
        made.base, made.pending, made.checked = base, pending, checked
        return made


class _Loader(_Base):  # type: ignore[misc]
    """Safe YAML whose strings know their directory."""

    base = Path()

    def construct_text(self, node: yaml.ScalarNode) -> Text:
        return Text(self.construct_scalar(node), self.base)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


@dataclass
class _File:
    name: str
    root: yaml.Node | None
    value: Any


@dataclass
class Document:
    """The merged top-level maps of all files; `place` finds where a part of them was written."""

    value: dict[str, Any] = field(default_factory=dict)
    wrongs: list[Wrong] = field(default_factory=list)
    _origins: dict[tuple[str, ...], tuple[str, yaml.Node, yaml.Node]] = field(default_factory=dict)

    def place(self, location: Location) -> tuple[str, int]:
        """File and line of `location`, or of the nearest part above it that was written."""
        for depth in (2, 1):
            origin = self._origins.get(tuple(map(str, location[:depth])))
            if origin and len(location) >= depth:
                name, key, value = origin
                node = _descend(key, value, location[depth:])
                return name, node.start_mark.line + 1
        return (next(iter(self._origins.values()))[0] if self._origins else "configuration"), 1

    def wrong(self, location: Location, what: str) -> Wrong:
        return Wrong(*self.place(location), dotted(location), what)

    def add(self, file: _File) -> None:
        if file.root is None or file.value is None:
            return
        if not isinstance(file.root, yaml.MappingNode) or not isinstance(file.value, dict):
            line = file.root.start_mark.line + 1
            self.wrongs.append(Wrong(file.name, line, "", "a configuration file holds a map (hosts:, services:, …)"))
            return
        for key, value in file.root.value:
            if isinstance(key, yaml.ScalarNode):
                self._add_section(file, key, value)

    def _add_section(self, file: _File, key: yaml.ScalarNode, node: yaml.Node) -> None:
        section, value = key.value, file.value.get(key.value)
        if value is None:
            return
        self._origins.setdefault((section,), (file.name, key, node))
        if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
            if section not in self.value:
                self.value[section] = value
            return
        merged = self.value.setdefault(section, {})
        for inner, inner_value in node.value:
            if isinstance(inner, yaml.ScalarNode) and inner.value in value and isinstance(merged, dict):
                self._add_key(file, merged, section, inner, inner_value)

    def _add_key(
        self, file: _File, merged: dict[str, Any], section: str, key: yaml.ScalarNode, node: yaml.Node
    ) -> None:
        name = key.value
        first = self._origins.get((section, name))
        if first is not None and name in merged:
            if first[0] != file.name:
                where = f"{first[0]}:{first[1].start_mark.line + 1}"
                line = key.start_mark.line + 1
                self.wrongs.append(Wrong(file.name, line, f"{section}.{name}", f"is defined twice, first at {where}"))
            return
        merged[name] = file.value[section][name]
        self._origins[(section, name)] = (file.name, key, node)


def dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _descend(key: yaml.Node, value: yaml.Node, location: Location) -> yaml.Node:
    """The node to point at: the key for maps and what is missing, the value for a list's item."""
    for part in location:
        if isinstance(value, yaml.MappingNode):
            found = next((pair for pair in value.value if getattr(pair[0], "value", None) == str(part)), None)
            if found is None:
                continue  # a key that is missing, or a step of the model that has no key of its own
            key, value = found
        elif isinstance(value, yaml.SequenceNode) and isinstance(part, int) and part < len(value.value):
            key = value = value.value[part]
    return key


def read(directory: Path) -> Document:
    """Read every `*.yaml` and `*.yml` below `directory`; what cannot be read is in `wrongs`."""
    document = Document()
    if not directory.is_dir():
        raise ConfigurationError([Wrong(str(directory), 1, "", "is not a directory (name one with --config)")])
    paths = sorted(_files(directory))
    if not paths:
        raise ConfigurationError([Wrong(str(directory), 1, "", "holds no YAML file")])
    for path in paths:
        for file in _read_file(path, document.wrongs):
            document.add(file)
    return document


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*.y*ml"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix in (".yaml", ".yml") and path.is_file() and not hidden:
            yield path


def _read_file(path: Path, wrongs: list[Wrong]) -> Iterator[_File]:
    name = str(path)
    try:
        loader = _Loader(path.read_bytes())
    except OSError as error:
        wrongs.append(Wrong(name, 1, "", f"cannot be read: {error.strerror}"))
        return
    except yaml.YAMLError as error:
        wrongs.append(_yaml_wrong(name, error))
        return
    loader.base = path.parent.absolute()
    try:
        while loader.check_node():
            root = loader.get_node()
            wrongs.extend(_twice(name, root))
            if (why := _endless(root)) is not None:
                wrongs.append(Wrong(name, 1, "", f"is not usable YAML: {why}"))
                continue
            yield _File(name, root, loader.construct_document(root))
    except yaml.YAMLError as error:
        wrongs.append(_yaml_wrong(name, error))
    except (ValueError, RecursionError) as error:
        # An impossible date, or nesting beyond reason.
        wrongs.append(Wrong(name, 1, "", f"is not usable YAML: {error}"))
    finally:
        loader.dispose()


def _twice(name: str, root: yaml.Node) -> Iterator[Wrong]:
    """Keys that stand twice in one map, which YAML forbids and PyYAML lets pass."""
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left.extend(node.value)
            continue
        first: dict[str, int] = {}
        for key, value in node.value:
            left.append(value)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in first:
                    yield Wrong(name, line, key.value, f"is defined twice, first at {name}:{first[key.value]}")
                first.setdefault(key.value, line)


def _endless(root: yaml.Node) -> str | None:
    """Why a document cannot be walked to its ends, if it cannot."""
    inside: set[int] = set()
    done: set[int] = set()
    left: list[tuple[yaml.Node, bool]] = [(root, False)]
    while left:
        node, leaving = left.pop()
        if leaving:
            inside.discard(id(node))
            done.add(id(node))
        elif id(node) in inside:
            return "an alias stands inside what it names"
        elif not isinstance(node, yaml.ScalarNode) and id(node) not in done:
            inside.add(id(node))
            if len(inside) > DEPTH_LIMIT:
                return f"it nests deeper than {DEPTH_LIMIT} levels"
            left.append((node, True))
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(node, each) for each in node.value]
            left += [(value, False) for _key, value in pairs]
    return None


def _yaml_wrong(name: str, error: yaml.YAMLError) -> Wrong:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return Wrong(name, mark.line + 1 if mark else 1, "", f"is not YAML: {problem}")
