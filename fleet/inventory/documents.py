"""The configuration directory: its YAML files merged into one document that knows file and line of each value."""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from fleet.inventory.problems import ConfigProblem, ConfigurationError, Location, format_path
from fleet.inventory.yaml_files import SharedAnchors, YamlFile, locate_node, parse_yaml, read_yaml_file
from runtime.errors import StartError


def as_map(value: Any) -> dict[str, Any]:
    """Return a part of a configuration that is not checked yet, or nothing if it is no map."""
    return value if isinstance(value, dict) else {}


def as_maps(value: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of such a part that are maps."""
    return {str(key): item for key, item in as_map(value).items() if isinstance(item, dict)}


@dataclass
class Document:
    """The merged sections of all files; `locate` finds where a part of them was written."""

    value: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)
    warnings: list[ConfigProblem] = field(default_factory=list)
    files: Sequence[Path] = ()
    lists: dict[Path, ConfigProblem] = field(default_factory=dict)  # files that are lists: of targets, or errors
    # Names of hosts, groups and services that are not enabled, by `host`, `group` and `service`.
    disabled: Mapping[str, Collection[str]] = field(default_factory=dict)
    _origins: dict[tuple[str, ...], tuple[str, yaml.Node, yaml.Node, yaml.Node]] = field(default_factory=dict)
    _sources: dict[tuple[str, ...], list[Location]] = field(default_factory=dict)  # of hosts, services, their keys
    _places: dict[tuple[str, ...], str] = field(default_factory=dict)
    _kept: dict[tuple[str | int, ...], list[int]] = field(default_factory=dict)  # by list: the written items it has

    def locate(self, location: Location) -> tuple[str, int]:
        """Return file and line of `location`, or of its nearest parent that was written."""
        for depth in (2, 1):
            origin = self._origins.get(tuple(map(str, location[:depth])))
            if origin and len(location) >= depth:
                name, key, value, _root = origin
                node = _find_node(key, value, location[depth:])
                return locate_node(node, name)
        return (next(iter(self._origins.values()))[0] if self._origins else "configuration"), 1

    def is_written(self, location: Location) -> bool:
        """Whether the files have a value at `location`, which is not a default."""
        origin = self._origins.get(tuple(map(str, location[:2])))
        node = origin[2] if origin is not None else None
        for part in location[2:]:
            if isinstance(node, yaml.SequenceNode):
                node = node.value[part] if isinstance(part, int) and part < len(node.value) else None
            else:
                pairs = node.value if isinstance(node, yaml.MappingNode) else ()
                node = next((value for key, value in reversed(pairs) if getattr(key, "value", None) == part), None)
        return node is not None

    def inherit(self, location: Location, source: Location) -> None:
        """Note that a host, a service or one of its keys has what is written at `source`.

        What is written in itself comes first, then earlier sources, and those of the whole before those of a key.
        """
        self._sources.setdefault(tuple(map(str, location)), []).append(source)

    def add_place(self, location: Location, place: str) -> None:
        """Note where a service is listed that is written nowhere."""
        self._places[tuple(map(str, location))] = place

    def remove_items(self, location: Location, items: list[Any], *, remove: Callable[[Any], bool]) -> list[Any]:
        """Return the list at `location` without some items, and note which of the written ones are left."""
        kept = [index for index, item in enumerate(items) if not remove(item)]
        self._kept[tuple(location)] = kept
        return [items[index] for index in kept]

    def _restore_index(self, location: Location) -> Location:
        """Return a location with the index that an item had before others were removed."""
        for depth in range(1, len(location)) if self._kept else ():
            index, kept = location[depth], self._kept.get(tuple(location[:depth]))
            if kept is not None and isinstance(index, int):
                return (*location[:depth], kept[index], *location[depth + 1 :])
        return location

    def find_origin(self, location: Location) -> str | None:
        """Return `file:line` of a value, wherever it is written; None for a default."""
        written = self._find_source(self._restore_index(location))
        if not self.is_written(written):
            return None
        name, line = self.locate(written)
        return f"{name}:{line}"

    def problem_at(self, location: Location, message: str) -> ConfigProblem:
        """Return a problem with what a location has, wherever that is written."""
        location = self._restore_index(location)
        written = self._find_source(location)
        problem = ConfigProblem(*self.locate(written), format_path(written), message)
        if written is location:
            return problem
        place = self._places.get(tuple(map(str, location[:2])))
        user = f"{format_path(location[:2])}{f' from {place}' if place is not None else ''}"
        return replace(problem, user=user, location=format_path(location))

    def _find_source(self, location: Location) -> Location:
        """Return where the value of a location is written; where it would be if it is not written."""
        own = tuple(location[:2])
        sources = [
            (source, at)
            for at in (2, 3)
            if len(location) >= at
            for source in self._sources.get(tuple(map(str, location[:at])), ())
        ]
        if not sources:
            return location
        for depth in range(len(location), 2, -1):  # the innermost part that is written somewhere
            for source, at in ((own, 2), *sources):
                if self.is_written((*source, *location[at:depth])):
                    return location if source is own else (*source, *location[at:])
        source, at = sources[0]
        return location if tuple(map(str, own)) in self._origins else (*source, *location[at:])

    def add(self, file: YamlFile) -> None:
        """Merge a file's sections into the document."""
        if file.root is None or file.value is None:
            return
        if not isinstance(file.root, yaml.MappingNode) or not isinstance(file.value, dict):
            missing = " (is a space missing after the colon?)" if re.match(r"\w+:\S", str(file.value)) else ""
            message = f"a configuration file must be a map (hosts:, services:, …){missing}"
            problem = ConfigProblem(file.name, file.root.start_mark.line + 1, "", message)
            if isinstance(file.value, list):
                self.lists[Path(file.name)] = problem
            else:
                self.problems.append(problem)
            return
        for key, value in file.root.value:
            if isinstance(key, yaml.ScalarNode):
                self._add_section(file, key, value)

    def _add_section(self, file: YamlFile, key: yaml.ScalarNode, node: yaml.Node) -> None:
        section, value = key.value, file.value.get(key.value)
        if value is None or section.startswith("x-"):  # which has anchors for others
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
        self,
        file: YamlFile,
        merged: dict[str, Any],
        section: str,
        key: yaml.ScalarNode,
        node: yaml.Node,
        root: yaml.Node,
    ) -> None:
        name = key.value
        first = self._origins.get((section, name))
        if first is not None:
            if first[3] is not root:  # duplicates within one map were reported when the file was read
                place, line = locate_node(first[1], first[0])
                message = f"duplicate key, first defined at {place}:{line}"
                self.problems.append(ConfigProblem(*locate_node(key, file.name), f"{section}.{name}", message))
            return
        merged[name] = file.value[section][name]
        self._origins[(section, name)] = (file.name, key, node, root)


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
    directory = chosen or _find_default(environ)
    if directory is None:
        raise StartError(
            "no configuration found: set --config or DEFIB_CONFIG to its directory (tried ./config and /etc/defib)"
        )
    return directory


