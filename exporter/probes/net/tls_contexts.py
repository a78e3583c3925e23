"""TLS options of probes, and the contexts that are made from them."""

import ssl
import warnings
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import model_validator

from exporter.results import ProbeFailure
from fleet.inventory.endpoints import TlsSettings
from runtime.tls import create_client_context

TlsVersion = Literal["1.0", "1.1", "1.2", "1.3"]
FileVersion = tuple[int, int, int]  # time of the last change in nanoseconds, size, inode
DEFAULT_MIN_VERSION: Literal["1.2"] = "1.2"
# With exchanges of keys by RSA, CBC, SHA-1 and short keys, which OpenSSL refuses at its default level.
LEGACY = "ALL:!aNULL:!eNULL:!PSK:!SRP:@SECLEVEL=0"
OP_LEGACY_SERVER_CONNECT = 0x4  # ssl.OP_LEGACY_SERVER_CONNECT from Python 3.12 on
VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


class ContextKey(NamedTuple):
    """What determines an SSL context, beside the content of its files."""

    verify: bool
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    min_version: TlsVersion
    max_version: TlsVersion | None
    legacy: bool

    @property
    def has_legacy_ciphers(self) -> bool:
        """Whether algorithms are offered that current programs refuse: versions below 1.2 have no others."""
        return self.legacy or self.min_version < DEFAULT_MIN_VERSION


class ProbeTls(TlsSettings):
    """TLS options of a probe; `legacy` accepts what current programs refuse, except for old versions."""

    min_version: TlsVersion | None = None
    max_version: TlsVersion | None = None
    legacy: bool = False

    @model_validator(mode="after")
    def _check_versions(self) -> "ProbeTls":
        if self.min_version and self.max_version and self.min_version > self.max_version:
            raise ValueError(f"min_version ({self.min_version}) must not be above max_version ({self.max_version})")
        return self

    @cached_property
    def context_key(self) -> ContextKey:
        """What determines the SSL context, beside the content of the files."""
        lowest = self.min_version or min(self.max_version or DEFAULT_MIN_VERSION, DEFAULT_MIN_VERSION)
        files = self.ca_file, self.cert_file, self.key_file
        return ContextKey(self.verify, *files, lowest, self.max_version, self.legacy)


@lru_cache(maxsize=1024)
def _create_ssl_context(key: ContextKey, _files: tuple[FileVersion, ...], alpn: tuple[str, ...]) -> ssl.SSLContext:
    """Create a client context. Cached, since loading the system's root certificates is slow."""
    context = create_client_context(
        str(key.ca_file) if key.ca_file else None, LEGACY if key.has_legacy_ciphers else None
    )
    if not key.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if key.cert_file:
        context.load_cert_chain(key.cert_file, key.key_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of versions below 1.2
        context.minimum_version = VERSIONS[key.min_version]
        if key.max_version:
            context.maximum_version = VERSIONS[key.max_version]
    if key.legacy:
        context.options |= OP_LEGACY_SERVER_CONNECT
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


def read_version(path: Path) -> FileVersion:
    """Return what changes with the content of a file. Raises OSError."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def key_of(tls: TlsSettings) -> ContextKey:
    return (tls if isinstance(tls, ProbeTls) else ProbeTls.model_validate(tls.model_dump())).context_key


def ssl_context_for(tls: TlsSettings, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    """Return the SSL context for a probe's `tls` options; it offers the protocols `alpn`. Raises ProbeFailure.

    Files are read again once they have changed.
    """
    key = key_of(tls)
    try:
        files = tuple(read_version(path) for path in (key.ca_file, key.cert_file, key.key_file) if path is not None)
        return _create_ssl_context(key, files, alpn)
    except (OSError, ssl.SSLError) as error:
        raise ProbeFailure("error", f"cannot load the certificate files: {error}") from error
