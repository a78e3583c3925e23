"""Which redirects a probe may follow, so that a probed server cannot choose what else is requested.

A redirect to this machine, to a link-local address or to the metadata service of a cloud is refused, unless the address
of the configured URL is of the same kind. Private networks are allowed, since most probed services are in them.
"""

import ipaddress
from collections.abc import Sequence
from typing import Literal

from exporter.probes.net.certificates import is_ip_address
from exporter.probes.net.connections import AddressOptions, resolve
from exporter.results import ProbeDetails, ProbeFailure

AddressKind = Literal["loopback", "link-local", "metadata", ""]
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # AWS and Google (IPv6), Alibaba Cloud, Azure's WireServer, Oracle Cloud; the others are link-local.
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)
# NAT64 (RFC 6052, RFC 8215), IPv4-compatible and IPv4-translated: the IPv4 address is in the last 32 bits.
_EMBEDDING = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))


def classify_address(address: str) -> AddressKind:
    """Return the kind of a special IP address, or an empty string for all others."""
    ip = _extract_ipv4(ipaddress.ip_address(address.partition("%")[0]))
    if ip in _METADATA:
        return "metadata"
    if ip.is_loopback or ip.is_unspecified:
        return "loopback"
    return "link-local" if ip.is_link_local else ""


def _extract_ipv4(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address embedded in an IPv6 address, or else `address`."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if any(address in network for network in _EMBEDDING) and int(address) > 1:  # except :: and ::1
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def allowed_addresses(addresses: Sequence[str], host: str, configured: AddressKind) -> list[str]:
    """Return the addresses that a redirect may lead to; `configured` is the kind of the configured URL's address.

    Raises ProbeFailure if all are refused.
    """
    kinds = {address: classify_address(address) for address in addresses}
    allowed = [address for address, kind in kinds.items() if kind in ("", configured)]
    if addresses and not allowed:
        refused = ", ".join(f"{address} ({kind})" for address, kind in kinds.items())
        raise ProbeFailure("redirect", f"the redirect to {host} is refused, since its address is {refused}")
    return allowed


def classify_host(host: str) -> AddressKind:
    """Return the kind of an IP address, or of a name, of which only `localhost` is known."""
    if host.rstrip(".").lower().endswith("localhost"):
        return "loopback"
    return classify_address(host) if is_ip_address(host) else ""


async def resolve_for_proxy(host: str, port: int, dial: AddressOptions) -> list[str]:
    """Return the addresses of a host that a proxy will connect to, as far as this machine can resolve it."""
    if is_ip_address(host):
        return [host]
    try:
        return await resolve(host, port, ProbeDetails(), AddressOptions(resolver=dial.resolver))
    except ProbeFailure:
        return ["127.0.0.1"] if classify_host(host) else []
