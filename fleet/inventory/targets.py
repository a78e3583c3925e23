"""Targets: the entries from which `services_from` makes services.

They are in files of the format that Prometheus' `file_sd_configs` reads, a list of `{targets: [ADDRESS], labels: {…}}`
as JSON or YAML, or in the stored answers of servers for its `http_sd_configs`. What is in them is data: references are
not resolved there.
"""

import glob
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from fleet.inventory.documents import as_map
from fleet.inventory.problems import ConfigProblem
from fleet.inventory.references import mark_as_data
from fleet.inventory.units import as_list
from fleet.inventory.yaml_files import TextWithBase, YamlFile, read_yaml_file
from runtime.errors import DefibError

SIZE_LIMIT = 32 * 1024 * 1024  # bytes of a file
TARGETS_LIMIT = 10_000  # of a file or an answer: ten times as many would keep the exporter from all other probes
TEXT_LIMIT = 2048  # characters of an address, and of a label's value
_UNUSUAL = re.compile(r"[^a-z0-9._]+")
_SCHEME = re.compile(r"(?:https?|tcp|udp|wss?|grpcs?)://", re.IGNORECASE)
ID_LENGTH = 63


@dataclass(frozen=True)
class FilePattern:
    """The path of a file, which may have wildcards, and where it starts if it is relative."""

    base: Path
    path: str

    def find(self) -> list[Path]:
        """Return the files that match; a path without wildcards also if there is no such file."""
        if not glob.has_magic(self.path):
            return [self.base / self.path]
        return [self.base / each for each in sorted(glob.glob(self.path, root_dir=self.base))]  # noqa: PTH207 - Path.glob() takes no absolute path


@dataclass(frozen=True)
class Target:
    """An address with labels, and the file and line of the list that has it."""

    address: str
    labels: Mapping[str, str]
    file: str
    line: int

    @property
    def host(self) -> str:
        return _split(self.address)[0]

    def find_values(self, labels: Iterable[str], base: Path) -> Mapping[str, TextWithBase]:
        """Return the values of its placeholders, and of some labels, where it has them; paths start from `base`."""
        host, port = _split(self.address)
        texts = {"target": self.address, "target.host": host, "target.port": port}
        texts |= {name: self.labels[name] for name in labels if name in self.labels}
        return {name: TextWithBase(mark_as_data(text), base) for name, text in texts.items()}


@dataclass
class TargetFiles:
    """The files of all sources, and the targets in them."""

    targets: dict[str, list[Target]] = field(default_factory=dict)  # by source
    files: list[Path] = field(default_factory=list)
    patterns: list[FilePattern] = field(default_factory=list)
    answers: dict[str, Path] = field(default_factory=dict)  # by source with a server: the file of its stored answer
    problems: list[ConfigProblem] = field(default_factory=list)

    def read(self, name: str, source: Mapping[str, Any], cache: Path) -> None:
        """Read the files of a source, as it is written; a server's answer that is not stored yet has no targets."""
        patterns = _list_patterns(source)
        paths = find_files(patterns)
        if (url := _find_url(source.get("http"))) is not None:
            answer = cache / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.json"
            self.answers[name] = answer
            patterns, paths = [FilePattern(cache, str(answer))], [answer] if answer.exists() else []
        self.patterns += patterns
        self.files += paths
        unique: dict[tuple[Any, ...], Target] = {}
        for path in paths:
            if (problem := _explain_unreadable(path)) is not None:
                self.problems.append(ConfigProblem(str(path), 0, "", problem))
                continue
            count = len(self.problems)
            files = list(read_yaml_file(path, self.problems))
            if not files and len(self.problems) == count:  # it may be being written
                self.problems.append(ConfigProblem(str(path), 0, "", "is empty; write [] if it has no targets"))
            for file in files:
                unique |= {(each.address, *sorted(each.labels.items())): each for each in self._parse(file)}
        self.targets[name] = list(unique.values())

    def _parse(self, file: YamlFile) -> Iterator[Target]:
        nodes = file.root.value if isinstance(file.root, yaml.SequenceNode) else ()
        try:
            groups = check_groups(file.value)
        except TargetError as error:
            node = nodes[error.index] if nodes else file.root
            line = node.start_mark.line + 1 if node is not None else 1
            self.problems.append(ConfigProblem(file.name, line, "", str(error)))
            return
        for group, node in zip(groups, nodes, strict=True):
            for address in group["targets"]:
                yield Target(str(address), as_map(group.get("labels")), file.name, node.start_mark.line + 1)