def has_configuration(chosen: Path | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a configuration directory; a default one without YAML files is none. Raises StartError."""
    directory = chosen or _find_default(environ)
    if directory is None or chosen is not None or environ.get("DEFIB_CONFIG"):
        return directory is not None
    problems: list[ConfigProblem] = []
    return any(_find_files(directory, problems)) or bool(problems)  # a file that cannot be read may be one


def _find_default(environ: Mapping[str, str]) -> Path | None:
    if environ.get("DEFIB_CONFIG"):
        return Path(environ["DEFIB_CONFIG"])
    for path in (Path("config"), Path("/etc/defib")):
        with contextlib.suppress(PermissionError):  # of the working directory
            if path.is_dir():
                if not path.is_absolute():
                    _check_trusted(path, environ)
                return path
    return None


def _check_trusted(directory: Path, environ: Mapping[str, str]) -> None:
    """Check that nobody else could have put a directory there: a configuration has commands, and URLs that get tokens.

    Root also trusts the user who has called `sudo`. Raises StartError.
    """
    status, user = directory.stat(), os.geteuid()
    trusted, caller = {0, user}, environ.get("SUDO_UID", "")
    if user == 0 and caller.isdecimal():
        trusted.add(int(caller))
    why = "it belongs to another user" if status.st_uid not in trusted else ""
    if status.st_mode & stat.S_IWOTH:
        why = "all users may write to it"
    if why:
        raise StartError(
            f"{directory.absolute()} is used only if --config or DEFIB_CONFIG names it, since {why}; nothing was done"
        )


def read_directory(directory: Path, unsaved: Mapping[Path, bytes] = MappingProxyType({})) -> Document:
    """Read every `*.yaml` and `*.yml` file below `directory`; `problems` lists what could not be read.

    `unsaved` has the content of further files, which do not exist yet. Raises ConfigurationError where there is nothing
    to read.
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
    shared = SharedAnchors(paths)
    for path in paths:
        for file in read_yaml_file(path, document.problems, shared):
            document.add(file)
    for path, source in unsaved.items():
        for file in parse_yaml(path, source, document.problems, shared):
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
