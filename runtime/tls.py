"""TLS as a client of servers that may be hostile."""

import ssl


def create_client_context(cafile: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies servers, by the system's certificates or those of a file. Raises OSError.

    It offers no finite-field Diffie-Hellman, for which the server chooses the prime: one of 10,000 bits takes a second.
    """
    context = ssl.create_default_context(cafile=cafile)
    offered = [cipher["name"] for cipher in context.get_ciphers() if not cipher["kea"].startswith("kx-dhe")]
    context.set_ciphers(":".join(offered))
    return context
