"""The gateway as pages and the API see it: its status, which all viewers share, and what people change in it.

Each change is recorded in the audit log with who requested it, and raises an OperationError if it cannot be done.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from fleet.gateway_limits import GatewayLimits
from fleet.json_client import ClientError, HttpStatusError
from remediator.clients.gateway import Gateway, GatewayStatus
from remediator.operations import (
    ConflictError,
    InvalidOperationError,
    NotFoundError,
    OperationError,
    UnavailableError,
)
from remediator.record.audit import AuditLog
from runtime.access.audit import AuditEntry
from runtime.access.roles import Identity
from runtime.shared_reads import SharedReads

SHARED_FOR = 1.0  # seconds
DEADLINE, PATIENCE = 2.0, 5.0  # seconds of a reading, and of those who wait for it
_LATE = "no answer in time"
_REFUSALS: dict[int, type[OperationError]] = {400: InvalidOperationError, 404: NotFoundError, 409: ConflictError}
log = structlog.get_logger()


@dataclass(frozen=True)
class GatewayReading:
    """The gateway's status, or why it cannot be read, and since which Unix time."""

    status: GatewayStatus | None = None
    problem: str = ""
    since: float = 0.0


class GatewayOperations:
    """`client` is None where no gateway is configured; `unix` returns the Unix time."""

    def __init__(self, client: Gateway | None, audit_log: AuditLog, unix: Callable[[], float]) -> None:
        self._client, self._audit_log, self._unix = client, audit_log, unix
        self._reads = SharedReads(running=1, waiting=20, shared_for=SHARED_FOR)
        self._version = 0  # changes make earlier readings useless
        self._failing_since: float | None = None

    @property
    def is_configured(self) -> bool:
        return self._client is not None

    async def replace(self, client: Gateway | None) -> None:
        """Use another client from now on, and close the present one."""
        former, self._client = self._client, client
        self._version += 1
        if former is not None:
            await former.close()

    async def read(self) -> GatewayReading:
        """Return the status, which is at most a second old. The gateway is asked only when somebody wants to know."""
        try:
            return await self._reads.read(self._version, self._read, PATIENCE)
        except TimeoutError as error:
            return self._fail(str(error) or _LATE)

    async def _read(self) -> GatewayReading:
        client = self._client
        if client is None:
            return self._fail("gateway.upstreams is empty")
        try:
            async with asyncio.timeout(DEADLINE):
                status = await client.read_status()
        except TimeoutError:
            return self._fail(_LATE)
        except ClientError as error:
            return self._fail(str(error))
        self._failing_since = None
        return GatewayReading(status)

    def _fail(self, problem: str) -> GatewayReading:
        if self._failing_since is None:
            self._failing_since = self._unix()
        return GatewayReading(problem=problem, since=self._failing_since)

    async def change_limits(self, limits: GatewayLimits, by: Identity) -> GatewayStatus:
        """Change limits until the gateway's next reload; returns its status after that."""
        detail = limits.model_dump_json(exclude_unset=True)
        async with self._audit_log.recording_refusal(by, "change gateway limits", "", detail):
            with _asking_gateway():
                status = await self._get_client().change_limits(limits)
        self._version += 1
        await self._audit_log.write(AuditEntry.of(by, "change gateway limits", detail=detail))
        log.warning("gateway_limits_changed", limits=detail, by=by.label)
        return status

    async def reset(self, upstream: str, by: Identity) -> None:
        """Return an upstream to its base rate, and end its pause."""
        async with self._audit_log.recording_refusal(by, "reset gateway rate", upstream):
            with _asking_gateway():
                await self._get_client().reset(upstream)
        self._version += 1
        await self._audit_log.write(AuditEntry.of(by, "reset gateway rate", upstream))
        log.warning("gateway_rate_reset", upstream=upstream, by=by.label)

    def _get_client(self) -> Gateway:
        if self._client is None:
            raise NotFoundError("not_configured", "no gateway is configured: gateway.upstreams is empty")
        return self._client


@contextlib.contextmanager
def _asking_gateway() -> Iterator[None]:
    """Translate the errors of the gateway."""
    try:
        yield
    except HttpStatusError as error:
        refusal = _REFUSALS.get(error.status)
        if refusal is not None and error.code:
            raise refusal(error.code, error.message) from error
        raise UnavailableError("gateway_unavailable", f"the gateway refuses it: {error}") from error
    except ClientError as error:
        raise UnavailableError("gateway_unavailable", f"cannot query the gateway: {error}") from error
