"""Certificates that servers send: names and validity, also of those that fail verification."""

import asyncio
import contextlib
import hashlib
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto

from exporter.probes.net.tls_contexts import (
    LEGACY,
    OP_LEGACY_SERVER_CONNECT,
    VERSIONS,
    FileVersion,
    key_of,
    read_version,
)
from exporter.results import ProbeDetails, TlsInfo
from fleet.inventory.endpoints import TlsSettings

CACHED_SIZE = 4096  # bytes of a certificate
NAME_LIMIT = 200  # characters of a name in a label, and of all names together
NAMES_LIMIT = 20
CHAIN_EXPIRY = "service_tls_chain_expiry_timestamp_seconds"
ENCODING_DER = 2  # _ssl.ENCODING_DER
READ_SIZE = 16 * 1024
HANDSHAKE_READS = 100  # until a handshake has failed


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """The names and the validity (Unix time) of a certificate."""

    subject: str
    issuer: str
    not_before: float
    not_after: float
    description: str
    names: str
    serial: str
    fingerprint: str

    def record(self, details: ProbeDetails, version: str) -> None:
        """Record this as the leaf certificate of a connection with the TLS version `version`."""
        details.gauges["service_tls_certificate_expiry_timestamp_seconds"] = self.not_after
        details.gauges["service_tls_certificate_not_before_timestamp_seconds"] = self.not_before
        details.tls = TlsInfo(version, self.issuer, self.subject, self.names, self.serial, self.fingerprint)
        details.evidence["certificate"] = self.description


@lru_cache(maxsize=50_000)
def is_ip_address(host: str) -> bool:
    """Whether `host` is an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def parse_certificate(der: bytes) -> CertificateInfo:
    """Parse a certificate; the result is cached, unless it is so long that many would fill the memory.

    Raises ValueError.
    """
    return _parse_cached(der) if len(der) <= CACHED_SIZE else _parse_der(der)


@lru_cache(maxsize=4096)
def _parse_cached(der: bytes) -> CertificateInfo:
    return _parse_der(der)


def _parse_der(der: bytes) -> CertificateInfo:
    try:
        certificate = x509.load_der_x509_certificate(der)
        subject, issuer = (name.rfc4514_string()[:NAME_LIMIT] for name in (certificate.subject, certificate.issuer))
        before, after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        names = ",".join(_names(certificate))[:NAME_LIMIT]
        description = f"{subject or names or 'no name'}, issued by {issuer}, valid {before:%F} to {after:%F}"
        serial, fingerprint = f"{certificate.serial_number:x}", hashlib.sha256(der).hexdigest()
        return CertificateInfo(
            subject, issuer, before.timestamp(), after.timestamp(), description, names, serial, fingerprint
        )
    except Exception as error:
        raise ValueError(f"cannot parse the certificate: {error}") from error


def _names(certificate: x509.Certificate) -> list[str]:
    """Return the first names of a certificate: of hosts, and IP addresses."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return [*names.get_values_for_type(x509.DNSName), *addresses][:NAMES_LIMIT]


def record_certificates(peer: ssl.SSLObject, details: ProbeDetails) -> None:
    """Record the leaf certificate of a connection, and the expiry of the chain that verifies, if they can be parsed."""
    der, version = peer.getpeercert(binary_form=True), peer.version() or ""
    with contextlib.suppress(ValueError):
        if der:
            parse_certificate(der).record(details, version)
        chain = [parse_certificate(each) for each in _get_verified_chain(peer)]
        if chain:
            details.gauges[CHAIN_EXPIRY] = min(certificate.not_after for certificate in chain)


def _get_verified_chain(peer: ssl.SSLObject) -> list[bytes]:
    """Return the certificates from the leaf to one that is trusted, in DER; empty if none is verified."""
    if peer.context.verify_mode == ssl.CERT_NONE:
        return []
    if hasattr(peer, "get_verified_chain"):  # from Python 3.13 on
        return list(peer.get_verified_chain())
    inner: Any = peer._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - the only access
    return [certificate.public_bytes(ENCODING_DER) for certificate in inner.get_verified_chain() or ()]


