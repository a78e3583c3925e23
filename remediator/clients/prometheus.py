"""Prometheus' API: instant and range queries. Format: https://prometheus.io/docs/prometheus/latest/querying/api/"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet.inventory.endpoints import Endpoint
from fleet.json_client import JsonClient, parsing_response

Point = tuple[float, float]  # Unix time and value
RESPONSE_LIMIT = 16 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Series:
    """A series' labels and its points: Unix time and value, in order."""

    labels: Mapping[str, str]
    points: Sequence[Point]


class Prometheus:
    def __init__(self, endpoint: Endpoint) -> None:
        self._client = JsonClient(endpoint, response_limit=RESPONSE_LIMIT)
        self.close = self._client.close

    async def query(self, expression: str, timeout: float, at: float | None = None) -> list[Series]:
        """Return the present values of an expression, or those at a Unix time. Raises ClientError."""
        form = {"query": expression} if at is None else {"query": expression, "time": f"{at:.3f}"}
        response = await self._client.request("POST", "/api/v1/query", timeout, form=form)
        return await asyncio.to_thread(_parse, response, lambda each: [_point(each["value"])])

    async def query_range(self, expression: str, start: float, end: float, step: float, timeout: float) -> list[Series]:
        """Return the values of an expression between two Unix times, every `step` seconds. Raises ClientError."""
        form = {"query": expression, "start": f"{start:.0f}", "end": f"{end:.0f}", "step": f"{step:.0f}"}
        response = await self._client.request("POST", "/api/v1/query_range", timeout, form=form)
        return await asyncio.to_thread(_parse, response, lambda each: [_point(value) for value in each["values"]])


def _parse(response: Any, read_points: Callable[[Any], Sequence[Point]]) -> list[Series]:
    """Return the series of a response, of which there may be thousands. Raises ClientError."""
    with parsing_response():
        return [Series(each["metric"], read_points(each)) for each in response["data"]["result"]]


def _point(pair: Sequence[object]) -> Point:
    at, value = pair
    return float(str(at)), float(str(value))
