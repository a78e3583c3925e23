"""`defib probe`: one probe from here, with everything that it saw."""

import json
from collections.abc import Callable
from typing import Any

from exporter.probing import probe as probe_once
from exporter.results import Result
from fleet.loading import Loaded
from fleet.model import Service
from fleet.shells.pool import Shells
from runtime import logs
from runtime.errors import DefibError
from runtime.redaction import Redactor
from runtime.times import rfc3339

UP, DOWN, CANNOT_TELL = 0, 1, 2
NOTHING_SEEN = ("shell", "error")  # reasons that say nothing of the service itself


async def probe(load: Callable[[], Loaded], name: str, *, as_json: bool) -> int:
    """Probe a service and print the result; 0 when it is up, 1 when it is down, 2 when that cannot be told."""
    loaded = load()
    service = named(loaded, name)
    redact = Redactor(loaded.secrets)
    logs.configure(redact)
    shells = Shells(loaded.inventory.hosts)
    try:
        result = await probe_once(service, lambda: shells.of(service.host), redact)
    finally:
        await shells.close()
    told = redact.within(_told(service, result))
    print(json.dumps(told, ensure_ascii=False) if as_json else _as_text(told))
    if result.success:
        return UP
    return CANNOT_TELL if result.reason in NOTHING_SEEN else DOWN


def named(loaded: Loaded, name: str) -> Service:
    service = loaded.inventory.services.get(name)
    if service is None:
        raise DefibError(f"the inventory has no service {name!r}")
    return service


def _told(service: Service, result: Result) -> dict[str, Any]:
    seen = result.seen
    return {
        "service": service.id,
        "probe": service.probe.kind,
        "success": result.success,
        "reason": result.reason,
        "message": result.message,
        "duration_seconds": result.duration,
        "phases": seen.phases,
        "started_at": rfc3339(result.started_at),
        **({"http_status": seen.status_code} if seen.status_code else {}),
        **({"certificate_expires": rfc3339(seen.certificate_expiry)} if seen.certificate_expiry else {}),
        "evidence": {key: _readable(value) for key, value in seen.evidence.items()},
    }


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return [list(item) for item in value] if isinstance(value, list) else value


def _as_text(told: dict[str, Any]) -> str:
    verdict = "up" if told["success"] else f"down ({told['reason']}): {told['message']}"
    lines = [f"{told['service']} is {verdict}", f"  {'took':<12}{told['duration_seconds'] * 1000:.1f} ms"]
    lines += [f"  {phase:<12}{seconds * 1000:.1f} ms" for phase, seconds in told["phases"].items()]
    lines += [f"  {key:<12}{told[key]}" for key in ("http_status", "certificate_expires") if key in told]
    for key, value in told["evidence"].items():
        if key == "headers":
            lines += ["  headers", *(f"    {name}: {text}" for name, text in value)]
        else:
            lines.append(f"  {key:<12}{value}")
    return "\n".join(lines)
