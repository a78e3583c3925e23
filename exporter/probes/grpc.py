"""The `grpc` probe: a call of the standard health service, over HTTP/2.

Sources: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md (the call),
https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto (the health service).
"""

import asyncio
import base64
import re
import ssl
import time
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator, Field, SecretStr

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.certificates import is_ip_address
from exporter.probes.net.connections import DialOptions, connect, find_handshake_alert, server_name_of
from exporter.probes.net.http2 import ALPN, FrameReader, Http2Error, Http2Response, send_request
from exporter.probes.tcp import OptionalTls
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Address, split_address
from runtime import VERSION

METHOD = "/grpc.health.v1.Health/Check"
# https://github.com/grpc/grpc/blob/master/doc/statuscodes.md
_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_CODES = {str(number): name for number, name in enumerate(_NAMES)}
# https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md
_CODES_OF_HTTP = {
    "400": "INTERNAL", "401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE", "502": "UNAVAILABLE", "503": "UNAVAILABLE", "504": "UNAVAILABLE",
}  # fmt: skip
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")  # HealthCheckResponse.ServingStatus
_PREFIX = 5  # bytes before a message: whether it is compressed, and its length
METADATA_LIMIT = 8 * 1024  # bytes, which servers of gRPC accept by default
_METADATA_NAME = re.compile(r"[0-9a-z_.-]+")
# Headers that the probe sets, or that HTTP/2 has no use for (RFC 9113, 8.2.2).
_RESERVED = (
    "te", "content-type", "user-agent", "host", "content-length", "connection", "keep-alive", "proxy-connection",
    "transfer-encoding", "upgrade",
)  # fmt: skip


def _check_metadata(metadata: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """Refuse names and values that gRPC does not allow or the probe sets; return the names in lower case."""
    lowered = {name.lower(): value for name, value in metadata.items()}
    if len(lowered) < len(metadata):
        raise ValueError("has a name twice: upper and lower case are the same")
    for name, secret in lowered.items():
        value = secret.get_secret_value()
        if not _METADATA_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of metadata: use letters, digits, _ . and -")
        if name in _RESERVED or name.startswith("grpc-"):
            raise ValueError(f"{name} cannot be set: gRPC sets it")
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(f"{name} must be one line of printable ASCII characters without blanks at its ends")
        if name.endswith("-bin") and not _is_base64(value):
            raise ValueError(f"{name} must be base64, as its name ends in -bin")
    if sum(len(name) + len(value.get_secret_value()) for name, value in lowered.items()) > METADATA_LIMIT:
        raise ValueError(f"is longer than {METADATA_LIMIT} bytes")
    return lowered


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text + "=" * (-len(text) % 4), validate=True)  # gRPC allows to omit the padding
    except ValueError:
        return False
    return True


class GrpcProbeOptions(DialOptions):
    address: Address
    metadata: Annotated[dict[str, SecretStr], AfterValidator(_check_metadata)] = Field(default_factory=dict)
    service: Annotated[str, Field(max_length=1000)] = ""
    tls: OptionalTls = None


async def probe_grpc(options: GrpcProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    response = await _call(options, details)
    _check_call(response, options)
    try:
        status = _parse_status(_unwrap(response))
    except ValueError as error:
        raise ProbeFailure("protocol", f"the call to {options.address} failed: {error}") from error
    name = _STATUSES[status] if status < len(_STATUSES) else f"{status} (unknown status)"
    if name != "SERVING":
        raise ProbeFailure("state", f"the service {options.service!r} is {name}, expected SERVING")


async def _call(options: GrpcProbeOptions, details: ProbeDetails) -> Http2Response:
    """Call the health service over a new connection. Raises ProbeFailure."""
    transport, frames = await _connect(options, details)
    address = (transport.get_extra_info("peername") or [""])[0]
    started = time.perf_counter()
    try:
        return await send_request(transport, frames, _build_headers(options), _build_request(options.service))
    except Http2Error as error:
        transport.abort()
        alert = await _find_alert(options, address) if frames.ended_silently else None
        failed = f"the call to {options.address} failed" if frames.speaks_http2 else _no_server(options)
        raise alert or ProbeFailure("protocol", f"{failed}: {error}") from error
    finally:
        transport.abort()
        details.add_phase("processing", time.perf_counter() - started)


async def _connect(options: GrpcProbeOptions, details: ProbeDetails) -> tuple[asyncio.Transport, FrameReader]:
    host, port = split_address(options.address)
    try:
        transport, frames, _ = await connect(
            host, port, lambda: FrameReader(details), details, dial=options, tls=options.tls, alpn=(ALPN,)
        )
    except ProbeFailure as failure:
        if "NO_APPLICATION_PROTOCOL" in str(failure.__cause__):
            raise ProbeFailure("protocol", f"{_no_server(options)}: it refuses HTTP/2: {failure.message}") from failure
        raise
    frames.connection_made(transport)  # with TLS, it has the transport below so far
    session: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if session is not None and session.selected_alpn_protocol() != ALPN:
        transport.abort()
        raise ProbeFailure("protocol", f"{_no_server(options)}: it does not choose HTTP/2 (ALPN {ALPN}) for TLS")
    return transport, frames


async def _find_alert(options: GrpcProbeOptions, address: str) -> ProbeFailure | None:
    if options.tls is None or not address:
        return None
    host, port = split_address(options.address)
    return await find_handshake_alert(address, port, server_name_of(options.tls, host), options.tls, options)


def _no_server(options: GrpcProbeOptions) -> str:
    return f"no gRPC server at {options.address}"


def _build_headers(options: GrpcProbeOptions) -> list[tuple[str, str]]:
    host, _ = split_address(options.address)
    name = server_name_of(options.tls, host) if options.tls else host
    return [
        (":method", "POST"),
        (":scheme", "https" if options.tls else "http"),
        (":path", METHOD),
        (":authority", f"[{name}]" if ":" in name and is_ip_address(name) else name),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "identity"),
        ("user-agent", f"defib/{VERSION}"),
        *((name, value.get_secret_value()) for name, value in options.metadata.items()),
    ]


