"""`GET /probe?target=&module=`, as blackbox_exporter answers it."""

import math

from aiohttp import web

from exporter.api.scrape import TEXT
from exporter.modules.prober import ModuleProber, TargetRefusedError, UnknownModuleError
from exporter.modules.series import render
from runtime.errors import ApiError

DEFAULT_MODULE = "http_2xx"
TARGET_LIMIT = 8192  # characters
_SCRAPE_TIMEOUT = "X-Prometheus-Scrape-Timeout-Seconds"


class ModuleProbeApi:
    def __init__(self, prober: ModuleProber) -> None:
        self._prober = prober

    async def probe(self, request: web.Request) -> web.Response:
        """Probe a target with a module, and return its series; with `debug=true`, also what the probe has seen."""
        if not self._prober.is_enabled:
            raise ApiError(404, "not_found", "there are no modules: set exporter.modules_file")
        target, hostname = request.query.get("target", ""), request.query.get("hostname", "")
        if not target or len(target) + len(hostname) > TARGET_LIMIT:
            raise ApiError(400, "bad_request", "the parameter target is missing or too long")
        timeout = _parse_timeout(request.headers.get(_SCRAPE_TIMEOUT, ""))
        try:
            module = request.query.get("module", DEFAULT_MODULE)
            probe = await self._prober.probe(module, target, hostname, timeout)
        except UnknownModuleError as error:
            raise ApiError(400, "bad_request", str(error)) from error
        except TargetRefusedError as error:
            raise ApiError(403, "forbidden", str(error)) from error
        text = render(probe).decode()
        if request.query.get("debug") == "true":
            result = probe.result
            outcome = "succeeded" if result.success else f"failed ({result.reason}): {result.message}"
            text = f"The probe has {outcome}\n\nMetrics that would have been returned:\n{text}"
        return web.Response(text=text, headers={"Content-Type": TEXT})


def _parse_timeout(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
