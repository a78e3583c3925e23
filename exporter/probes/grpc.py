"""The `grpc` probe: the standard health service (grpc.health.v1), asked with grpc's own stub.

grpcio is an optional extra; where it is missing, an inventory that needs it is refused.
"""

import asyncio
import importlib.util
import os
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.net.connections import Addresses, Dial, connect, resolve
from exporter.probes.tcp import shortened
from exporter.results import ProbeFailure, Reason, Seen
from fleet.inventory.documents import ConfigText
from fleet.inventory.endpoints import Address, TlsSettings, split_address

EXTRA = "grpc_health"
# We start processes, and grpc's handlers of that break them; its own log is none of ours.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _installed(address: object) -> object:
    """Only the program that probes needs the stub."""
    if isinstance(address, ConfigText) and address.checked and importlib.util.find_spec(EXTRA) is None:
        raise ValueError("the grpc probe needs an extra that is not installed: pip install 'defib[grpc]'")
    return address


class GrpcOptions(Addresses):
    address: Annotated[Address, BeforeValidator(_installed)]
    service: str = ""
    tls: Annotated[TlsSettings | None, BeforeValidator(shortened, json_schema_input_type=bool | TlsSettings | None)] = (
        None
    )

    @field_validator("tls")
    @classmethod
    def _verified(cls, tls: TlsSettings | None) -> TlsSettings | None:
        if tls is not None and not tls.verify:
            raise ValueError("grpc cannot do without verification: give its ca_file")
        return tls


async def probe_grpc(options: GrpcOptions, _means: Means, seen: Seen) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    host, port = split_address(options.address)
    addresses = await resolve(host, port, seen, options)
    six = ":" in addresses[0]  # grpc takes several addresses, of one version
    target = ",".join(f"[{each}]:{port}" if six else f"{each}:{port}" for each in addresses if (":" in each) == six)
    started = time.perf_counter()
    async with await _channel(options, f"ipv6:{target}" if six else f"ipv4:{target}", host) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=options.service))
        except grpc.aio.AioRpcError as error:
            seen.phase("processing", time.perf_counter() - started)
            raise await _failure(options, error, seen) from error
    seen.phase("processing", time.perf_counter() - started)
    known = {value: name for name, value in health_pb2.HealthCheckResponse.ServingStatus.items()}
    status = known.get(answer.status, f"{answer.status}, which nobody knows")
    if status != "SERVING":
        raise ProbeFailure("state", f"the service {options.service!r} is {status}, expected SERVING")


async def _channel(options: GrpcOptions, target: str, host: str) -> Any:
    import grpc

    settings: list[tuple[str, Any]] = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
    tls = options.tls
    if tls is None:
        return grpc.aio.insecure_channel(target, [*settings, ("grpc.default_authority", host)])
    roots, key, chain = await asyncio.to_thread(_files, tls.ca_file, tls.key_file or tls.cert_file, tls.cert_file)
    settings.append(("grpc.ssl_target_name_override", tls.server_name or host))
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots, key, chain), settings)


def _files(*paths: Path | None) -> list[bytes | None]:
    try:
        return [path.read_bytes() if path else None for path in paths]
    except OSError as error:
        raise ProbeFailure("error", f"the certificate files cannot be used: {error}") from error


async def _failure(options: GrpcOptions, error: Any, seen: Seen) -> ProbeFailure:
    """What went wrong, in our words: grpc says of refusals and of certificates alike that it is unavailable."""
    import grpc

    code = error.code()
    if code is not grpc.StatusCode.UNAVAILABLE:
        reason: Reason = "status"
        return ProbeFailure(reason, f"the health service answered {code.name}: {error.details()}")
    host, port = split_address(options.address)
    late = ProbeFailure("protocol", f"no gRPC at {options.address}: {error.details()}")
    seen.overdue = late
    try:
        transport, _ = await connect(host, port, asyncio.Protocol, seen, dial=Dial(ip=options.ip), tls=options.tls)
    except ProbeFailure as failure:
        return failure
    transport.abort()
    return late


GRPC = Kind(GrpcOptions, probe_grpc)
