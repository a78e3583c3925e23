"""What a served certificate says of itself, also where it cannot be verified."""

import asyncio
import contextlib
import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from OpenSSL import SSL, crypto

from exporter.results import Seen
from fleet.inventory.endpoints import TlsSettings

NAME_LIMIT = 200  # characters of a name that stands in a label
RECORD = 16 * 1024


@dataclass(frozen=True, slots=True)
class Facts:
    """A certificate's names and its time, in Unix time."""

    subject: str
    issuer: str
    not_before: float
    not_after: float
    told: str  # all of it, for people

    def note(self, seen: Seen, version: str) -> None:
        """Note it as the leaf of a connection of TLS `version`."""
        seen.gauges["service_tls_certificate_expiry_timestamp_seconds"] = self.not_after
        seen.gauges["service_tls_certificate_not_before_timestamp_seconds"] = self.not_before
        seen.tls = (self.issuer, version)
        seen.evidence["certificate"] = self.told


@lru_cache(maxsize=50_000)
def is_literal(host: str) -> bool:
    """Whether `host` is an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def facts(der: bytes) -> Facts:
    """Read a certificate; raises ValueError where it is none."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        subject, issuer = (name.rfc4514_string()[:NAME_LIMIT] for name in (certificate.subject, certificate.issuer))
        before, after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        told = f"{subject or _names(certificate)}, issued by {issuer}, valid {before:%F} to {after:%F}"
        return Facts(subject, issuer, before.timestamp(), after.timestamp(), told)
    except Exception as error:  # the parser has errors of many kinds for what a stranger made
        raise ValueError(f"the certificate cannot be read: {error}") from error


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no name"
    return ", ".join(map(str, names.get_values_for_type(x509.DNSName)[:10]))


def note_leaf(der: bytes | None, version: str, seen: Seen) -> None:
    """Note the certificate of a connection of TLS `version`; one that cannot be read is no reason to fail."""
    with contextlib.suppress(ValueError):
        if der:
            facts(der).note(seen, version)


async def note_chain(
    reader: asyncio.StreamReader, transport: asyncio.Transport, server_name: str, tls: TlsSettings, seen: Seen
) -> None:
    """Shake hands without verifying, and note the chain as it is served: the leaf first.

    A handshake that fails still tells what it had come to; one that came to nothing notes nothing.
    """
    connection = _unverified(server_name, tls)
    with contextlib.suppress(SSL.Error, OSError):  # a server that wants a certificate of ours has shown its own before
        await _shake_hands(connection, reader, transport)
    chain = connection.get_peer_cert_chain() or []
    if not chain:
        return
    try:
        found = [facts(crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)) for certificate in chain]
    except ValueError:
        return
    found[0].note(seen, connection.get_protocol_version_name())
    seen.gauges["service_tls_chain_expiry_timestamp_seconds"] = min(each.not_after for each in found)
    seen.evidence["chain"] = [each.told for each in found]


async def alert_after_handshake(
    reader: asyncio.StreamReader, transport: asyncio.Transport, server_name: str, tls: TlsSettings
) -> str:
    """What a server says that ends a TLS connection right after the handshake, or nothing.

    In TLS 1.3 it learns only then that it is shown no certificate, or not the one it wants.
    """
    connection = _unverified(server_name, tls)
    try:
        await _shake_hands(connection, reader, transport)
        while received := await reader.read(RECORD):
            connection.bio_write(received)
            with contextlib.suppress(SSL.WantReadError):
                connection.recv(1)
                return ""
    except SSL.Error as error:
        return str(error.args[0][0][2]) if error.args and error.args[0] else ""
    except OSError:
        pass
    return ""


def _unverified(server_name: str, tls: TlsSettings) -> SSL.Connection:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    if tls.cert_file:
        context.use_certificate_chain_file(str(tls.cert_file))
        context.use_privatekey_file(str(tls.key_file or tls.cert_file))
    connection = SSL.Connection(context, None)
    if not is_literal(server_name):
        connection.set_tlsext_host_name(server_name.encode("idna"))
    connection.set_connect_state()
    return connection


async def _shake_hands(connection: SSL.Connection, reader: asyncio.StreamReader, transport: asyncio.Transport) -> None:
    while True:
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            _send(connection, transport)
            received = await reader.read(RECORD)
            if not received:
                return
            connection.bio_write(received)
        else:
            _send(connection, transport)
            return


def _send(connection: SSL.Connection, transport: asyncio.Transport) -> None:
    try:
        while True:
            transport.write(connection.bio_read(RECORD))
    except SSL.WantReadError:
        return
