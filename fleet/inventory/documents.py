"""Reading a directory of YAML files into one document that remembers where everything stands."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from runtime.errors import DefibError, StartError

Location = Sequence[str | int]
DEPTH_LIMIT = 100
SIZE_LIMIT = 5_000_000
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as fast


@dataclass(frozen=True)
class ConfigProblem:
    """One thing that is wrong with the configuration, and where."""

    file: str
    line: int
    path: str
    what: str

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}: {where}{self.what}"


class ConfigurationError(DefibError):
    """The configuration cannot be used; `problems` has every reason."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


class ConfigText(str):
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

    def construct_text(self, node: yaml.ScalarNode) -> ConfigText:
        return ConfigText(self.construct_scalar(node), self.base)


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
    problems: list[ConfigProblem] = field(default_factory=list)
    _origins: dict[tuple[str, ...], tuple[str, yaml.Node, yaml.Node, yaml.Node]] = field(default_factory=dict)

    def place(self, location: Location) -> tuple[str, int]:
        """File and line of `location`, or of the nearest part above it that was written."""
        for depth in (2, 1):
            origin = self._origins.get(tuple(map(str, location[:depth])))
            if origin and len(location) >= depth:
                name, key, value, _root = origin
                node = _descend(key, value, location[depth:])
                return name, node.start_mark.line + 1
        return (next(iter(self._origins.values()))[0] if self._origins else "configuration"), 1

    def problem_at(self, location: Location, what: str) -> ConfigProblem:
        return ConfigProblem(*self.place(location), format_path(location), what)

    def add(self, file: _File) -> None:
        if file.root is None or file.value is None:
            return
        if not isinstance(file.root, yaml.MappingNode) or not isinstance(file.value, dict):
            line = file.root.start_mark.line + 1
            self.problems.append(
                ConfigProblem(file.name, line, "", "a configuration file holds a map (hosts:, services:, …)")
            )
            return
        for key, value in file.root.value:
            if isinstance(key, yaml.ScalarNode):
                self._add_section(file, key, value)

    def _add_section(self, file: _File, key: yaml.ScalarNode, node: yaml.Node) -> None:
        section, value = key.value, file.value.get(key.value)
        if value is None:
            return
        self._origins.setdefault((section,), (file.name, key, node, node))
        if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
            self.problems.append(ConfigProblem(file.name, key.start_mark.line + 1, section, "must be a map"))
            return
        merged = self.value.setdefault(section, {})
        # What `<<` brought stands before a map's own keys, which win.
        own = {key.value: (key, inner) for key, inner in node.value if isinstance(key, yaml.ScalarNode)}
        for name, (inner_key, inner) in own.items():
            if name in value:
                self._add_key(file, merged, section, inner_key, inner, node)

    def _add_key(
        self, file: _File, merged: dict[str, Any], section: str, key: yaml.ScalarNode, node: yaml.Node, root: yaml.Node
    ) -> None:
        name = key.value
        first = self._origins.get((section, name))
        if first is not None:
            if first[3] is not root:  # within one map, that was told when the file was read
                where = f"{first[0]}:{first[1].start_mark.line + 1}"
                line = key.start_mark.line + 1
                self.problems.append(
                    ConfigProblem(file.name, line, f"{section}.{name}", f"is defined twice, first at {where}")
                )
            return
        merged[name] = file.value[section][name]
        self._origins[(section, name)] = (file.name, key, node, root)


