"""Shell completion: the script for a shell, and the names from the configuration."""

import argparse
import sys

import argcomplete
from argcomplete.shell_integration import shellcode

from fleet.inventory.documents import find_directory, read_directory
from runtime.errors import DefibError


def print_script(shell: str) -> int:
    """Print the script that the shell must source."""
    sys.stdout.write(shellcode(["defib"], shell=shell) + "\n")
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that the shell requests, and exit."""
    argcomplete.autocomplete(parser)


def read_names(section: str, options: argparse.Namespace) -> list[str]:
    """Return the names in a section of the configuration, such as `services`; none if it cannot be read.

    `groups` are those of hosts; `provider` and `category` are those of services.
    """
    try:
        document = read_directory(find_directory(getattr(options, "config", None)))
    except (DefibError, OSError):
        return []
    if section == "channels":
        channels = document.value.get("notify", {}).get("channels")
        return list(channels) if isinstance(channels, dict) else []
    if section == "groups":
        hosts = document.value.get("hosts", {}).values()
        return sorted({str(host["group"]) for host in hosts if isinstance(host, dict) and host.get("group")})
    if section in ("provider", "category"):
        services = document.value.get("services", {}).values()
        return sorted({str(each[section]) for each in services if isinstance(each, dict) and each.get(section)})
    return list(document.value.get(section, {}))
