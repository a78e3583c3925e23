"""YAML files: their nodes, which know file and line, and their values, whose texts know their directory.

A file may use anchors of other files, those in sections whose names begin with `x-`.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from fleet.inventory.problems import ConfigProblem, format_path
from runtime.yaml_errors import explain_yaml_error

DEPTH_LIMIT = 100
SIZE_LIMIT = 5_000_000
_SECTION = re.compile(rb"^[\"']?x-", re.MULTILINE)
_DEEP = re.compile(rb"[ \t?:\0-]{45}")  # what precedes a block collection in its line, also in UTF-16
_ALIAS = re.compile(rb"[\s,:\[{]\*\w")  # or a text that looks like one
_UNKNOWN_FILE = "<byte string>"  # what PyYAML calls a file of which it has only the content
_Python: Any = yaml.SafeLoader
_Base: Any = getattr(yaml, "CSafeLoader", _Python)  # libyaml is ten times as fast
_SURROGATE_PAIR = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")


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


class _SharingLoader(_Python):  # type: ignore[misc]  # as above
    """A slower one that also knows the anchors of other files, and whose nodes know their file."""

    def __init__(self, source: bytes, path: Path, shared: Mapping[str, "_Anchor"]) -> None:
        super().__init__(source)
        self.name, self._shared = str(path), shared
        self.own: dict[str, yaml.Node] = {}  # anchors of the last document
        self.anchors: dict[str, yaml.Node] = {}

    def compose_document(self) -> Any:
        self.get_event()
        root = self.compose_node(None, None)
        self.get_event()
        self.own, self.anchors = self.anchors, {}
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            name = self.peek_event().anchor
            if name not in self.anchors and name in self._shared:
                return self._shared[name].use(self.get_event())
        return super().compose_node(parent, index)

    def construct_text(self, node: yaml.ScalarNode) -> TextWithBase:
        return TextWithBase(str(self.construct_scalar(node)), Path(node.start_mark.name).parent.absolute())


for _loader in (_Loader, _SharingLoader):
    _loader.add_constructor("tag:yaml.org,2002:str", _loader.construct_text)


@dataclass(frozen=True)
class _Anchor:
    node: yaml.Node
    other: yaml.Node | None = None  # of the same name in another file

    def use(self, alias: Any) -> yaml.Node:
        if self.other is not None:
            first, second = (f"{each.start_mark.name}:{each.start_mark.line + 1}" for each in (self.node, self.other))
            message = f"the anchor &{alias.anchor} is defined twice: at {first} and {second}"
            raise yaml.composer.ComposerError(None, None, message, alias.start_mark)
        return self.node


class SharedAnchors:
    """The anchors of sections whose names begin with `x-`, in any of some files; read when they are first needed.

    Such a section may use those of files before its own.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = paths

    @cached_property
    def by_name(self) -> Mapping[str, _Anchor]:
        found: dict[str, _Anchor] = {}
        for path in self._paths:
            with contextlib.suppress(OSError, yaml.YAMLError):  # reported when the file is read
                source = _join_surrogates(path.read_bytes())
                if _SECTION.search(source) is None or _nests_too_deep(source):
                    continue
                for name, node in _find_anchors(_SharingLoader(source, path, dict(found))):
                    found[name] = _Anchor(found[name].node, node) if name in found else _Anchor(node)
        return found


def _find_anchors(loader: _SharingLoader) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the anchors of a file that are in its sections for them."""
    while loader.check_node():
        root = loader.get_node()
        pairs = root.value if isinstance(root, yaml.MappingNode) else ()
        inside: set[int] = set()
        left = [value for key, value in pairs if str(key.value).startswith("x-")]
        while left:
            node = left.pop()
            if id(node) in inside or node.start_mark.name != loader.name:
                continue
            inside.add(id(node))
            if isinstance(node, yaml.MappingNode):
                left += [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                left += node.value
        yield from ((name, node) for name, node in loader.own.items() if id(node) in inside)


def locate_node(node: yaml.Node, file: str) -> tuple[str, int]:
    """Return file and line of a node of `file`, which may come from another one by its anchor."""
    mark = node.start_mark
    return file if mark.name == _UNKNOWN_FILE else mark.name, mark.line + 1


@dataclass
class YamlFile:
    """A document of a YAML file: its nodes, which know their lines, and its value."""

    name: str
    root: yaml.Node | None
    value: Any


def read_yaml_file(
    path: Path, problems: list[ConfigProblem], shared: SharedAnchors | None = None
) -> Sequence[YamlFile]:
    """Return the documents of a file; what is wrong is added to `problems`."""
    try:
        source = path.read_bytes()
    except OSError as error:
        problems.append(ConfigProblem(str(path), 1, "", f"cannot be read: {error.strerror}"))
        return ()
    return parse_yaml(path, source, problems, shared)


def parse_yaml(
    path: Path, source: bytes, problems: list[ConfigProblem], shared: SharedAnchors | None = None
) -> Sequence[YamlFile]:
    """Return the documents of a file that has been read; what is wrong is added to `problems`."""
    name = str(path)
    source = _join_surrogates(source)
    documents: list[YamlFile] = []
    try:
        if _nests_too_deep(source):
            problems.append(ConfigProblem(name, 1, "", f"nesting is deeper than {DEPTH_LIMIT} levels"))
        else:
            documents += _load(_create_loader(path, source, shared), name, problems)
    except yaml.YAMLError as error:
        problems.append(_yaml_problem(name, source, error))
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # such as for an impossible date
        message = f"invalid YAML: a value does not have the form of its type: {error}"
        problems.append(ConfigProblem(name, 1, "", message))
    return documents


def _create_loader(path: Path, source: bytes, shared: SharedAnchors | None) -> Any:
    """Return a loader for a file; the slower one only if it uses anchors of other files. Raises YAMLError."""
    if shared is not None and _ALIAS.search(source) is not None:
        aliases, own = set[str](), set[str]()
        for event in yaml.parse(source, Loader=_Base):
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                (aliases if isinstance(event, yaml.AliasEvent) else own).add(event.anchor)
        foreign = aliases - own
        if foreign and foreign & shared.by_name.keys():
            return _SharingLoader(source, path, shared.by_name)
    loader = _Loader(source)
    loader.base = path.parent.absolute()
    return loader


def _load(loader: Any, name: str, problems: list[ConfigProblem]) -> Iterator[YamlFile]:
    """Yield the documents of a file. Raises YAMLError, and ValueError for an impossible date."""
    try:
        while loader.check_node():
            root = loader.get_node()
            if (message := _check_aliases(root)) is not None:
                problems.append(ConfigProblem(name, 1, "", message))
                continue
            problems.extend(_check_keys(name, root))
            yield YamlFile(name, root, loader.construct_document(root))
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
    if source.count(b"[") + source.count(b"{") <= DEPTH_LIMIT and _DEEP.search(source) is None:
        return False  # a block collection begins in a column of its own, or is a list in the column of its map
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
        first: dict[str, str] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            file, line = locate_node(key, name)
            where = (*location, key.value)
            left.append((value, where))
            if key.tag != "tag:yaml.org,2002:str":
                message = f'key must be a string; write "{key.value}", in quotes'
                yield ConfigProblem(file, line, format_path(where), message)
            elif key.value in first:
                message = f"duplicate key, first defined at {first[key.value]}"
                yield ConfigProblem(file, line, format_path(where), message)
            first.setdefault(key.value, f"{file}:{line}")


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