class TargetError(DefibError):
    """A list of targets does not have the right form; `index` is that of the entry."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def check_groups(value: Any) -> list[dict[str, Any]]:
    """Return the entries of a list of targets that was parsed from JSON or YAML. Raises TargetError."""
    if not isinstance(value, list):
        raise TargetError(0, "must be a list: [{targets: [host:port], labels: {name: value}}]")
    count = 0
    for index, entry in enumerate(value):
        targets, labels = as_map(entry).get("targets"), as_map(entry).get("labels") or {}
        if not isinstance(targets, list) or not all(each and _is_short_text(each) for each in targets):
            raise TargetError(index, "`targets` must be a list of addresses, such as [10.0.0.5:9100]")
        count += len(targets)
        if count > TARGETS_LIMIT:
            raise TargetError(index, f"there are more than {TARGETS_LIMIT} targets up to here")
        if not isinstance(labels, dict) or not all(map(_is_short_text, labels.values())):
            raise TargetError(index, "`labels` must be a map of texts; write numbers in quotes")
    return value


def find_files(patterns: Iterable[FilePattern]) -> list[Path]:
    """Return the files that match any of the patterns, each once."""
    return list(dict.fromkeys(path for each in patterns for path in each.find()))


def compute_fingerprint(patterns: Iterable[FilePattern]) -> Mapping[Path, bytes]:
    """Return a digest of each file's content; an empty one if it cannot be read."""
    return {path: _compute_digest(path) for path in find_files(patterns)}


def make_id(text: str) -> str:
    """Return a text as the ID of a service: other characters become `-`, and a long one ends in a digest."""
    id_ = _UNUSUAL.sub("-", _SCHEME.sub("", text).lower()).strip("-._")
    if len(id_) <= ID_LENGTH:
        return id_
    return f"{id_[: ID_LENGTH - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Return where answers are stored: in the directory that systemd provides, or in the user's cache.

    A user who cannot have one, such as an account without a home, has a directory for this process.
    """
    if environ.get("CACHE_DIRECTORY"):
        return Path(environ["CACHE_DIRECTORY"])
    directory = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defib"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(_temporary_directory().name)
    return directory if os.access(directory, os.W_OK | os.X_OK) else Path(_temporary_directory().name)


@cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="defib-")


def _list_patterns(source: Mapping[str, Any]) -> list[FilePattern]:
    """Return the files of a source; what is not valid is left out, since the model reports it."""
    files = (each for each in as_list(source.get("file")) if isinstance(each, TextWithBase))
    return [FilePattern(each.base, str(each)) for each in files if "\0" not in each]


def _find_url(endpoint: Any) -> str | None:
    url = endpoint.get("url") if isinstance(endpoint, dict) else endpoint
    return url if isinstance(url, str) else None


def _compute_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest() if _explain_unreadable(path) is None else b""
    except OSError:
        return b""


def _explain_unreadable(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return f"has more than {SIZE_LIMIT} bytes" if status.st_size > SIZE_LIMIT else None


def _is_short_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= TEXT_LIMIT


def _split(address: str) -> tuple[str, str]:
    """Return the host and the port of an address or a URL; empty where it has none."""
    try:
        parts = urlsplit(address if _SCHEME.match(address) else f"//{address}")
        return parts.hostname or "", str(parts.port or "")
    except ValueError:
        return "", ""
