"""The environment of child processes: without the secrets that this process has in its own."""

import os
import re
from collections.abc import Mapping

# What programs need to run and to find their files, sockets and certificates; nothing that may contain credentials.
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|SSL_CERT_FILE|SSL_CERT_DIR|LD_LIBRARY_PATH"
    r"|PYTHONPATH|XDG_RUNTIME_DIR|DBUS_SESSION_BUS_ADDRESS|DOCKER_(HOST|CONTEXT|CONFIG|CERT_PATH|TLS_VERIFY)"
)
_PROXIES = re.compile(r"(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE)  # the URL of a proxy may contain a password


def child_environment(*, proxies: bool = False, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a child process receives; those of proxies only where it needs them."""
    return {
        name: value
        for name, value in environ.items()
        if _PASSED.fullmatch(name) or (proxies and _PROXIES.fullmatch(name))
    }
