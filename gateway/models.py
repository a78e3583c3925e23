"""The list of models: that of all upstreams, each model with the upstream that requests for it go to."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog
from multidict import CIMultiDict

from gateway.admission import Applicant, RefusedError
from gateway.connections import Call, Response, UpstreamError
from gateway.errors import GatewayError
from gateway.routing import PREFIX, Router
from gateway.upstreams import Upstream, Upstreams
from runtime import VERSION
from runtime.payloads import decode_json, parse_body

KEPT = 60.0  # seconds; each reading is a request that counts
TIMEOUT = 15.0
MAX_SIZE = 4 * 2**20  # bytes of a list
MAX_MODELS = 10_000  # of an upstream; its further ones are left out
_IN_A_TURN = 200  # models, which take less than a millisecond
_OK, _LIMITED, _SERVER_ERROR = 200, 429, 500
Models = Mapping[str, str]  # each as JSON, by its name
log = structlog.get_logger()


@dataclass(frozen=True)
class _Failure:
    """Why there are no models: for those who waited then and, if the upstream was asked, for a while."""

    at: float
    until: float
    error: GatewayError


class ModelList:
    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._known: dict[str, tuple[float, Models]] = {}  # by upstream, with the time
        self._failed: dict[str, _Failure] = {}  # the last one, of upstreams that have returned nothing
        self._merged = b""
        self._merged_from: Sequence[object] = []  # the router and the list of each upstream
        self._lock = asyncio.Lock()

    async def read(self) -> bytes:
        """Return the list as JSON in OpenAI's format. Raises GatewayError if there is none of any upstream."""
        arrived_at = time.monotonic()
        async with self._lock:  # those who wait will find the answers
            upstreams, router = list(self._upstreams), self._upstreams.router
            answers = await asyncio.gather(*(self._read_known(each, arrived_at) for each in upstreams))
            failures = [each for each in answers if isinstance(each, GatewayError)]
            if len(failures) == len(answers):
                raise failures[0].with_traceback(None)  # it may be raised again and again
            lists = [None if isinstance(each, GatewayError) else each for each in answers]
            parts = [router, *lists]
            if [id(each) for each in parts] != [id(each) for each in self._merged_from]:
                self._merged, self._merged_from = await _merge(upstreams, router, lists), parts
            return self._merged

    async def _read_known(self, upstream: Upstream, arrived_at: float) -> Models | GatewayError:
        """Return the models of an upstream, which may be those of an earlier answer, or why there are none."""
        known, failed = self._known.get(upstream.name), self._failed.get(upstream.name)
        if known is not None and time.monotonic() < known[0] + KEPT:
            return known[1]
        if failed is not None and (failed.at >= arrived_at or time.monotonic() < failed.until):
            return failed.error
        try:
            async with asyncio.timeout(TIMEOUT if known is not None else None):  # else as long as other requests wait
                found = await _fetch(upstream)
        except RefusedError as error:
            log.warning("models_not_read", upstream=upstream.name, error=error.reason)
            failure, kept = GatewayError.of(error.reason, error.retry_after), 0.0
        except (UpstreamError, TimeoutError, ValueError, RecursionError) as error:
            log.warning("models_not_read", upstream=upstream.name, error=type(error).__name__)
            message = "no upstream has returned its models"
            failure, kept = GatewayError(502, "upstream_failed", message, retry_after=KEPT), KEPT
        else:
            self._known[upstream.name] = (time.monotonic(), found)
            return found
        if known is not None:
            self._known[upstream.name] = (time.monotonic(), known[1])
            return known[1]
        now = time.monotonic()
        self._failed[upstream.name] = _Failure(now, now + kept, failure)
        return failure


async def _merge(upstreams: Sequence[Upstream], router: Router, lists: Sequence[Models | None]) -> bytes:
    """Return the models of all upstreams as JSON; other requests are handled meanwhile."""
    models: dict[str, str] = {}
    for upstream, found in zip(upstreams, lists, strict=True):
        aliases = {
            alias: json.dumps({"id": alias, "object": "model", "created": 0, "owned_by": upstream.provider})
            for alias in upstream.settings.aliases
        }
        for number, (name, model) in enumerate([*aliases.items(), *(found or {}).items()]):
            if number % _IN_A_TURN == 0:
                await asyncio.sleep(0)
            routes = router.find(name)
            if routes and routes[0].upstream == upstream.name:
                models.setdefault(name, model)
    return f'{{"object": "list", "data": [{", ".join(models.values())}]}}'.encode()


async def _fetch(upstream: Upstream) -> Models:
    """Request the models of an upstream.

    Raises ValueError, RecursionError, RefusedError, UpstreamError and TimeoutError.
    """
    permit = await upstream.admission.admit(Applicant())
    headers = CIMultiDict({"Accept": "application/json", "User-Agent": f"defib/{VERSION}"})
    if upstream.api_key:
        headers["Authorization"] = f"Bearer {upstream.api_key}"
    call = Call("GET", upstream.target_of(f"{PREFIX}/models"), headers, None)
    response = None
    try:
        async with asyncio.timeout(TIMEOUT):
            response = await upstream.pool.request(upstream.origin, call, TIMEOUT, permit)
            if response.status >= _SERVER_ERROR:
                permit.note_failure()
            else:
                permit.note_answer(refused=response.status == _LIMITED)
            if response.status != _OK:
                raise ValueError(f"status {response.status}")
            return await parse_body(_parse_models, await _read_body(response))
    finally:
        if response is not None:
            response.close()
        permit.close()


async def _read_body(response: Response) -> bytes:
    """Read a whole body. Raises ValueError if it is too large."""
    body = bytearray()
    while part := await response.read():
        body += part
        if len(body) > MAX_SIZE:
            raise ValueError("the list is too large")
    return bytes(body)


def _parse_models(body: bytes) -> Models:
    """Raises ValueError and RecursionError."""
    value = decode_json(body)
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list):
        raise ValueError("not a list of models")  # noqa: TRY004 - as for other contents
    models: dict[str, str] = {}
    for model in data[:MAX_MODELS]:
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            with contextlib.suppress(ValueError):  # one with NaN, which is not JSON
                models.setdefault(model["id"], json.dumps(model, allow_nan=False))
    return models
