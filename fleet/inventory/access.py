"""Access settings: names of the servers, the metrics token, a trusted proxy, and services for signing in."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, model_validator

from fleet.inventory.endpoints import ConfigModel, OwnToken, TlsSettings, Url
from fleet.inventory.units import PositiveDuration
from runtime.access.roles import UserRole

NO_ROLES = "nobody would have access: set roles or default_role"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network(text: str) -> str:
    try:
        network = parse_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an address or a network; write 10.0.0.5 or 10.0.0.0/24") from None
    if network.prefixlen == 0:
        raise ValueError(f"{text!r} is every address: anybody could name any user")
    return text


def parse_network(text: str) -> Network:
    """Return the network of an address or a network in CIDR notation. Raises ValueError."""
    return ipaddress.ip_network(text)


def check_host_name(name: str) -> str:
    """Raises ValueError."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?", name) is None:
        raise ValueError(f"{name!r} is not a host name; write it without port and scheme")
    return name


def _header_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9-]{1,100}", name) is None:
        raise ValueError(f"{name!r} is not the name of a header")
    return name


NetworkText = Annotated[str, AfterValidator(_network)]
HostName = Annotated[str, AfterValidator(check_host_name)]
HeaderName = Annotated[str, AfterValidator(_header_name)]


class ProxyAccess(ConfigModel):
    """A proxy that authenticates users and names them in a header."""

    addresses: Annotated[list[NetworkText], Field(min_length=1)]
    user_header: HeaderName | None = None
    groups_header: HeaderName | None = None
    roles: dict[str, UserRole] = Field(default_factory=dict)
    default_role: UserRole | None = None

    @model_validator(mode="after")
    def _check_headers(self) -> "ProxyAccess":
        if self.user_header is None and (self.groups_header or self.roles or self.default_role):
            raise ValueError("user_header is missing")
        if self.user_header is not None and not self.roles and self.default_role is None:
            raise ValueError(NO_ROLES)
        return self


class OidcAccess(ConfigModel):
    """Signing in with OpenID Connect. Roles are those of the groups in the claim `groups_claim`."""

    issuer: Url
    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretStr
    name: str = "OpenID Connect"
    scopes: list[str] = ["openid", "profile", "email"]
    user_claim: str = "preferred_username"
    groups_claim: str = "groups"
    roles: dict[str, UserRole] = Field(default_factory=dict)
    default_role: UserRole | None = None
    tls: TlsSettings = TlsSettings()

    @model_validator(mode="after")
    def _check_roles(self) -> "OidcAccess":
        if not self.roles and self.default_role is None:
            raise ValueError(NO_ROLES)
        if "/.well-known/" in self.issuer:
            raise ValueError("issuer: write it without /.well-known/openid-configuration")
        return self


class FeishuAccess(ConfigModel):
    """Signing in with Feishu. Roles are those of `notify.people`; `default_role` is for other members of the tenant."""

    app_id: Annotated[str, Field(min_length=1)]
    app_secret: SecretStr
    tenant_key: Annotated[str, Field(min_length=1)]
    url: Url = "https://open.feishu.cn"
    authorize_url: Url = "https://accounts.feishu.cn"
    default_role: UserRole | None = None


class AuditSettings(ConfigModel):
    """How long the audit log is stored, and how many entries at most."""

    retention: PositiveDuration = 365 * 86400.0
    max_entries: int = Field(100_000, ge=1000)


class Access(ConfigModel):
    hosts: list[HostName] = []
    metrics_token: OwnToken | None = None
    proxy: ProxyAccess | None = None
    oidc: OidcAccess | None = None
    feishu: FeishuAccess | None = None
    audit: AuditSettings = AuditSettings()
