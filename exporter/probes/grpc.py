"""The `grpc` probe: the standard health service (grpc.health.v1), called with grpcio.

grpcio is an optional extra; without it, an inventory with `grpc` probes is refused.
"""

import asyncio
import importlib.util
import os
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.connections import AddressOptions, DialOptions, connect, resolve
from exporter.probes.tcp import expand_tls
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.documents import TextWithBase
from fleet.inventory.endpoints import Address, TlsSettings, split_address

EXTRA = "grpc_health"
# grpc's fork handlers break child processes, and its log lines are not in the format of this program's log.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _require_extra(address: object) -> object:
    """Check that the extra is installed, where the inventory is loaded to run its probes."""
    if isinstance(address, TextWithBase) and address.checked and importlib.util.find_spec(EXTRA) is None:
        raise ValueError("requires an extra that is not installed: pip install 'defib[grpc]'")
    return address


class GrpcProbeOptions(AddressOptions):
    address: Annotated[Address, BeforeValidator(_require_extra)]
    service: str = ""
    tls: Annotated[
        TlsSettings | None, BeforeValidator(expand_tls, json_schema_input_type=bool | TlsSettings | None)
    ] = None

    @field_validator("tls")
    @classmethod
    def _check_verify(cls, tls: TlsSettings | None) -> TlsSettings | None:
        if tls is not None and not tls.verify:
            raise ValueError("verify must not be false, which grpc does not support: set ca_file")
        return tls


async def probe_grpc(options: GrpcProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    host, port = split_address(options.address)
    addresses = await resolve(host, port, details, options)
    ipv6 = ":" in addresses[0]  # grpc accepts several addresses, but of one version only
    target = ",".join(f"[{each}]:{port}" if ipv6 else f"{each}:{port}" for each in addresses if (":" in each) == ipv6)
    started = time.perf_counter()
    async with await _open_channel(options, f"ipv6:{target}" if ipv6 else f"ipv4:{target}", host) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(service=options.service))
        except grpc.aio.AioRpcError as error:
            details.add_phase("processing", time.perf_counter() - started)
            raise await _failure(options, error, details) from error
    details.add_phase("processing", time.perf_counter() - started)
    names = {value: name for name, value in health_pb2.HealthCheckResponse.ServingStatus.items()}
    status = names.get(response.status, f"{response.status} (unknown status)")
    if status != "SERVING":
        raise ProbeFailure("state", f"the service {options.service!r} is {status}, expected SERVING")


async def _open_channel(options: GrpcProbeOptions, target: str, host: str) -> Any:
    import grpc

    settings: list[tuple[str, Any]] = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
    tls = options.tls
    if tls is None:
        return grpc.aio.insecure_channel(target, [*settings, ("grpc.default_authority", host)])
    roots, key, chain = await asyncio.to_thread(_read_files, tls.ca_file, tls.key_file or tls.cert_file, tls.cert_file)
    settings.append(("grpc.ssl_target_name_override", tls.server_name or host))
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots, key, chain), settings)


def _read_files(*paths: Path | None) -> list[bytes | None]:
    try:
        return [path.read_bytes() if path else None for path in paths]
    except OSError as error:
        raise ProbeFailure("error", f"cannot read the certificate files: {error}") from error


async def _failure(options: GrpcProbeOptions, error: Any, details: ProbeDetails) -> ProbeFailure:
    """Find the cause of an error; grpc reports UNAVAILABLE for refused connections and bad certificates alike."""
    import grpc

    code = error.code()
    if code is not grpc.StatusCode.UNAVAILABLE:
        reason: FailureReason = "status"
        return ProbeFailure(reason, f"the health service answered {code.name}: {error.details()}")
    host, port = split_address(options.address)
    no_grpc = ProbeFailure("protocol", f"no gRPC server at {options.address}: {error.details()}")
    details.timeout_failure = no_grpc
    try:
        transport, _ = await connect(
            host, port, asyncio.Protocol, details, dial=DialOptions(ip=options.ip), tls=options.tls
        )
    except ProbeFailure as failure:
        return failure
    transport.abort()
    return no_grpc


GRPC = ProbeKind(GrpcProbeOptions, probe_grpc)
