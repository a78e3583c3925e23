"""IP addresses: those of clients in limits, and in texts with a port. Names of hosts that are not too long."""

import ipaddress
import re

NAME_LIMIT = 253  # characters of the name of a host (RFC 1035); encoding longer ones, as of IDNA, takes seconds
_AUTHORITY = re.compile(r"[^/?#]*//([^/?#]*)")
_V6_NETWORK = 64  # bits that a provider gives to one customer


def has_long_host(url: str) -> bool:
    """Whether the host of a URL, which need not be valid, is longer than any host's name: ask before it is parsed."""
    match = _AUTHORITY.match(url)
    return match is not None and len(match[1].rpartition("@")[2]) > NAME_LIMIT + len(":65535")


def bracket(address: str) -> str:
    """Return a host as it is written before a port: IPv6 addresses are in brackets."""
    return f"[{address}]" if ":" in address else address


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