async def record_chain(
    reader: asyncio.StreamReader,
    transport: asyncio.Transport,
    server_name: str,
    tls: TlsSettings,
    details: ProbeDetails,
) -> None:
    """Record the certificate chain that a server sends, whether or not it verifies.

    The chain is also recorded if the handshake fails after the server has sent it. Its expiry is that of the chain that
    verifies, since a server may send certificates that no client uses; if none verifies, that of all that were sent.
    """
    connection = _create_unverified_connection(server_name, tls)
    with contextlib.suppress(SSL.Error, OSError):  # a server that requires a client certificate has sent its own before
        await _do_handshake(connection, reader, transport)
    chain = connection.get_peer_cert_chain() or []
    if not chain:
        return
    try:
        certificates = [_parse(certificate) for certificate in chain]
        verified = [_parse(certificate) for certificate in _verify(chain, tls.ca_file)]
    except ValueError:
        return
    certificates[0].record(details, connection.get_protocol_version_name())
    details.gauges[CHAIN_EXPIRY] = min(certificate.not_after for certificate in verified or certificates)
    details.evidence["chain"] = [certificate.description for certificate in certificates]


def _parse(certificate: crypto.X509) -> CertificateInfo:
    return parse_certificate(crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate))


def _verify(chain: Sequence[crypto.X509], ca_file: Path | None) -> Sequence[crypto.X509]:
    """Return the chain from the first certificate to one that is trusted, or nothing if there is none."""
    leaf, *others = chain
    try:
        return crypto.X509StoreContext(
            _load_trusted(ca_file, read_version(ca_file) if ca_file else None), leaf, others
        ).get_verified_chain()
    except (crypto.X509StoreContextError, OSError):
        return ()


@lru_cache(maxsize=1024)
def _load_trusted(ca_file: Path | None, _version: FileVersion | None) -> crypto.X509Store:
    """Return the certificates of a file, or those of the system. Cached, since loading them is slow."""
    store, system = crypto.X509Store(), ssl.get_default_verify_paths()
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    if ca_file is not None:
        store.load_locations(str(ca_file))
    elif system.cafile or system.capath:
        store.load_locations(system.cafile, system.capath)
    return store


async def read_tls_alert(
    reader: asyncio.StreamReader, transport: asyncio.Transport, server_name: str, tls: TlsSettings
) -> str:
    """Return the TLS alert that a server sends right after the handshake, or an empty string.

    With TLS 1.3, a server reports a missing or refused client certificate only then.
    """
    connection = _create_unverified_connection(server_name, tls)
    try:
        await _do_handshake(connection, reader, transport)
        for _ in range(HANDSHAKE_READS):
            if not (received := await reader.read(READ_SIZE)):
                return ""
            connection.bio_write(received)
            await asyncio.sleep(0)
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
    key = key_of(tls)
    # Without finite-field Diffie-Hellman: see runtime.tls.
    context.set_cipher_list(f"{LEGACY if key.has_legacy_ciphers else 'DEFAULT'}:!kDHE:!PSK:!SRP".encode())
    context.set_min_proto_version(VERSIONS[key.min_version])
    if key.max_version:
        context.set_max_proto_version(VERSIONS[key.max_version])
    if key.legacy:
        context.set_options(OP_LEGACY_SERVER_CONNECT)
    if tls.cert_file:
        context.use_certificate_chain_file(str(tls.cert_file))
        context.use_privatekey_file(str(tls.key_file or tls.cert_file))
    connection = SSL.Connection(context, None)
    if not is_ip_address(server_name):
        connection.set_tlsext_host_name(server_name.encode("idna"))
    connection.set_connect_state()
    return connection


async def _do_handshake(connection: SSL.Connection, reader: asyncio.StreamReader, transport: asyncio.Transport) -> None:
    for _ in range(HANDSHAKE_READS):
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            _send(connection, transport)
            received = await reader.read(READ_SIZE)
            if not received:
                return
            connection.bio_write(received)
            await asyncio.sleep(0)  # OpenSSL passes over any number of empty messages
        else:
            _send(connection, transport)
            return


def _send(connection: SSL.Connection, transport: asyncio.Transport) -> None:
    try:
        while True:
            transport.write(connection.bio_read(READ_SIZE))
    except SSL.WantReadError:
        return
