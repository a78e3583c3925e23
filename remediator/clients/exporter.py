"""The exporter's API: the status of services, and probes on request."""

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from fleet.inventory.endpoints import Endpoint
from remediator.clients.json_client import JsonClient, parsing_response
from remediator.policy.situation import Observation


class Exporter:
    def __init__(self, endpoint: Endpoint, token: SecretStr | None) -> None:
        self._client = JsonClient(endpoint, token)
        self.close = self._client.close

    async def probe(self, service: str, timeout: float) -> Observation:
        """Probe a service after this call began; `timeout` is the probe's, in seconds. Raises ClientError."""
        # A probe in progress ends first, so the request may take two timeouts.
        response = await self._client.request("POST", f"/api/v1/services/{service}/probe", 2 * timeout + 10.0)
        with parsing_response():
            return Observation(
                response["up"], response["success"], response["reason"], response["message"] or "",
                digest=response.get("digest"), host_up=response.get("host_up"),
            )  # fmt: skip

    async def observe_all(self) -> Mapping[str, Observation]:
        """Return the last observation of every service, without probing. Raises ClientError."""
        response = await self._client.request("GET", "/api/v1/services")
        with parsing_response():
            return {service["id"]: _parse_observation(service) for service in response["services"]}

    async def observe(self, service: str) -> Observation:
        """Return the last observation of a service, without probing. Raises ClientError."""
        response = await self._client.request("GET", f"/api/v1/services/{service}")
        with parsing_response():
            return _parse_observation(response)


def _parse_observation(service: Mapping[str, Any]) -> Observation:
    last = service["last"] or {}
    unchanged_for = service.get("unchanged_for_seconds")
    return Observation(
        service["up"],
        last.get("success"),
        last.get("reason"),
        last.get("message") or "",
        None if unchanged_for is None else float(unchanged_for),
        service.get("digest"),
        service.get("host_up"),
    )
