"""The push URL of Uptime Kuma on the listener for pings: `/api/push/UUID?status=up&msg=OK&ping=12`.

Parameters and answers are those of Uptime Kuma 2, so that its scripts need another URL only.
"""

from http import HTTPStatus

from aiohttp import web

from exporter.api.pings import name_client
from exporter.heartbeats.bodies import SentBody
from exporter.heartbeats.monitor import HeartbeatMonitor
from exporter.heartbeats.rate_limit import RateLimitedError
from exporter.heartbeats.store import HeartbeatStoreError

PATH = "/api/push/{token}"
LONGEST = 86_400_000.0  # milliseconds
DEFAULT_MESSAGE = "OK"  # which says no more than the status


class PushApi:
    def __init__(self, heartbeats: HeartbeatMonitor) -> None:
        self._heartbeats = heartbeats

    async def receive(self, request: web.Request) -> web.Response:
        """Receive a ping with any method, and answer once it is stored."""
        service = self._heartbeats.registry.find_by_uuid(request.match_info["token"])
        if service is None:
            return _refuse(HTTPStatus.NOT_FOUND, "Monitor not found or not active.")
        try:
            duration = parse_duration(request.query.get("ping", ""))
        except ValueError as error:
            return _refuse(HTTPStatus.BAD_REQUEST, str(error))
        is_up = request.query.get("status", "up") in ("up", "")
        message = request.query.get("msg", "")
        body = b"" if message == DEFAULT_MESSAGE else message.encode("utf-8", "replace")
        try:
            await self._heartbeats.receive(
                service,
                "success" if is_up else "fail",
                None,
                "",
                SentBody(body),
                client=name_client(request),
                duration=duration,
            )
        except KeyError:  # a reload has removed it meanwhile
            return _refuse(HTTPStatus.NOT_FOUND, "Monitor not found or not active.")
        except RateLimitedError as error:
            return _refuse(HTTPStatus.TOO_MANY_REQUESTS, "rate limit exceeded", max(1, round(error.retry_after)))
        except HeartbeatStoreError:
            return _refuse(HTTPStatus.SERVICE_UNAVAILABLE, "cannot store the ping", 5)
        return web.json_response({"ok": True})


def parse_duration(text: str) -> float | None:
    """Return the seconds of a number of milliseconds; None if there is none. Raises ValueError."""
    if not text:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        raise ValueError("Invalid ping value: it is not a number") from None
    if not 0 <= milliseconds <= LONGEST:
        raise ValueError(f"Invalid ping value: it must be between 0 and {LONGEST:.0f} milliseconds (24 hours)")
    return milliseconds / 1000


def _refuse(status: HTTPStatus, message: str, retry_after: int | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return web.json_response({"ok": False, "msg": message}, status=status, headers=headers)
