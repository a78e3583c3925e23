"""Loading the configuration: from a directory of YAML files to a validated inventory, or all of its errors."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError

from fleet.inventory.checks import find_errors, find_warnings
from fleet.inventory.digests import compute_digest
from fleet.inventory.documents import Document, as_maps, read_directory
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.expansion import expand
from fleet.inventory.kinds import KindTables
from fleet.inventory.model import (
    MIN_INTERVAL,
    ControlSettings,
    Inventory,
    ProbeSettings,
    Server,
    find_connection_path,
    inventory_model,
)
from fleet.inventory.problems import ConfigProblem, ConfigurationError
from fleet.inventory.references import Program, Resolver, substitute
from fleet.inventory.secrets import find_secrets
from fleet.inventory.targets import FilePattern, TargetFiles, cache_directory
from fleet.inventory.units import parse_duration
from fleet.inventory.validation_errors import explain
from runtime.redaction import Redactor
from runtime.tokens import ConfiguredToken

PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass(frozen=True)
class LoadedInventory:
    """An inventory, the secrets in it, which are redacted from all output, warnings, and the files that were read."""

    inventory: Inventory
    secrets: frozenset[str] = field(repr=False)
    warnings: Sequence[ConfigProblem] = ()
    unresolved: Sequence[ConfigProblem] = ()  # references that could not be resolved, unless loaded strictly
    files: Sequence[Path] = ()  # of the configuration
    secret_files: frozenset[Path] = frozenset()  # that references named
    value_files: Mapping[str, Path] = field(default_factory=dict)  # of values that are a file's content, by their path
    target_patterns: Sequence[FilePattern] = ()  # of the files with targets, and of stored answers
    answers: Mapping[str, Path] = field(default_factory=dict)  # by source with a server: the file of its stored answer

    def token(self, setting: str) -> ConfiguredToken:
        """Return the token of a setting, such as `remediator.webhook_token`."""
        section, name = setting.split(".")
        return ConfiguredToken(setting, getattr(getattr(self.inventory, section), name), self.value_files.get(setting))

    def local_token(self, program: Server) -> ConfiguredToken:
        """As `Inventory.local_token`, with the file that its setting refers to."""
        configured = self.token(f"{program}.token")
        return self.inventory.local_token(program) if configured.value is None else configured

    def require_resolved(self, *sections: str, ignore: Sequence[str] = ()) -> None:
        """Check that all references in some sections, such as `remediator.token`, are resolved.

        Raises ConfigurationError.
        """
        missing = [
            problem
            for problem in self.unresolved
            if _is_within(problem.location or problem.path, sections)
            and not _is_within(problem.location or problem.path, ignore)
        ]
        if missing:
            raise ConfigurationError(_sort(missing))

    def connection_sections(self, host: str, *, control: bool = False) -> list[str]:
        """Return the sections that commands on a host depend on: its own, and the connections of its jump hosts."""
        keys = ("address", "shell", "ssh", "control_ssh") if control else ("address", "shell", "ssh")
        jump_hosts = find_connection_path(host, self.inventory.hosts, control=control)[1:]
        return [f"hosts.{host}", *(f"hosts.{name}.{key}" for name in jump_hosts for key in keys)]


def _is_within(path: str, sections: Sequence[str]) -> bool:
    return any(path == section or path.startswith((f"{section}.", f"{section}[")) for section in sections)


def load(
    path: Path,
    kinds: KindTables,
    *,
    programs: Iterable[Program] = PROGRAMS,
    environ: Mapping[str, str] = os.environ,
    strict: bool = True,
    unsaved: Mapping[Path, bytes] = MappingProxyType({}),
) -> LoadedInventory:
    """Read, resolve for `programs`, validate and check. Raises ConfigurationError with every error.

    Without programs, no references are resolved. Unless `strict`, references that cannot be resolved stay as they are
    written; callers check those that they need with `LoadedInventory.require_resolved`. `unsaved` has the
    content of files that are read as if they existed.
    """
    document = read_directory(path, unsaved)
    targets = _read_targets(document, environ)
    problems = [*targets.problems, *expand(document, targets.targets), *_fill_in(document)]
    resolver = Resolver(document, environ, frozenset(programs), strict)
    raw = resolver.resolve()
    problems += [*document.problems, *resolver.problems, *find_errors(document, raw, kinds)]
    model = inventory_model(kinds)
    try:
        inventory = model.model_validate(raw)
    except ValidationError as error:
        places = {(problem.file, problem.line, problem.path) for problem in problems}
        explained = [explain(document, model, item) for item in error.errors(include_url=False)]
        problems += (each for each in explained if (each.file, each.line, each.path) not in places)
        raise ConfigurationError(_sort(_redact(problems, Redactor(resolver.inserted)))) from None
    if problems:
        # Without a valid model it is unknown which references are secrets.
        raise ConfigurationError(_sort(_redact(problems, Redactor(resolver.inserted))))
    _set_digests(document, inventory)
    secrets = frozenset(find_secrets(raw, inventory))
    inventory.mask_targets(Redactor(secrets))
    warnings = _sort(_redact([*document.warnings, *find_warnings(document, inventory)], Redactor(secrets)))
    return LoadedInventory(
        inventory,
        secrets,
        warnings,
        _redact(resolver.unresolved, Redactor(secrets)),
        [*document.files, *targets.files],
        frozenset(resolver.secret_files),
        resolver.value_files,
        targets.patterns,
        {name: path for name, path in targets.answers.items() if name in inventory.services_from},
    )


def load_sections(
    path: Path,
    kinds: KindTables,
    sections: Collection[str],
    *,
    programs: Iterable[Program],
    environ: Mapping[str, str] = os.environ,
) -> LoadedInventory:
    """Load some sections only, whatever is wrong with others. Raises ConfigurationError."""
    document = read_directory(path)
    document.value = {name: value for name, value in document.value.items() if name in sections}
    if document.problems and not document.value:
        raise ConfigurationError(_sort(document.problems))  # a file that cannot be read may have them
    resolver = Resolver(document, environ, frozenset(programs), strict=False)
    raw = resolver.resolve()
    model = inventory_model(kinds)
    try:
        inventory = model.model_validate(raw)
    except ValidationError as error:
        problems = [explain(document, model, item) for item in error.errors(include_url=False)]
        raise ConfigurationError(_sort(_redact(problems, Redactor(resolver.inserted)))) from None
    secrets = frozenset(find_secrets(raw, inventory))
    return LoadedInventory(
        inventory,
        secrets,
        unresolved=_redact(resolver.unresolved, Redactor(secrets)),
        files=document.files,
        secret_files=frozenset(resolver.secret_files),
        value_files=resolver.value_files,
    )


def read_expanded(path: Path) -> Document:
    """Read the configuration as `load` does, with ranges and templates written out, but unresolved and unchecked."""
    document = read_directory(path)
    expand(document, _read_targets(document, os.environ).targets)
    return document


def _read_targets(document: Document, environ: Mapping[str, str]) -> TargetFiles:
    """Read the targets of all sources; a file that is a list and belongs to no source is a problem."""
    found = TargetFiles()
    for name, source in as_maps(document.value.get("services_from")).items():
        found.read(name, source, cache_directory(environ))
    of_sources = {os.path.abspath(path) for path in found.files}  # noqa: PTH100 - also removes `..`
    found.problems += [problem for path, problem in document.lists.items() if os.path.abspath(path) not in of_sources]  # noqa: PTH100 - as above
    return found


def _set_digests(document: Document, inventory: Inventory) -> None:
    services, hosts = (document.value.get(section, {}) for section in ("services", "hosts"))
    for name, service in inventory.services.items():
        digest = compute_digest(service, services[name]["probe"], inventory.hosts, hosts)
        service._digest = digest  # noqa: SLF001 - of the text, which the model does not see


def _redact(problems: Iterable[ConfigProblem], redact: Redactor) -> list[ConfigProblem]:
    return [replace(problem, message=redact(problem.message)) for problem in problems]


def _sort(problems: Iterable[ConfigProblem]) -> list[ConfigProblem]:
    """Return each problem once, with the hosts or services that inherit what is wrong."""
    users: dict[ConfigProblem, dict[str, None]] = {}
    for problem in problems:
        users.setdefault(replace(problem, user="", location=""), {})[problem.user] = None
    unique = [
        replace(problem, message=f"{problem.message}{_name_users(list(names))}") for problem, names in users.items()
    ]
    return sorted(unique, key=lambda problem: (problem.file, problem.line, problem.path))


def _name_users(names: list[str]) -> str:
    if names[0] == "":
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f" (in {names[0]}{more})"


def _fill_in(document: Document) -> list[ConfigProblem]:
    """Apply `defaults` to every probe and control, and replace their placeholders."""
    written, services, hosts = (document.value.get(section, {}) for section in ("defaults", "services", "hosts"))
    settings: dict[str, ConfigModel] = {"probe": ProbeSettings(), "control": ControlSettings()}
    defaults = {part: _defaults_of(model, written.get(part)) for part, model in settings.items()}
    problems = []
    for name, service in services.items():
        if not isinstance(service, dict):
            continue
        host = service.get("host", "")
        known = hosts.get(host) if isinstance(host, str) else None
        address = str(known.get("address", "")) if isinstance(known, dict) else "unknown.invalid"
        for part, part_defaults in defaults.items():
            if isinstance(service.get(part), dict):
                if not host and _mentions_host(service[part]):
                    message = "uses {host.…}, but the service has no `host:`"
                    problems.append(document.problem_at(("services", name, part), message))
                own = substitute(service[part], name, str(host), address)
                service[part] = _with_defaults(own, *part_defaults)
    return problems


def _mentions_host(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_mentions_host, value.values()))
    if isinstance(value, list):
        return any(map(_mentions_host, value))
    return isinstance(value, str) and ("{host.address}" in value or "{host.name}" in value)


def _defaults_of(model: ConfigModel, written: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the built-in defaults, and those that the section `defaults` sets."""
    values = written if isinstance(written, dict) else {}
    return model.model_dump(), {name: value for name, value in values.items() if name in type(model).model_fields}


def _with_defaults(part: dict[str, Any], built_in: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    filled = {**built_in, **written, **part}
    if "retry_every" in built_in and "retry_every" not in {**written, **part}:
        filled["retry_every"] = _smaller(filled["every"], built_in["retry_every"])
    return filled


def _smaller(every: Any, other: str) -> Any:
    try:
        return every if MIN_INTERVAL <= parse_duration(every) < parse_duration(other) else other
    except ValueError:
        return other  # the error of `every` is reported by the model
