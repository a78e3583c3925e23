"""The configuration directory: its YAML files merged into one document that knows file and line of each value."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from runtime.errors import DefibError, StartError
from runtime.yaml_errors import explain_yaml_error

Location = Sequence[str | int]
DEPTH_LIMIT = 100
SIZE_LIMIT = 5_000_000
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast
_SURROGATE_PAIR = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")


@dataclass(frozen=True)
class ConfigProblem:
    """An error or a warning about the configuration, with the file, line and key that it is about.

    The line is 0 if it is about the file itself.
    """

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.file}{f':{self.line}' if self.line else ''}: {where}{self.message}"


class ConfigurationError(DefibError):
    """The configuration has errors; `problems` lists all of them."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


class TextWithBase(str):
    """A string from a YAML file, with the directory that relative paths in it start from."""

    __slots__ = ("base", "checked", "pending", "references")
    base: Path
    pending: bool  # it contains a reference that this program does not resolve: not validated
    checked: bool  # this program uses it, so a file that it names must exist
    references: Sequence[tuple[int, int]]  # where values of references were inserted: start and end

    def __new__(
        cls,
        text: str,
        base: Path,
        *,
        pending: bool = False,
        checked: bool = True,
        references: Sequence[tuple[int, int]] = (),
    ) -> Self:
        instance = super().__new__(cls, text)
        instance.base, instance.pending, instance.checked = base, pending, checked
        instance.references = references
        return instance


class _Loader(_Base):  # type: ignore[misc]  # the base class is chosen at run time
    """A safe YAML loader whose strings know their directory."""

    base = Path()

    def construct_text(self, node: yaml.ScalarNode) -> TextWithBase:
        return TextWithBase(self.construct_scalar(node), self.base)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


@dataclass
class _File:
    name: str
    root: yaml.Node | None
    value: Any


@dataclass
class Document:
    """The merged sections of all files; `locate` finds where a part of them was written."""

    value: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)
    files: Sequence[Path] = ()
    _origins: dict[tuple[str, ...], tuple[str, yaml.Node, yaml.Node, yaml.Node]] = field(default_factory=dict)

    def locate(self, location: Location) -> tuple[str, int]:
        """Return file and line of `location`, or of its nearest parent that was written."""
        for depth in (2, 1):
            origin = self._origins.get(tuple(map(str, location[:depth])))
            if origin and len(location) >= depth:
                name, key, value, _root = origin
                node = _find_node(key, value, location[depth:])
                return name, node.start_mark.line + 1
        return (next(iter(self._origins.values()))[0] if self._origins else "configuration"), 1

    def is_written(self, location: Location) -> bool:
        """Whether the files have a value at `location`, which is not a default."""
        origin = self._origins.get(tuple(map(str, location[:2])))
        node = origin[2] if origin is not None else None
        for part in location[2:]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((value for key, value in reversed(pairs) if getattr(key, "value", None) == part), None)
        return node is not None

    def problem_at(self, location: Location, message: str) -> ConfigProblem:
        return ConfigProblem(*self.locate(location), format_path(location), message)

    def add(self, file: _File) -> None:
        """Merge a file's sections into the document."""
        if file.root is None or file.value is None:
            return
        if not isinstance(file.root, yaml.MappingNode) or not isinstance(file.value, dict):
            missing = " (is a space missing after the colon?)" if re.match(r"\w+:\S", str(file.value)) else ""
            message = f"a configuration file must be a map (hosts:, services:, …){missing}"
            self.problems.append(ConfigProblem(file.name, file.root.start_mark.line + 1, "", message))
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
        # Keys that `<<` merged come first in node.value, so that a map's own keys replace them here.
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
            if first[3] is not root:  # duplicates within one map were reported when the file was read
                message = f"duplicate key, first defined at {first[0]}:{first[1].start_mark.line + 1}"
                self.problems.append(ConfigProblem(file.name, key.start_mark.line + 1, f"{section}.{name}", message))
            return
        merged[name] = file.value[section][name]
        self._origins[(section, name)] = (file.name, key, node, root)


def format_path(location: Location) -> str:
    """Return a location as it is shown: `notify.routes[0].channels`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _find_node(key: yaml.Node, value: yaml.Node, location: Location) -> yaml.Node:
    """Return the node to point at: the key of a map's entry, or the item of a list."""
    for part in location:
        if isinstance(value, yaml.MappingNode):
            found = next((pair for pair in reversed(value.value) if getattr(pair[0], "value", None) == str(part)), None)
            if found is None:
                continue  # a missing key, or a part of the location that the file does not spell out
            key, value = found
        elif isinstance(value, yaml.SequenceNode) and isinstance(part, int) and part < len(value.value):
            key = value = value.value[part]
    return key


