"""`defib check`: validate the configuration and report every error."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from defib.kinds import KINDS
from defib.output import format_size, print_json, print_text
from defib.permissions import find_exposures
from fleet.inventory.documents import Document
from fleet.inventory.loading import LoadedInventory, read_expanded
from fleet.inventory.model import Inventory
from fleet.inventory.problems import ConfigProblem, ConfigurationError
from fleet.inventory.references import Program
from fleet.inventory.schema import json_schema
from runtime.errors import DefibError
from runtime.redaction import Redactor


def check(
    load: Callable[[], LoadedInventory], directory: Path, program: Program | None, *, show: bool, as_json: bool
) -> int:
    """Load the configuration for one program, or for all, and render all card templates; return 1 if there are errors.

    With `show`, print the resolved configuration with its defaults.
    """
    try:
        loaded = load()
    except ConfigurationError as error:
        if not as_json:
            raise
        print_json({"errors": [_as_json(wrong) for wrong in error.problems], "warnings": []})
        return 1
    errors = list(_find_errors(loaded.inventory, directory, program))
    exposed = [ConfigProblem(str(each.path), 0, "", f"{each.detail}: {each.fix}") for each in find_exposures(loaded)]
    missing = _find_missing_folder(loaded.inventory.gateway.state_file) if program == "gateway" else ()
    warnings = [*loaded.warnings, *exposed, *_find_ignored_pins(loaded.inventory), *missing]
    if not as_json:
        for warning in warnings:
            print_text(f"warning: {warning}", sys.stderr)
        for wrong in errors:
            print_text(str(wrong), sys.stderr)
    if show and not errors:
        _print_resolved(loaded, directory, as_json=as_json)
    elif as_json:
        print_json(_summarize(loaded.inventory, errors, warnings))
    elif not errors:
        print_text(f"{directory}: {format_size(loaded.inventory)}, no errors")
    return int(bool(errors))


def _find_errors(inventory: Inventory, directory: Path, program: Program | None) -> Iterator[ConfigProblem]:
    """Yield the errors that loading the configuration does not find."""
    if program != "exporter":
        yield from _check_templates(inventory)
    if program in ("exporter", None):
        yield from _check_modules(inventory.exporter.modules_file)
    if program == "gateway" and not inventory.gateway.upstreams:
        yield ConfigProblem(str(directory), 0, "gateway.upstreams", "is empty: there is nothing to pass requests on to")


def _check_modules(path: Path | None) -> Iterator[ConfigProblem]:
    if path is None:
        return
    from exporter.modules.prober import read_modules  # imports the kinds of probes

    try:
        read_modules(path)
    except DefibError as error:
        yield ConfigProblem(str(path), 0, "", str(error).removeprefix(f"{path}: "))


def _find_missing_folder(state_file: Path | None) -> Iterator[ConfigProblem]:
    if state_file is not None and not state_file.parent.is_dir():
        message = "the folder does not exist; create it for the gateway's user"
        yield ConfigProblem(str(state_file.parent), 0, "gateway.state_file", message)


def _find_ignored_pins(inventory: Inventory) -> Iterator[ConfigProblem]:
    """Yield a warning for each line of a known_hosts file that is ignored; files that cannot be read are left out."""
    logins = [
        host.ssh_for(control=control) for host in inventory.hosts.values() if host.ssh for control in (False, True)
    ]
    files = [path for path in dict.fromkeys(ssh.known_hosts for ssh in logins) if path.is_file()]
    if not files:
        return
    from fleet.shells.host_keys import read_known_hosts  # the SSH client is slow to import

    for path in files:
        with contextlib.suppress(OSError):
            for line in read_known_hosts(path)[1]:
                yield ConfigProblem(str(path), line.number, "", f"the line is ignored: {line.reason}")


def _summarize(
    inventory: Inventory, errors: Sequence[ConfigProblem], warnings: Sequence[ConfigProblem]
) -> Mapping[str, Any]:
    return {
        "hosts": len(inventory.hosts),
        "services": len(inventory.services),
        "errors": [_as_json(wrong) for wrong in errors],
        "warnings": [_as_json(wrong) for wrong in warnings],
    }


def _as_json(wrong: ConfigProblem) -> Mapping[str, Any]:
    return {"file": wrong.file, "line": wrong.line, "path": wrong.path, "message": wrong.message}


def _print_resolved(loaded: LoadedInventory, directory: Path, *, as_json: bool) -> None:
    """Print the configuration with references resolved and defaults filled in, secrets masked.

    As YAML, comments say where each value is written.
    """
    values = loaded.inventory.model_dump(mode="json", by_alias=True, exclude_none=True)
    masked = Redactor(loaded.secrets).redact_all(values)  # in text, secrets may be folded and quoted
    if as_json:
        print_json(masked)
    else:
        text = yaml.safe_dump(masked, allow_unicode=True, sort_keys=False)
        print_text(_add_origins(text, read_expanded(directory), directory).removesuffix("\n"))


def _add_origins(text: str, document: Document, directory: Path) -> str:
    """Return YAML with a comment at each key that a file has, but not inside of values of several lines."""
    lines = text.splitlines()
    left: list[tuple[yaml.Node | None, tuple[str | int, ...]]] = [(yaml.compose(text, Loader=yaml.SafeLoader), ())]
    while left:
        node, location = left.pop()
        if isinstance(node, yaml.SequenceNode):
            left += [(item, (*location, index)) for index, item in enumerate(node.value)]
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line, where = key.start_mark.line, (*location, key.value)
            left.append((value, where))
            is_short = not isinstance(value, yaml.ScalarNode) or value.end_mark.line == line
            if len(where) > 1 and is_short and (origin := document.find_origin(where)) is not None:
                lines[line] += f"  # {origin.removeprefix(f'{directory}/')}"
    return "\n".join(lines)


def _check_templates(inventory: Inventory) -> Iterator[ConfigProblem]:
    if inventory.notify.templates is None:
        return
    from remediator.notifications import samples

    for message in samples.check_templates(inventory):
        match = re.fullmatch(r"(.+?):(\d+): (.+)", message, re.DOTALL)
        yield (
            ConfigProblem(match[1], int(match[2]), "", match[3])
            if match
            else ConfigProblem("notify.templates", 1, "", message)
        )


def check_web_configuration(path: Path) -> None:
    """Raise StartError if the file of --web.config.file is invalid, and warn if others can use it."""
    from runtime import webconfig

    webconfig.load(path).ssl_context()
    if exposed := webconfig.describe_exposure(path):
        print_text(f"warning: {exposed}", sys.stderr)


def print_schema() -> int:
    """Print the JSON Schema of configuration files."""
    print_text(json.dumps(json_schema(KINDS), indent=2, ensure_ascii=False))
    return 0
