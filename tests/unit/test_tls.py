"""The ciphers and groups that are offered to peers which may be hostile."""

import ssl
from pathlib import Path

import pytest
import trustme

from exporter.probes.net import certificates
from exporter.probes.net.tls_contexts import OP_LEGACY_SERVER_CONNECT, ProbeTls, ssl_context_for
from runtime.tls import create_client_context
from runtime.webconfig import WebConfigFile


def test_no_server_chooses_a_prime() -> None:
    """With one of 10,000 bits, each handshake would block the event loop for a second."""
    exchanges = {cipher["kea"] for cipher in create_client_context().get_ciphers()}
    assert {"kx-any", "kx-ecdhe"} <= exchanges
    assert not any(exchange.startswith("kx-dhe") for exchange in exchanges)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Carry out a handshake in memory. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
    ]
    for _ in range(6):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert all(side.version() for side in sides)


@pytest.mark.parametrize("group", ["", "prime256v1", "ffdhe2048", "ffdhe8192", "secp384r1", "secp521r1"])
def test_no_client_chooses_a_group_that_costs_the_server_much(tmp_path: Path, group: str) -> None:
    """One of 8,192 bits costs 0.2 s, and a client that repeats a recorded message nothing."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    both = tmp_path / "both.pem"
    both.chmod(0o600)
    config = tmp_path / "web.yml"
    config.write_text(f"tls_server_config: {{cert_file: {both}, key_file: {both}}}\n")
    server = WebConfigFile(config).tls
    assert server is not None
    client = ssl.create_default_context()
    authority.configure_trust(client)
    if group:
        client.set_ecdh_curve(group)
    if group in ("", "prime256v1"):
        shake_hands(server, client)
        return
    with pytest.raises(ssl.SSLError):
        shake_hands(server, client)


@pytest.mark.parametrize("python", [ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN, ssl.VERIFY_DEFAULT])
def test_verification_does_not_depend_on_the_version_of_python(
    monkeypatch: pytest.MonkeyPatch, python: ssl.VerifyFlags
) -> None:
    """Python 3.13 sets other flags by default."""
    create = ssl.create_default_context

    def create_other(**options: object) -> ssl.SSLContext:
        context = create(**options)  # type: ignore[arg-type]
        context.verify_flags |= python
        return context

    monkeypatch.setattr(ssl, "create_default_context", create_other)
    flags = create_client_context().verify_flags
    assert flags == ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN


def test_servers_without_secure_renegotiation() -> None:
    assert ssl_context_for(ProbeTls(legacy=True)).options & OP_LEGACY_SERVER_CONNECT
    assert not ssl_context_for(ProbeTls()).options & OP_LEGACY_SERVER_CONNECT


@pytest.mark.parametrize("tls", [ProbeTls(), ProbeTls(legacy=True), ProbeTls(min_version="1.0")])
def test_certificates_are_read_without_finite_field_groups(tls: ProbeTls) -> None:
    offered = certificates._create_unverified_connection("h.test", tls).get_cipher_list()
    assert [name for name in offered if name.startswith(("DHE", "EDH"))] == []
