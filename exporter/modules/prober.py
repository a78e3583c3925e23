"""Probes targets with the modules of blackbox_exporter's configuration file."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from exporter.modules.blackbox_file import Module, read_file
from exporter.modules.translation import find_host, list_files, translate
from exporter.probes import PROBES
from exporter.probes.net.tls_contexts import read_version
from exporter.results import ProbeDetails, ProbeResult
from exporter.scheduler.probe_runner import run_options
from fleet.inventory.module_targets import matches_target
from fleet.inventory.secrets import find_secrets
from fleet.inventory.units import parse_positive_duration
from runtime.errors import DefibError
from runtime.logs import LimitedLog
from runtime.redaction import Redactor
from runtime.validation_messages import describe_first

log = structlog.get_logger()
limited_log = LimitedLog()
EXAMPLES = {"http": "localhost", "tcp": "localhost:1", "dns": "localhost", "icmp": "localhost", "grpc": "localhost:1"}
KEPT = 10_000  # targets whose options are kept, with their tokens
CONCURRENT = 500  # probes
DEFAULT_TIMEOUT = 120.0  # seconds, as blackbox_exporter has
OFFSET = 0.5  # seconds before the timeout of a scrape


class UnknownModuleError(DefibError):
    """There is no such module."""


class TargetRefusedError(DefibError):
    """Modules may not probe this target."""


@dataclass(frozen=True)
class ModuleProbe:
    """The kind of a probe and its result."""

    prober: str
    result: ProbeResult


class ModuleProber:
    """Probes targets; `load` puts a file of modules in force."""

    def __init__(self, redact: Redactor) -> None:
        self._redact = redact
        self._modules: Mapping[str, Module] = {}
        self._targets: Sequence[str] | None = None
        self._options: OrderedDict[tuple[str, str, str, tuple[object, ...]], Any] = OrderedDict()
        self._free = asyncio.Semaphore(CONCURRENT)
        self.is_enabled = False

    async def load(self, path: Path | None, targets: Sequence[str] | None = None) -> None:
        """Put the modules of a file in force; without one, there are none. Raises DefibError.

        `targets` are patterns of the hosts that they may probe; without them, any.
        """
        modules = await asyncio.to_thread(read_modules, path) if path is not None else {}
        self._modules, self._targets, self.is_enabled = modules, targets, path is not None
        self._options = OrderedDict()  # what still adds to the former one, does so in vain

    async def probe(self, name: str, target: str, hostname: str, scrape_timeout: float | None) -> ModuleProbe:
        """Probe a target once; one that cannot be probed is a failure.

        Raises UnknownModuleError, and TargetRefusedError before anything is sent.
        """
        module = self._modules.get(name)
        if module is None:
            raise UnknownModuleError(f"unknown module {name!r}")
        try:
            options = await self._find_options(name, module, target, hostname)
        except ValueError as error:
            message = self._redact(f"module {name}: {_first_problem(error)}")
            return ModuleProbe(
                module.prober, ProbeResult(False, "error", message, time.time(), 0.0, ProbeDetails(redact=self._redact))
            )
        host = find_host(module.prober, options)
        if self._targets is not None and not matches_target(self._targets, host):
            raise TargetRefusedError(f"the host {host!r} is not in exporter.modules_targets")
        timeout = parse_timeout(module) or DEFAULT_TIMEOUT
        if scrape_timeout is not None:
            timeout = min(timeout, max(scrape_timeout - OFFSET, scrape_timeout / 2))
        async with self._free:
            result = await run_options(module.prober, options, timeout, self._redact)
        if "traceback" in result.details.evidence and limited_log.admits("probe_defect"):
            log.error("probe_defect", module=name, traceback=self._redact(result.details.evidence["traceback"]))
        return ModuleProbe(module.prober, result)

    async def _find_options(self, name: str, module: Module, target: str, hostname: str) -> Any:
        """Return the options for a target, which keep its OAuth 2 token. Raises ValueError."""
        # Files are read in threads: they may be on a slow filesystem.
        files = list_files(module)
        versions = await asyncio.to_thread(_read_versions, files) if files else ()
        key, known = (name, target, hostname, versions), self._options
        options = known.get(key)
        if options is None:
            options, secrets = await asyncio.to_thread(create_options, module, target, hostname)
            self._redact.add(secrets)
            known[key] = options
            if len(known) > KEPT:
                known.popitem(last=False)
        else:
            known.move_to_end(key)
        return options


def read_modules(path: Path) -> Mapping[str, Module]:
    """Read a file of modules, each of which can probe a target. Raises DefibError."""
    modules = read_file(path)
    for name, module in modules.items():
        try:
            parse_timeout(module)
            create_options(module, EXAMPLES[module.prober], "")
        except ValueError as error:
            raise DefibError(f"{path}: modules.{name}: {_first_problem(error)}") from None
    return modules


def parse_timeout(module: Module) -> float | None:
    """Return the timeout of a module in seconds, None if it has none. Raises ValueError."""
    return parse_positive_duration(module.timeout) if module.timeout not in ("", "0", "0s") else None


def create_options(module: Module, target: str, hostname: str) -> tuple[Any, list[str]]:
    """Return the options of the module's probe for a target, and the secrets in them. Raises ValueError."""
    written = translate(module, target, hostname)
    options = PROBES[module.prober].options.model_validate(written)
    return options, list(find_secrets(written, options))


def _read_versions(files: Sequence[str]) -> tuple[object, ...]:
    """Return what changes with the content of files. Raises ValueError."""
    try:
        return tuple(read_version(Path(file)) for file in files)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None


def _first_problem(error: ValueError) -> str:
    return describe_first(error, "the module") if isinstance(error, ValidationError) else str(error)
