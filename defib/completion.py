"""Shell completion: the script for a shell, and the names that the configuration offers at the cursor."""

import argparse

import argcomplete
from argcomplete.shell_integration import shellcode

from fleet.inventory.documents import find_directory, read_directory
from runtime.errors import DefibError


def script(shell: str) -> int:
    """Print what the shell must source."""
    print(shellcode(["defib"], shell=shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions of its command line, and exit."""
    argcomplete.autocomplete(parser)


def names(section: str, options: argparse.Namespace) -> list[str]:
    """The names in a section of the configuration, such as `services`; none where it cannot be read."""
    try:
        document = read_directory(find_directory(getattr(options, "config", None)))
    except (DefibError, OSError):
        return []
    if section == "channels":
        found = document.value.get("notify", {}).get("channels")
        return list(found) if isinstance(found, dict) else []
    if section == "groups":
        hosts = document.value.get("hosts", {}).values()
        return sorted({str(host["group"]) for host in hosts if isinstance(host, dict) and host.get("group")})
    return list(document.value.get(section, {}))
