"""Loading the configuration: from a directory of YAML files to a validated inventory, or all of its errors."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from fleet.inventory.checks import find_errors, find_warnings
from fleet.inventory.digests import compute_digest
from fleet.inventory.documents import ConfigProblem, ConfigurationError, Document, read_directory
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import KindTables
from fleet.inventory.model import (
    MIN_INTERVAL,
    ControlSettings,
    Inventory,
    ProbeSettings,
    find_connection_path,
    inventory_model,
)
from fleet.inventory.references import Program, Resolver, substitute
from fleet.inventory.secrets import find_secrets
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

    def token(self, setting: str) -> ConfiguredToken:
        """Return the token of a setting, such as `remediator.webhook_token`."""
        section, name = setting.split(".")
        return ConfiguredToken(setting, getattr(getattr(self.inventory, section), name), self.value_files.get(setting))

    def local_token(self, program: Literal["exporter", "remediator"]) -> ConfiguredToken:
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
            if _is_within(problem.path, sections) and not _is_within(problem.path, ignore)
        ]
        if missing:
            raise ConfigurationError(missing)

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
) -> LoadedInventory:
    """Read, resolve for `programs`, validate and check. Raises ConfigurationError with every error.

    Without programs, no references are resolved. Unless `strict`, references that cannot be resolved stay as they are
    written; callers check those that they need with `LoadedInventory.require_resolved`.
    """
    document = read_directory(path)
    problems = _fill_in(document)
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
        raise ConfigurationError(_sort(problems, Redactor(resolver.inserted))) from None
    if problems:
        # Without a valid model it is unknown which references are secrets.
        raise ConfigurationError(_sort(problems, Redactor(resolver.inserted)))
    _set_digests(document, inventory)
    secrets = frozenset(find_secrets(raw, inventory))
    inventory.mask_targets(Redactor(secrets))
    warnings = _sort(find_warnings(document, inventory), Redactor(secrets))
    return LoadedInventory(
        inventory,
        secrets,
        warnings,
        _sort(resolver.unresolved, Redactor(secrets)),
        document.files,
        frozenset(resolver.secret_files),
        resolver.value_files,
    )


def _set_digests(document: Document, inventory: Inventory) -> None:
    services, hosts = (document.value.get(section, {}) for section in ("services", "hosts"))
    for name, service in inventory.services.items():
        digest = compute_digest(service, services[name]["probe"], inventory.hosts, hosts)
        service._digest = digest  # noqa: SLF001 - of the text, which the model does not see


def _sort(problems: Iterable[ConfigProblem], redact: Redactor) -> list[ConfigProblem]:
    unique = dict.fromkeys(replace(problem, message=redact(problem.message)) for problem in problems)
    return sorted(unique, key=lambda problem: (problem.file, problem.line, problem.path))


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
