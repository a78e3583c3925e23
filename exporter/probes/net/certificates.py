"""Certificates that servers send: names and validity, also of those that fail verification."""

import asyncio
import contextlib
import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from OpenSSL import SSL, crypto

from exporter.results import ProbeDetails
from fleet.inventory.endpoints import TlsSettings

NAME_LIMIT = 200  # characters of a name in a label
READ_SIZE = 16 * 1024


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """The names and the validity (Unix time) of a certificate."""

    subject: str
    issuer: str
    not_before: float
    not_after: float
    description: str

    def record(self, details: ProbeDetails, version: str) -> None:
        """Record this as the leaf certificate of a connection with the TLS version `version`."""
        details.gauges["service_tls_certificate_expiry_timestamp_seconds"] = self.not_after
        details.gauges["service_tls_certificate_not_before_timestamp_seconds"] = self.not_before
        details.tls = (self.issuer, version)
        details.evidence["certificate"] = self.description


@lru_cache(maxsize=50_000)
def is_ip_address(host: str) -> bool:
    """Whether `host` is an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def parse_certificate(der: bytes) -> CertificateInfo:
    """Parse a certificate. Raises ValueError."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        subject, issuer = (name.rfc4514_string()[:NAME_LIMIT] for name in (certificate.subject, certificate.issuer))
        before, after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        description = f"{subject or _names(certificate)}, issued by {issuer}, valid {before:%F} to {after:%F}"
        return CertificateInfo(subject, issuer, before.timestamp(), after.timestamp(), description)
    except Exception as error:
        raise ValueError(f"cannot parse the certificate: {error}") from error


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no name"
    return ", ".join(map(str, names.get_values_for_type(x509.DNSName)[:10]))


def record_leaf(der: bytes | None, version: str, details: ProbeDetails) -> None:
    """Record the leaf certificate of a connection, if it can be parsed."""
    with contextlib.suppress(ValueError):
        if der:
            parse_certificate(der).record(details, version)


async def record_chain(
    reader: asyncio.StreamReader,
    transport: asyncio.Transport,
    server_name: str,
    tls: TlsSettings,
    details: ProbeDetails,
) -> None:
    """Record the certificate chain that a server sends, without verifying it.

    The chain is also recorded if the handshake fails after the server has sent it.
    """
    connection = _create_unverified_connection(server_name, tls)
    with contextlib.suppress(SSL.Error, OSError):  # a server that requires a client certificate has sent its own before
        await _do_handshake(connection, reader, transport)
    chain = connection.get_peer_cert_chain() or []
    if not chain:
        return
    try:
        certificates = [
            parse_certificate(crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)) for certificate in chain
        ]
    except ValueError:
        return
    certificates[0].record(details, connection.get_protocol_version_name())
    details.gauges["service_tls_chain_expiry_timestamp_seconds"] = min(
        certificate.not_after for certificate in certificates
    )
    details.evidence["chain"] = [certificate.description for certificate in certificates]


async def read_tls_alert(
    reader: asyncio.StreamReader, transport: asyncio.Transport, server_name: str, tls: TlsSettings
) -> str:
    """Return the TLS alert that a server sends right after the handshake, or an empty string.

    With TLS 1.3, a server reports a missing or refused client certificate only then.
    """
    connection = _create_unverified_connection(server_name, tls)
    try:
        await _do_handshake(connection, reader, transport)
        while received := await reader.read(READ_SIZE):
            connection.bio_write(received)
            with contextlib.suppress(SSL.WantReadError):
                connection.recv(1)
                return ""
    except SSL.Error as error:
        return str(error.args[0][0][2]) if error.args and error.args[0] else ""
    except OSError:
        pass
    return ""


def _create_unverified_connection(server_name: str, tls: TlsSettings) -> SSL.Connection:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    if tls.cert_file:
        context.use_certificate_chain_file(str(tls.cert_file))
        context.use_privatekey_file(str(tls.key_file or tls.cert_file))
    connection = SSL.Connection(context, None)
    if not is_ip_address(server_name):
        connection.set_tlsext_host_name(server_name.encode("idna"))
    connection.set_connect_state()
    return connection


async def _do_handshake(connection: SSL.Connection, reader: asyncio.StreamReader, transport: asyncio.Transport) -> None:
    while True:
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            _send(connection, transport)
            received = await reader.read(READ_SIZE)
            if not received:
                return
            connection.bio_write(received)
        else:
            _send(connection, transport)
            return


def _send(connection: SSL.Connection, transport: asyncio.Transport) -> None:
    try:
        while True:
            transport.write(connection.bio_read(READ_SIZE))
    except SSL.WantReadError:
        return