def format_path(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _descend(key: yaml.Node, value: yaml.Node, location: Location) -> yaml.Node:
    """The node to point at: the key for maps and what is missing, the value for a list's item."""
    for part in location:
        if isinstance(value, yaml.MappingNode):
            found = next((pair for pair in reversed(value.value) if getattr(pair[0], "value", None) == str(part)), None)
            if found is None:
                continue  # a key that is missing, or a step of the model that has no key of its own
            key, value = found
        elif isinstance(value, yaml.SequenceNode) and isinstance(part, int) and part < len(value.value):
            key = value = value.value[part]
    return key


def find_directory(chosen: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The configuration directory: as chosen, `$DEFIB_CONFIG`, `./config`, `/etc/defib`. Raises StartError."""
    if chosen is not None:
        return chosen
    if environ.get("DEFIB_CONFIG"):
        return Path(environ["DEFIB_CONFIG"])
    for path in (Path("config"), Path("/etc/defib")):
        with contextlib.suppress(PermissionError):  # of the folder that this was begun in
            if path.is_dir():
                return path
    raise StartError(
        "no configuration: name its directory with --config or DEFIB_CONFIG (looked for ./config, /etc/defib)"
    )


def read_directory(directory: Path) -> Document:
    """Read every `*.yaml` and `*.yml` below `find_directory`; what cannot be read is in `problems`."""
    document = Document()
    try:
        there = directory.is_dir()
    except PermissionError:
        there = True  # for all that this user may see
    if not there:
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", "is not a directory (name one with --config)")])
    if not os.access(directory, os.R_OK | os.X_OK):
        why = "cannot be read by this user; the programs' own can: sudo -u defib defib …"
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", why)])
    paths = sorted(_files(directory))
    if not paths:
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", "holds no YAML file")])
    for path in paths:
        for file in _read_file(path, document.problems):
            document.add(file)
    return document


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*.y*ml"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix in (".yaml", ".yml") and path.is_file() and not hidden:
            yield path


def _read_file(path: Path, problems: list[ConfigProblem]) -> Iterator[_File]:
    name = str(path)
    try:
        text = path.read_bytes()
        too_deep = _nests_too_deep(text)
        loader = _Loader(text)
    except OSError as error:
        problems.append(ConfigProblem(name, 1, "", f"cannot be read: {error.strerror}"))
        return
    except yaml.YAMLError as error:
        problems.append(_yaml_wrong(name, error))
        return
    if too_deep:
        problems.append(ConfigProblem(name, 1, "", f"is not usable YAML: it nests deeper than {DEPTH_LIMIT} levels"))
        return
    loader.base = path.parent.absolute()
    try:
        while loader.check_node():
            root = loader.get_node()
            if (why := _endless(root)) is not None:
                problems.append(ConfigProblem(name, 1, "", f"is not usable YAML: {why}"))
                continue
            problems.extend(_bad_keys(name, root))
            yield _File(name, root, loader.construct_document(root))
    except yaml.YAMLError as error:
        problems.append(_yaml_wrong(name, error))
    except ValueError as error:  # an impossible date
        problems.append(ConfigProblem(name, 1, "", f"is not usable YAML: {error}"))
    finally:
        loader.dispose()


def _nests_too_deep(text: bytes) -> bool:
    """Whether composing would recurse too deep, which libyaml's loader does not survive."""
    if text.count(b"[") + text.count(b"{") <= DEPTH_LIMIT:
        return False  # without flow collections, depth needs indentation
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_LIMIT:
                return True
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return False


def _bad_keys(name: str, root: yaml.Node) -> Iterator[ConfigProblem]:
    """Keys that stand twice in one map, which YAML forbids and PyYAML lets pass, and keys that are no text."""
    seen: set[int] = set()
    left: list[tuple[yaml.Node, tuple[str | int, ...]]] = [(root, ())]
    while left:
        node, location = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left.extend((item, (*location, index)) for index, item in enumerate(node.value))
            continue
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, where = key.start_mark.line + 1, (*location, key.value)
            left.append((value, where))
            if key.tag != "tag:yaml.org,2002:str":
                yield ConfigProblem(
                    name, line, format_path(where), f'is no text as a key: write "{key.value}", in quotes'
                )
            elif key.value in first:
                yield ConfigProblem(
                    name, line, format_path(where), f"is defined twice, first at {name}:{first[key.value]}"
                )
            first.setdefault(key.value, line)


def _endless(root: yaml.Node) -> str | None:
    """Why a document cannot be walked to its ends, if it cannot."""
    inside: set[int] = set()
    sizes: dict[int, int] = {}  # of what is done, with its aliases written out
    left: list[tuple[yaml.Node, bool]] = [(root, False)]
    while left:
        node, leaving = left.pop()
        if isinstance(node, yaml.ScalarNode) or (id(node) in sizes and not leaving):
            continue
        children = [value for _key, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
        if leaving:
            inside.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in children)
            if sizes[id(node)] > SIZE_LIMIT:
                return "its aliases stand for too much"
        elif id(node) in inside:
            return "an alias stands inside what it names"
        else:
            inside.add(id(node))
            left.append((node, True))
            left += [(child, False) for child in children]
    return None


def _yaml_wrong(name: str, error: yaml.YAMLError) -> ConfigProblem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return ConfigProblem(name, mark.line + 1 if mark else 1, "", f"is not YAML: {problem}")
