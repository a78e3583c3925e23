"""TLS with peers that may be hostile."""

import ssl


def create_client_context(cafile: str | None = None, ciphers: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies servers, by the system's certificates or those of a file. Raises OSError.

    `ciphers` is a list in OpenSSL's format, in place of Python's. It offers no finite-field Diffie-Hellman, for which
    the server chooses the prime: one of 10,000 bits takes a second.

    What verifies does not depend on the version of Python: any certificate of the file is trusted, also one that is no
    root, and the name must stand in the extension for names.
    """
    context = ssl.create_default_context(cafile=cafile)
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.hostname_checks_common_name = False
    if ciphers is not None:
        context.set_ciphers(ciphers)
    offered = [cipher["name"] for cipher in context.get_ciphers() if not cipher["kea"].startswith("kx-dhe")]
    context.set_ciphers(":".join(offered))
    return context


def restrict_key_exchange(context: ssl.SSLContext) -> None:
    """Let clients of a server's context exchange keys by the curve P-256 only, which all of them know.

    OpenSSL offers finite-field groups with TLS 1.3, too: one of 8,192 bits costs a server 0.2 s for each handshake, and
    a client that repeats what another one has sent nothing. Python has no way to choose several groups.
    """
    context.set_ecdh_curve("prime256v1")
