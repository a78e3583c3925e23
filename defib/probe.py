"""`defib probe`: probe a service once from this machine, and print everything that was measured."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from defib.lookup import find_service
from defib.output import format_time, print_json, print_text, time_zone
from exporter.probes.expectations import EXAMINED
from exporter.results import ProbeResult, replace_unencodable
from exporter.scheduler.probe_runner import probe_once
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Service
from runtime import logs
from runtime.redaction import Redactor
from runtime.times import format_rfc3339

UP, DOWN, CANNOT_DETERMINE = 0, 1, 2
EVIDENCE_LENGTH = 1000  # characters of each piece of evidence
UNDETERMINED = ("shell", "error")  # reasons that do not say whether the service is up


async def probe(load: Callable[[], LoadedInventory], name: str, *, as_json: bool) -> int:
    """Probe a service and print the result; return 0 if it is up, 1 if it is down, 2 if that cannot be determined."""
    loaded = load()
    service = find_service(loaded.inventory, name)
    loaded.require_resolved(f"services.{name}.probe", *loaded.connection_sections(service.host))
    redact = Redactor(loaded.secrets)
    logs.configure(redact)
    result = await probe_once(service, loaded.inventory.hosts, redact)
    printed = result.details.redact.redact_all(_details(service, result))
    if as_json:
        print_json(printed)
    else:
        time = format_time(result.started_at, time_zone(loaded.inventory))
        print_text(_format(printed, time))
    if result.success:
        return UP
    return CANNOT_DETERMINE if result.reason in UNDETERMINED else DOWN


def _details(service: Service, result: ProbeResult) -> dict[str, Any]:
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
        **({"tls": asdict(details.tls)} if details.tls else {}),
        **({"values": details.values} if details.values else {}),
        **details.components_json(),
        "evidence": {key: _readable(value, details.redact) for key, value in details.evidence.items()},
    }


def _readable(value: Any, redact: Redactor) -> Any:
    """Return evidence as text, redacted before it is truncated."""
    if isinstance(value, list):
        return [_readable(list(item) if isinstance(item, tuple) else item, redact) for item in value]
    if isinstance(value, int | float):
        return value
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    is_cut = isinstance(value, bytes) and len(value) >= EXAMINED
    return replace_unencodable(redact.redact_head(text, EVIDENCE_LENGTH, is_cut=is_cut))


def _format_component(component: dict[str, Any]) -> str:
    values = (f", {name} {value}" for name, value in component["values"].items())
    return f"{component['name']}: {'up' if component['up'] else 'down'}{''.join(values)}"


def _format(details: dict[str, Any], time: str) -> str:
    status = "up" if details["success"] else f"down ({details['reason']}): {details['message']}"
    if details["reason"] in UNDETERMINED:
        status = f"unknown ({details['reason']}): {details['message']}"
    lines = [f"{details['service']} is {status}", f"  {'time':<12}{time}"]
    lines.append(f"  {'duration':<12}{details['duration_seconds'] * 1000:.1f} ms")
    lines += [f"  {phase:<12}{seconds * 1000:.1f} ms" for phase, seconds in details["phases"].items()]
    lines += [f"  {name}  {value}" for name, value in details["measured"].items()]
    lines += [f"  {name:<12}{value}" for name, value in details.get("tls", {}).items()]
    lines += [f"  {'value':<12}{name} {value:g}" for name, value in details.get("values", {}).items()]
    lines += [f"  component   {_format_component(each)}" for each in details.get("components", [])]
    for key, value in details["evidence"].items():
        if key == "headers":
            lines += ["  headers", *(f"    {name}: {text}" for name, text in value)]
        elif isinstance(value, list):
            lines += [f"  {key}", *(f"    {item}" for item in value)]
        else:
            lines.append(f"  {key:<12}{value}")
    # What a peer has sent cannot look like a field of its own.
    return "\n".join(line.replace("\n", f"\n{' ' * 14}") for line in lines)
