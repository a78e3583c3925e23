"""Listening sockets, from /proc/net/tcp (proc_net_tcp in the kernel's documentation)."""

import re

from fleet.host.sections import Section

SECTION = Section("ports", """
awk '$4 == "0A" {print $2}' /proc/net/tcp || exit $?
[ ! -r /proc/net/tcp6 ] || awk '$4 == "0A" {print $2}' /proc/net/tcp6
""")  # fmt: skip


def parse_listening_ports(output: str) -> set[int]:
    """Return the TCP ports with a listener, on any address."""
    ports = (line.rpartition(":")[2] for line in output.split("\n"))
    return {int(port, 16) for port in ports if re.fullmatch("[0-9A-F]{4}", port)}
