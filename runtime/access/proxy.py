"""A trusted proxy in front of the server: the address of its clients, and the user that it has authenticated."""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from runtime.access.roles import USER_ROLES, Role, UserRole, can_be_recorded

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAX_FORWARDED = 20  # addresses in X-Forwarded-For that are looked at
FORWARDING_HEADERS = ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP")


@dataclass(frozen=True)
class RoleMap:
    """Roles by the groups of a user in another service; `default` is for its other users, None to refuse them."""

    roles: Mapping[str, UserRole] = field(default_factory=dict)
    default: UserRole | None = None

    def find(self, groups: Iterable[str]) -> Role | None:
        """Return the role with the most rights."""
        found: set[UserRole | None] = {self.roles[group] for group in groups if group in self.roles}
        return next((role for role in reversed(USER_ROLES) if role.value in (found or {self.default})), None)


@dataclass(frozen=True)
class TrustedProxy:
    """Only requests from `networks` may name a user in the header `user_header`."""

    networks: Sequence[Network]
    user_header: str = ""
    groups_header: str = ""
    roles: RoleMap = RoleMap()

    def trusts(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self.networks)

    def find_user(self, request: web.Request) -> tuple[str, Role | None] | None:
        """Return the user that the proxy names, and their role; None without one."""
        if not self.user_header or not self.trusts(request.remote or ""):
            return None
        names = request.headers.getall(self.user_header, [])
        if len(names) != 1 or not can_be_recorded(names[0]):
            return None
        groups = request.headers.getall(self.groups_header, []) if self.groups_header else []
        if len(groups) > 1:  # one may be the client's own
            return None
        return names[0], self.roles.find(group.strip() for group in ",".join(groups).split(","))


def find_client_address(request: web.Request, proxy: TrustedProxy | None) -> str:
    """Return the address of the client: the last one in X-Forwarded-For that is not a trusted proxy's."""
    peer = request.remote or ""
    if proxy is None or not proxy.trusts(peer):
        return peer
    forwarded = ",".join(request.headers.getall("X-Forwarded-For", []))
    for text in reversed(forwarded.split(",")[-MAX_FORWARDED:]):
        address = _parse_address(text.strip())
        if address is None or not proxy.trusts(address):
            return address or peer
        peer = address
    return peer


def _parse_address(text: str) -> str | None:
    """Return an address, without the port that some proxies add; None for other text."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def is_direct_from_loopback(request: web.Request) -> bool:
    """Whether the request comes from this machine, and not through a proxy on it."""
    try:
        is_loopback = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False
    return is_loopback and not any(header in request.headers for header in FORWARDING_HEADERS)
