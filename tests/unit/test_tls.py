"""The ciphers that clients offer."""

from runtime.tls import create_client_context


def test_no_server_chooses_a_prime() -> None:
    """With one of 10,000 bits, each handshake would block the event loop for a second."""
    exchanges = {cipher["kea"] for cipher in create_client_context().get_ciphers()}
    assert {"kx-any", "kx-ecdhe"} <= exchanges
    assert not any(exchange.startswith("kx-dhe") for exchange in exchanges)
