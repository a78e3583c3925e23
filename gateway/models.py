"""The list of models: that of all upstreams, each model with the upstream that requests for it go to."""

import asyncio
import time
from typing import Any

import aiohttp
import structlog
from yarl import URL

from gateway.admission import Applicant, RefusedError
from gateway.errors import GatewayError
from gateway.upstreams import Upstream, Upstreams
from runtime.payloads import decode_json, parse_body

KEPT = 60.0  # seconds; each reading is a request that counts
TIMEOUT = 15.0
MAX_SIZE = 4 * 2**20  # bytes of a list
_OK = 200
log = structlog.get_logger()


class ModelList:
    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._known: dict[str, tuple[float, list[dict[str, Any]] | None]] = {}  # by upstream, with the time
        self._lock = asyncio.Lock()

    async def read(self) -> dict[str, Any]:
        """Return the list in OpenAI's format. Raises GatewayError if no upstream answers."""
        async with self._lock:  # those who wait will find the answers
            lists = await asyncio.gather(*(self._read_known(each) for each in self._upstreams))
        if all(each is None for each in lists):
            raise GatewayError(502, "upstream_failed", "no upstream has returned its models", retry_after=KEPT)
        models: dict[str, dict[str, Any]] = {}
        for upstream, found in zip(self._upstreams, lists, strict=True):
            aliases = [
                {"id": alias, "object": "model", "created": 0, "owned_by": upstream.provider}
                for alias in upstream.settings.aliases
            ]
            for model in [*aliases, *(found or [])]:
                if self._leads_to(model["id"], upstream):
                    models.setdefault(model["id"], model)
        return {"object": "list", "data": list(models.values())}

    def _leads_to(self, model: str, upstream: Upstream) -> bool:
        routes = self._upstreams.router.find(model)
        return bool(routes) and routes[0].upstream == upstream.name

    async def _read_known(self, upstream: Upstream) -> list[dict[str, Any]] | None:
        """Return the models of an upstream, which may be those of an earlier answer; None if there is none.

        A failure is remembered, too: each reading uses up a part of the rate.
        """
        now = time.monotonic()
        known = self._known.get(upstream.name)
        if known is not None and now < known[0] + KEPT:
            return known[1]
        try:
            async with asyncio.timeout(TIMEOUT):
                found: list[dict[str, Any]] | None = await _fetch(upstream)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RefusedError) as error:
            log.warning("models_not_read", upstream=upstream.name, error=type(error).__name__)
            found = known[1] if known is not None else None
        self._known[upstream.name] = (now, found)
        return found


async def _fetch(upstream: Upstream) -> list[dict[str, Any]]:
    """Request the models of an upstream. Raises ValueError, RefusedError, aiohttp.ClientError and TimeoutError."""
    permit = await upstream.admission.admit(Applicant())
    headers = {"Authorization": f"Bearer {upstream.api_key}"} if upstream.api_key else {}
    permit.begin_sending()
    try:
        async with (
            upstream.pool.use() as session,
            session.get(
                URL(f"{upstream.base}/models", encoded=True),
                headers=headers,
                allow_redirects=False,
                timeout=upstream.timeout,
            ) as response,
        ):
            permit.mark_sent()
            body = await _read(response)
            permit.note_answer(refused=response.status == 429)  # noqa: PLR2004 - too many requests
            if response.status != _OK:
                raise ValueError(f"status {response.status}")
            return _parse_models(await parse_body(decode_json, body))
    finally:
        permit.close()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the body. Raises ValueError if it is too long, and aiohttp.ClientError."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_SIZE:
            raise ValueError("too long")
    return bytes(body)


def _parse_models(value: Any) -> list[dict[str, Any]]:
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list):
        raise ValueError("not a list of models")  # noqa: TRY004 - as for other contents
    return [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]
