"""References in the configuration: `${NAME}`, `${file:PATH}` and placeholders such as `{host.address}`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fleet.inventory.documents import Document
from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.problems import ConfigProblem, Location
from fleet.inventory.yaml_files import TextWithBase
from runtime.tokens import TokenError, read_secret_file

Program = Literal["exporter", "remediator", "gateway", "client"]
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
_WHOLE_FILE = re.compile(r"\$\{file:([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# The parts that each program does not use. References there stay unresolved, so that it holds no secrets of others.
_IGNORED: Mapping[Program, tuple[tuple[str, ...], ...]] = {
    "exporter": (
        ("notify",),
        ("remediation",),
        ("remediator",),
        ("gateway",),
        ("runbooks",),
        ("access", "oidc"),
        ("access", "feishu"),
        ("hosts", "*", "sudo"),
        ("hosts", "*", "control_ssh"),
        ("services", "*", "control"),
    ),
    "remediator": (
        ("services", "*", "probe"),
        # All but its address and its token.
        *(("gateway", key) for key in GatewaySettings.model_fields if key not in ("url", "token")),
    ),
    "gateway": (
        ("notify",),
        ("remediation",),
        ("exporter",),
        ("remediator",),
        ("runbooks",),
        ("access", "oidc"),
        ("access", "feishu"),
        ("hosts",),
        ("services",),
        ("services_from",),
    ),
    "client": (
        ("notify",),
        ("access",),
        ("hosts",),
        ("services",),
        ("services_from",),
        ("runbooks",),
        ("exporter",),
        ("gateway",),
    ),
}

# The parts that a program can do without: what cannot be resolved there is no error.
_OPTIONAL: Mapping[Program, tuple[tuple[str, ...], ...]] = {
    # The secrets of `ssh` belong to the exporter where the remediator has a `control_ssh` of its own.
    "remediator": (("gateway", "token"), ("hosts", "*", "ssh", "passphrase"), ("hosts", "*", "ssh", "password")),
}

# Hosts and services have what they inherit from these, and references are resolved there.
_INHERITED: tuple[tuple[str, ...], ...] = (("templates",), ("defaults", "host"), ("defaults", "groups"))

# What stands for `$` and `{` in data, where they begin neither a reference nor a placeholder. Data does not contain it:
# these characters are not printable.
_DATA = str.maketrans({"$": "\U0010fffd", "{": "\U0010fffc"})
_NO_DATA = str.maketrans({"\U0010fffd": "$", "\U0010fffc": "{"})


@dataclass
class Resolver:
    """Resolves the references of a document for `programs`.

    `inserted` has the values of references, `secret_files` the files that they were read from.
    """

    document: Document
    environ: Mapping[str, str]
    programs: frozenset[Program]
    strict: bool = True  # whether a reference that cannot be resolved is an error; else it stays as it is written
    inserted: set[str] = field(default_factory=set)
    secret_files: set[Path] = field(default_factory=set)
    problems: list[ConfigProblem] = field(default_factory=list)
    unresolved: list[ConfigProblem] = field(default_factory=list)
    value_files: dict[str, Path] = field(default_factory=dict)  # of values that are a file's content, by their path

    def resolve(self) -> dict[str, Any]:
        """Return the sections with their references resolved; those that cannot be are in `problems`."""
        return {section: self._resolve((section,), value) for section, value in self.document.value.items()}

    def _resolve(self, location: tuple[str | int, ...], value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._resolve((*location, str(key)), item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve((*location, index), item) for index, item in enumerate(value)]
        return self._resolve_text(location, value) if isinstance(value, TextWithBase) else value

    def _resolve_text(self, location: Location, text: TextWithBase) -> TextWithBase:
        resolved = self._resolve_references(location, text)
        if (plain := unmark_data(resolved)) == resolved:
            return resolved
        return TextWithBase(
            plain,
            resolved.base,
            pending=resolved.pending,
            checked=resolved.checked,
            references=resolved.references,
        )

    def _resolve_references(self, location: Location, text: TextWithBase) -> TextWithBase:
        used = self._is_used(location)
        if "${" not in text:
            return text if used else TextWithBase(text, text.base, checked=False)
        if not used:
            pending = any(match[0] != "$${" for match in _REFERENCE.finditer(text))
            return TextWithBase(
                text if pending else text.replace("$${", "${"), text.base, pending=pending, checked=False
            )
        count = len(self.problems)
        resolved = self._insert_values(location, text)
        if (whole := _WHOLE_FILE.fullmatch(text)) is not None:
            self.value_files[".".join(map(str, location))] = text.base / whole[1].strip()
        if len(self.problems) > count and not (self.strict and self._is_required(location)):
            self.unresolved += self.problems[count:]
            del self.problems[count:]
            return TextWithBase(text, text.base, pending=True, checked=False)
        return resolved

    def _insert_values(self, location: Location, text: TextWithBase) -> TextWithBase:
        resolved, end = "", 0
        references: list[tuple[int, int]] = []
        for match in _REFERENCE.finditer(text):
            resolved += text[end : match.start()]
            value = "${" if match[0] == "$${" else self._look_up(location, text, match[1])
            if match[0] != "$${":
                references.append((len(resolved), len(resolved) + len(value)))
            resolved, end = resolved + value, match.end()
        return TextWithBase(resolved + text[end:], text.base, references=references)

    def _is_used(self, location: Location) -> bool:
        if any(_covers(pattern, location) for pattern in _INHERITED):
            return False
        return any(not _is_in(_IGNORED[program], location) for program in self.programs)

    def _is_required(self, location: Location) -> bool:
        """Whether a program cannot do without a part that is used."""
        users = [program for program in self.programs if not _is_in(_IGNORED[program], location)]
        return any(not _is_in(_OPTIONAL.get(program, ()), location) for program in users)

    def _look_up(self, location: Location, text: TextWithBase, name: str) -> str:
        try:
            if name.startswith("file:"):
                path = text.base / name.removeprefix("file:").strip()
                value = read_secret_file(path)
                self.secret_files.add(path)
            else:
                value = self._read_variable(name)
        except (LookupError, TokenError) as error:
            self.problems.append(self.document.problem_at(location, str(error.args[0])))
            return ""
        self.inserted.add(value)
        return value

    def _read_variable(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise LookupError(f"${{{name}}} is neither ${{NAME}} nor ${{file:PATH}}; write $${{ for a literal ${{")
        value = self.environ.get(name, "")
        if not value:
            raise LookupError(f"the environment variable {name} is {'empty' if name in self.environ else 'not set'}")
        return value


def _is_in(patterns: tuple[tuple[str, ...], ...], location: Location) -> bool:
    return any(_covers(pattern, location) for pattern in patterns)


def _covers(pattern: tuple[str, ...], location: Location) -> bool:
    return len(location) >= len(pattern) and all(
        key in ("*", part) for key, part in zip(pattern, location, strict=False)
    )


def mark_as_data(text: str) -> str:
    """Return a text in which nothing is a reference or a placeholder, until `unmark_data`."""
    return text.translate(_DATA)


def unmark_data(text: str) -> str:
    """Return a text with the characters of data that was inserted into it."""
    return text if text.isascii() else text.translate(_NO_DATA)


def substitute(value: Any, service: str, host: str, address: str) -> Any:
    """Replace `{service}`, `{host.name}` and `{host.address}` in every string of a probe or control."""
    return map_texts(value, lambda text: _replace_placeholders(text, service, host, address))


def map_texts(value: Any, change: Callable[[TextWithBase], Any]) -> Any:
    """Return a part of the configuration with its texts changed."""
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return change(value) if isinstance(value, TextWithBase) else value


_PLACEHOLDER = re.compile(r"\{(service|host\.name|host\.address)\}(:?)")


def _replace_placeholders(text: TextWithBase, service: str, host: str, address: str) -> TextWithBase:
    if "{" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        if match[1] == "service":
            return service + match[2]
        if match[1] == "host.name":
            return host + match[2]
        in_url = match[2] or text[: match.start()].endswith("//")
        return (f"[{address}]" if ":" in address and in_url else address) + match[2]

    return TextWithBase(_PLACEHOLDER.sub(value, text), text.base, pending=text.pending, checked=text.checked)