def _build_request(service: str) -> bytes:
    """Return a HealthCheckRequest, whose field 1 is the string `service`, as a message of gRPC."""
    name = service.encode()
    message = b"\x0a" + _encode_varint(len(name)) + name if name else b""
    return b"\0" + len(message).to_bytes(4) + message


def _check_call(response: Http2Response, options: GrpcProbeOptions) -> None:
    """Raise ProbeFailure unless the call was successful, whatever the service's status."""
    headers = response.headers
    code, text = headers.get("grpc-status"), unquote(headers.get("grpc-message", ""))
    if code is not None:
        name = _CODES.get(code, f"the unknown code {code!r}")
        if name != "OK":
            answer = f"the health service answered {name}{f': {text}' if text else ''}"
            raise ProbeFailure(_reason_of(name, options), answer)
        return
    status, content_type = headers.get(":status", ""), headers.get("content-type", "")
    name = _CODES_OF_HTTP.get(status, "UNKNOWN")
    if status == "200" or name == "UNAVAILABLE":
        answer = f"HTTP status {status}, content type {content_type!r}, no gRPC status"
        raise ProbeFailure("protocol", f"{_no_server(options)}: {answer}")
    raise ProbeFailure(_reason_of(name, options), f"the health service answered {name}: HTTP status {status}")


def _reason_of(code: str, options: GrpcProbeOptions) -> FailureReason:
    """Return the reason of a failed call; its metadata may be credentials."""
    return "auth" if options.metadata and code in ("UNAUTHENTICATED", "PERMISSION_DENIED") else "status"


def _unwrap(response: Http2Response) -> bytes:
    """Return the only message of a response. Raises ValueError."""
    body = bytes(response.body)
    if body[:1] not in (b"\0", b""):
        encoding = response.headers.get("grpc-encoding", "unknown")
        raise ValueError(f"the response is compressed ({encoding}), which was not requested")
    if len(body) < _PREFIX or len(body) - _PREFIX != int.from_bytes(body[1:_PREFIX]):
        raise ValueError(f"the response of {len(body)} bytes is not one message")
    return body[_PREFIX:]


def _parse_status(message: bytes) -> int:
    """Return field 1 of a HealthCheckResponse, the enum `status`; other fields are ignored. Raises ValueError.

    Format: https://protobuf.dev/programming-guides/encoding/
    """
    status = at = 0
    while at < len(message):
        key, at = _decode_varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _decode_varint(message, at)
            status = value if key >> 3 == 1 else status
        elif wire_type == 2:  # noqa: PLR2004 - a string
            size, at = _decode_varint(message, at)
            at += size
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            raise ValueError("the message is not a HealthCheckResponse")
    if at > len(message):
        raise ValueError("the message is incomplete")
    return status


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _decode_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where it ends. Raises ValueError."""
    number = 0
    for index, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << (7 * index)
        if byte <= 0x7F:  # noqa: PLR2004 - the last byte
            return number, at + index + 1
    raise ValueError("the message has an incomplete number")


GRPC = ProbeKind(GrpcProbeOptions, probe_grpc)
