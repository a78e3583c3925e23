"""Filling in what the files only refer to: `${NAME}`, `${file:PATH}` and `{host.address}`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fleet.inventory.documents import Document, Location, Text, Wrong

Program = Literal["exporter", "remediator", "client"]
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# What each program never uses. References there stay unresolved, so that no program holds another's secrets.
_IGNORED: Mapping[Program, tuple[tuple[str, ...], ...]] = {
    "exporter": (
        ("notify",),
        ("remediation",),
        ("remediator",),
        ("hosts", "*", "sudo"),
        ("hosts", "*", "control_ssh"),
        ("services", "*", "control"),
    ),
    "remediator": (("services", "*", "probe"),),
    "client": (("notify",), ("hosts",), ("services",), ("exporter",)),
}


@dataclass
class Resolver:
    """Resolves the references of one document for `programs`; every value it fetched is in `secrets`."""

    document: Document
    environ: Mapping[str, str]
    programs: frozenset[Program]
    strict: bool = True  # whether a reference that cannot be resolved is an error; else it stays as written
    secrets: set[str] = field(default_factory=set)
    wrongs: list[Wrong] = field(default_factory=list)
    unresolved: list[Wrong] = field(default_factory=list)

    def resolve(self) -> dict[str, Any]:
        return {section: self._walk((section,), value) for section, value in self.document.value.items()}

    def _walk(self, location: tuple[str | int, ...], value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._walk((*location, str(key)), item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk((*location, index), item) for index, item in enumerate(value)]
        return self._text(location, value) if isinstance(value, Text) else value

    def _text(self, location: Location, text: Text) -> Text:
        used = self._is_used(location)
        if "${" not in text:
            return text if used else Text(text, text.base, checked=False)
        if not used:
            pending = any(match[0] != "$${" for match in _REFERENCE.finditer(text))
            return Text(text if pending else text.replace("$${", "${"), text.base, pending=pending, checked=False)
        count = len(self.wrongs)
        resolved = _REFERENCE.sub(lambda match: self._value(location, text, match), text)
        if not self.strict and len(self.wrongs) > count:
            self.unresolved += self.wrongs[count:]
            del self.wrongs[count:]
            return Text(text, text.base, pending=True, checked=False)
        return Text(resolved, text.base)

    def _is_used(self, location: Location) -> bool:
        return any(not any(_covers(pattern, location) for pattern in _IGNORED[program]) for program in self.programs)

    def _value(self, location: Location, text: Text, match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match[1]
        try:
            value = self._file(text.base / name[5:].strip()) if name.startswith("file:") else self._variable(name)
        except LookupError as error:
            self.wrongs.append(self.document.wrong(location, str(error.args[0])))
            return ""
        self.secrets.add(value)
        return value

    def _variable(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise LookupError(f"${{{name}}} is neither ${{NAME}} nor ${{file:PATH}} (write $${{ for a literal ${{)")
        value = self.environ.get(name, "")
        if not value:
            raise LookupError(f"the environment variable {name} is {'empty' if name in self.environ else 'not set'}")
        return value

    def _file(self, path: Path) -> str:
        try:
            value = path.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise LookupError(f"the secret file {path} cannot be read: {error.strerror}") from error
        except ValueError:
            raise LookupError(f"the secret file {path} is not text") from None
        if not value:
            raise LookupError(f"the secret file {path} is empty")
        return value


def _covers(pattern: tuple[str, ...], location: Location) -> bool:
    return len(location) >= len(pattern) and all(
        want in ("*", have) for want, have in zip(pattern, location, strict=False)
    )


def substitute(value: Any, service: str, host: str, address: str) -> Any:
    """Put `{service}`, `{host.name}` and `{host.address}` into every string of a probe or control."""
    return _map(value, lambda text: _substituted(text, service, host, address))


def _map(value: Any, change: Callable[[Text], Text]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return change(value) if isinstance(value, Text) else value


_SUBSTITUTION = re.compile(r"\{(service|host\.name|host\.address)\}(:?)")


def _substituted(text: Text, service: str, host: str, address: str) -> Text:
    if "{" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        if match[1] == "service":
            return service + match[2]
        if match[1] == "host.name":
            return host + match[2]
        in_url = match[2] or text[: match.start()].endswith("//")
        return (f"[{address}]" if ":" in address and in_url else address) + match[2]

    return Text(_SUBSTITUTION.sub(value, text), text.base, pending=text.pending, checked=text.checked)
