"""Addresses of clients."""

import ipaddress

_V6_NETWORK = 64  # bits that a provider gives to one customer


def group_address(address: str) -> str:
    """Return what stands for a client in limits: an IPv4 address, or the network of an IPv6 address.

    Text that is no address, such as the empty one of a client without one, stays as it is.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(parsed) if parsed.is_loopback else str(ipaddress.ip_network((int(parsed), _V6_NETWORK), strict=False))
