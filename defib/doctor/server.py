"""Checks that are common to all HTTP servers: reachable, clock, certificate, local token."""

import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx
import yaml
from pydantic import SecretStr

from defib.doctor.findings import CheckResult, Finding
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory
from fleet.json_client import http_client
from runtime.errors import DefibError
from runtime.tokens import ConfiguredToken, TokenError

TIMEOUT = 5.0  # seconds for each response
CLOCK_TOLERANCE = 5.0  # seconds; the Date header has whole ones
CERTIFICATE_DAYS = 30
ServerCheck = Callable[[Inventory], Awaitable[Sequence[Finding]]]


async def check_server(name: str, check: ServerCheck, inventory: Inventory) -> Sequence[Finding]:
    """Return the findings of a check, or a failure if the server's responses have an unexpected form."""
    try:
        return await check(inventory)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        detail = f"unexpected response ({type(error).__name__}): this is another program"
        return [Finding(name, "reachable", "fail", detail, "correct its URL in the configuration")]
    except DefibError as error:
        return [Finding(name, "reachable", "fail", str(error), "correct it in the configuration")]


def not_configured(name: str, key: str, consequence: str) -> Finding:
    """Return a warning that the URL of a server is not configured."""
    detail = f"remediator.{key} is not set: {consequence}"
    return Finding(name, "configured", "warn", detail, f"set remediator.{key}")


class Server:
    """A server that is being checked, and its findings so far."""

    def __init__(self, name: str, endpoint: Endpoint, token: SecretStr | None = None) -> None:
        self.name, self.endpoint = name, endpoint
        self.findings: list[Finding] = []
        self.client = http_client(endpoint, token)

    def add(self, check: str, problem: str = "", fix: str = "", *, detail: str = "", severe: bool = True) -> bool:
        """Add a finding, and return whether the check passed: if there is no problem.

        A problem is a failure if it is severe, else a warning; `detail` is shown if the check passed.
        """
        result: CheckResult = "pass" if not problem else "fail" if severe else "warn"
        self.findings.append(Finding(self.name, check, result, problem or detail, fix))
        return not problem

    async def get(self, path: str) -> httpx.Response | None:
        """Return a successful response; else add a finding and return None."""
        try:
            async with self.client.stream("GET", path, timeout=TIMEOUT) as response:
                await response.aread()
                self._check_certificate(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            self.add(
                "reachable", f"{self.endpoint.base}: {reason}", "start it, or correct its URL in the configuration"
            )
            return None
        if not response.is_success:
            problem = f"{self.endpoint.base}{path}: HTTP {response.status_code}"
            unauthorized = response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            self.add(
                "reachable", problem, "correct its credentials in the configuration" if unauthorized else "see its log"
            )
            return None
        self._check_clock(response)
        return response

    async def check_token(self, token: ConfiguredToken) -> bool:
        """Check that the server accepts the local token; return whether it does."""
        headers = {}
        try:
            if self.endpoint.auth is None:
                headers["Authorization"] = f"Bearer {token.read().get_secret_value()}"
        except TokenError as error:
            fix = f"run this as the remediator's user, use --token-file FILE, or set {token.setting}"
            return self.add("local token", str(error), fix, severe=False)
        try:
            response = await self.client.get("/api/v1/identity", headers=headers, timeout=TIMEOUT)
        except httpx.HTTPError as error:
            return self.add("local token", type(error).__name__, "see its log")
        problem = "" if response.is_success else f"HTTP {response.status_code}"
        fix = f"use the same {token.setting} or token file for it as here, and reload it"
        return self.add("local token", problem, fix)

    def _check_clock(self, response: httpx.Response) -> None:
        date = response.headers.get("Date")
        offset = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
        if abs(offset) > CLOCK_TOLERANCE:
            problem = f"the clock of this machine differs by {offset:+.0f} s"
            self.add("clock", problem, "run NTP on both machines", severe=False)

    def _check_certificate(self, response: httpx.Response) -> None:
        stream = response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream is not None else None
        expires = (tls.getpeercert() or {}).get("notAfter") if tls is not None else None
        if expires:
            days = (ssl.cert_time_to_seconds(expires) - time.time()) / 86400
            problem = f"expires in {days:.0f} days" if days < CERTIFICATE_DAYS else ""
            self.add("certificate", problem, "renew it", detail=f"expires in {days:.0f} days", severe=False)