def find_directory(chosen: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the configuration directory: `chosen`, `$DEFIB_CONFIG`, `./config` or `/etc/defib`. Raises StartError."""
    if chosen is not None:
        return chosen
    if environ.get("DEFIB_CONFIG"):
        return Path(environ["DEFIB_CONFIG"])
    for path in (Path("config"), Path("/etc/defib")):
        with contextlib.suppress(PermissionError):  # of the working directory
            if path.is_dir():
                return path
    raise StartError(
        "no configuration found: set --config or DEFIB_CONFIG to its directory (tried ./config and /etc/defib)"
    )


def read_directory(directory: Path) -> Document:
    """Read every `*.yaml` and `*.yml` file below `directory`; `problems` lists what could not be read.

    Raises ConfigurationError where there is nothing to read.
    """
    document = Document()
    try:
        exists = directory.is_dir()
    except PermissionError:
        exists = True  # it may; the next check reports it
    if not exists:
        message = "is not a directory; set --config to the configuration directory"
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", message)])
    if not os.access(directory, os.R_OK | os.X_OK):
        message = "permission denied; run the command as the user of the service: sudo -u defib defib …"
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", message)])
    paths = sorted(_find_files(directory, document.problems))
    if not paths and not document.problems:
        raise ConfigurationError([ConfigProblem(str(directory), 1, "", "contains no YAML files (*.yaml, *.yml)")])
    document.files = paths
    for path in paths:
        for file in _read_file(path, document.problems):
            document.add(file)
    return document


def _find_files(directory: Path, problems: list[ConfigProblem]) -> Iterator[Path]:
    """Yield the YAML files below a directory; folders and files that cannot be opened are added to `problems`."""

    def report(error: OSError) -> None:
        problems.append(ConfigProblem(str(error.filename), 1, "", f"cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(directory, onerror=report):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix not in (".yaml", ".yml"):
                continue
            try:
                if stat.S_ISREG(path.stat().st_mode):
                    yield path
            except OSError as error:
                report(error)


def _read_file(path: Path, problems: list[ConfigProblem]) -> Iterator[_File]:
    name = str(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        problems.append(ConfigProblem(name, 1, "", f"cannot be read: {error.strerror}"))
        return
    source = _join_surrogates(source)
    try:
        too_deep = _nests_too_deep(source)
        loader = _Loader(source)
    except yaml.YAMLError as error:
        problems.append(_yaml_problem(name, source, error))
        return
    if too_deep:
        problems.append(ConfigProblem(name, 1, "", f"nesting is deeper than {DEPTH_LIMIT} levels"))
        return
    loader.base = path.parent.absolute()
    try:
        while loader.check_node():
            root = loader.get_node()
            if (message := _check_aliases(root)) is not None:
                problems.append(ConfigProblem(name, 1, "", message))
                continue
            problems.extend(_check_keys(name, root))
            yield _File(name, root, loader.construct_document(root))
    except yaml.YAMLError as error:
        problems.append(_yaml_problem(name, source, error))
    except ValueError as error:  # an impossible date
        problems.append(ConfigProblem(name, 1, "", f"invalid YAML: {error}"))
    finally:
        loader.dispose()


def _join_surrogates(source: bytes) -> bytes:
    r"""Replace the surrogate pairs by which JSON writes characters beyond U+FFFF: YAML has `\U0001f600` for them."""
    if _SURROGATE_PAIR.search(source) is None:
        return source
    try:
        for _token in yaml.scan(source, Loader=_Base):
            pass
    except yaml.YAMLError:
        return _SURROGATE_PAIR.sub(_join_pair, source)
    return source  # outside double quotes, a backslash is an ordinary character


def _join_pair(match: re.Match[bytes]) -> bytes:
    high, low = int(match[2], 16), int(match[3], 16)
    return match[1] + b"\\U%08x" % (0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


def _nests_too_deep(source: bytes) -> bool:
    """Whether the nesting would overflow the stack of libyaml's loader."""
    if source.count(b"[") + source.count(b"{") <= DEPTH_LIMIT:
        return False  # without flow collections, depth needs indentation
    depth = 0
    for event in yaml.parse(source, Loader=_Base):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_LIMIT:
                return True
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return False


def _check_keys(name: str, root: yaml.Node) -> Iterator[ConfigProblem]:
    """Yield duplicate keys, which PyYAML accepts, and keys that are not strings."""
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
                message = f'key must be a string; write "{key.value}", in quotes'
                yield ConfigProblem(name, line, format_path(where), message)
            elif key.value in first:
                message = f"duplicate key, first defined at {name}:{first[key.value]}"
                yield ConfigProblem(name, line, format_path(where), message)
            first.setdefault(key.value, line)


def _check_aliases(root: yaml.Node) -> str | None:
    """Return why a document cannot be expanded: it contains itself, or is too large with its aliases written out."""
    inside: set[int] = set()
    sizes: dict[int, int] = {}  # of finished nodes, with their aliases written out
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
                return f"the aliases expand to more than {SIZE_LIMIT} values"
        elif id(node) in inside:
            return "an alias refers to the value that contains it"
        else:
            inside.add(id(node))
            left.append((node, True))
            left += [(child, False) for child in children]
    return None


def _yaml_problem(name: str, source: bytes, error: yaml.YAMLError) -> ConfigProblem:
    line, cause = explain_yaml_error(source, error)
    return ConfigProblem(name, line, "", f"invalid YAML: {cause}")
