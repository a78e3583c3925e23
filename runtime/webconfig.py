"""The `--web.config.file` of the Prometheus exporters: TLS and basic-auth users.

Format: https://prometheus.io/docs/prometheus/latest/configuration/https/
"""

import ssl
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from runtime.errors import StartError

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsServer(_Part):
    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    client_auth_type: Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"] = "NoClientCert"
    min_version: Literal["TLS12", "TLS13"] = "TLS12"


class HttpServer(_Part):
    headers: dict[str, str] = Field(default_factory=dict)


class WebConfig(_Part):
    tls_server_config: TlsServer | None = None
    http_server_config: HttpServer = HttpServer()
    basic_auth_users: dict[str, str] = Field(default_factory=dict)

    @field_validator("basic_auth_users")
    @classmethod
    def _bcrypt(cls, users: dict[str, str]) -> dict[str, str]:
        for name, hashed in users.items():
            if not hashed.startswith(("$2a$", "$2b$", "$2y$")):
                raise ValueError(f"the password of {name!r} is not a bcrypt hash (make one with htpasswd -nBC 10)")
        return users

    def ssl_context(self) -> ssl.SSLContext | None:
        tls = self.tls_server_config
        if tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[tls.min_version]
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
            if tls.client_ca_file:
                context.load_verify_locations(tls.client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"web configuration: cannot use the certificate {tls.cert_file}: {error}") from error
        if tls.client_auth_type == "RequireAndVerifyClientCert":
            context.verify_mode = ssl.CERT_REQUIRED
        elif tls.client_auth_type == "VerifyClientCertIfGiven":
            context.verify_mode = ssl.CERT_OPTIONAL
        return context


def load(path: Path | None) -> WebConfig:
    """Read the file; relative paths in it are relative to it. Raises StartError."""
    if path is None:
        return WebConfig()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        config = WebConfig.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartError(f"web configuration: cannot read {path}: {error}") from error
    except ValidationError as error:
        # Only where and what: the values may be password hashes.
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise StartError(f"{path}: {wrong}") from None
    if (tls := config.tls_server_config) is None:
        return config
    there = {name: path.parent / value for name, value in tls if isinstance(value, Path)}
    return config.model_copy(update={"tls_server_config": tls.model_copy(update=there)})
