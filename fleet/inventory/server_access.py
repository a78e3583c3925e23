"""The access settings of a server, from the inventory. Only the servers import this module."""

from collections.abc import Sequence

from fleet.inventory.access import Access, parse_network
from runtime.access.browser import KnownHosts
from runtime.access.control import AccessSettings, FindGroupRole, find_no_role
from runtime.access.proxy import RoleMap, TrustedProxy


def create_settings(
    access: Access,
    urls: Sequence[str],
    find_group_role: FindGroupRole = find_no_role,
) -> AccessSettings:
    """Return the settings of a server that is known to browsers by `urls`."""
    proxy = access.proxy
    trusted = (
        TrustedProxy(
            [parse_network(text) for text in proxy.addresses],
            proxy.user_header or "",
            proxy.groups_header or "",
            RoleMap(proxy.roles, proxy.default_role),
        )
        if proxy is not None
        else None
    )
    return AccessSettings(KnownHosts.create(access.hosts, urls), trusted, find_group_role)
