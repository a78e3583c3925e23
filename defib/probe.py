"""`defib probe`: one probe from here, with everything that it saw."""

import json
from collections.abc import Callable
from typing import Any

from exporter.results import ProbeResult, replace_unencodable
from exporter.scheduler.probe_runner import probe_once
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Service
from runtime import logs
from runtime.errors import DefibError
from runtime.redaction import Redactor
from runtime.times import format_rfc3339

UP, DOWN, CANNOT_TELL = 0, 1, 2
SHOWN = 1000  # characters of each piece of evidence
NOTHING_SEEN = ("shell", "error")  # reasons that say nothing of the service itself


async def probe(load: Callable[[], LoadedInventory], name: str, *, as_json: bool) -> int:
    """Probe a service and print the result; 0 when it is up, 1 when it is down, 2 when that cannot be told."""
    loaded = load()
    service = named(loaded, name)
    redact = Redactor(loaded.secrets)
    logs.configure(redact)
    result = await probe_once(service, loaded.inventory.hosts, redact)
    told = result.details.redact.redact_all(_told(service, result))
    print(json.dumps(told, ensure_ascii=False) if as_json else _as_text(told))
    if result.success:
        return UP
    return CANNOT_TELL if result.reason in NOTHING_SEEN else DOWN


def named(loaded: LoadedInventory, name: str) -> Service:
    service = loaded.inventory.services.get(name)
    if service is None:
        raise DefibError(f"the inventory has no service {name!r}")
    return service


def _told(service: Service, result: ProbeResult) -> dict[str, Any]:
    details = result.details
    return {
        "service": service.id,
        "probe": service.probe.kind,
        "success": result.success,
        "reason": result.reason,
        "message": result.message,
        "duration_seconds": result.duration,
        "phases": details.phases,
        "started_at": format_rfc3339(result.started_at),
        "measured": {
            name: format_rfc3339(value) if "timestamp" in name else value for name, value in details.gauges.items()
        },
        **({"tls": dict(zip(("issuer", "version"), details.tls, strict=True))} if details.tls else {}),
        **({"components": details.components} if details.components else {}),
        "evidence": {key: _readable(value, details.redact) for key, value in details.evidence.items()},
    }


def _readable(value: Any, redact: Redactor) -> Any:
    """Evidence as text, masked before it is cut."""
    if isinstance(value, list):
        return [_readable(list(item) if isinstance(item, tuple) else item, redact) for item in value]
    if isinstance(value, int | float):
        return value
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return replace_unencodable(redact(text))[:SHOWN]


def _as_text(told: dict[str, Any]) -> str:
    verdict = "up" if told["success"] else f"down ({told['reason']}): {told['message']}"
    lines = [f"{told['service']} is {verdict}", f"  {'took':<12}{told['duration_seconds'] * 1000:.1f} ms"]
    lines += [f"  {phase:<12}{seconds * 1000:.1f} ms" for phase, seconds in told["phases"].items()]
    lines += [f"  {name}  {value}" for name, value in told["measured"].items()]
    lines += [f"  {name:<12}{value}" for name, value in told.get("tls", {}).items()]
    lines += [f"  component   {name}: {'up' if up else 'down'}" for name, up in told.get("components", {}).items()]
    for key, value in told["evidence"].items():
        if key == "headers":
            lines += ["  headers", *(f"    {name}: {text}" for name, text in value)]
        elif isinstance(value, list):
            lines += [f"  {key}", *(f"    {item}" for item in value)]
        else:
            lines.append(f"  {key:<12}{value}")
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Text without what would do something to a terminal, but begin a line."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
