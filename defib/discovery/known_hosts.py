"""`defib discover --known-hosts`: shows the fingerprints of host keys, and pins those that are new."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import asyncssh
import uvloop

from defib.discovery.known_hosts_file import HostKey, add_keys
from defib.lookup import HostSelection
from defib.output import format_count, format_table, parenthesized, print_json, print_text
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Host, Inventory
from fleet.shells import ShellError
from fleet.shells.host_keys import KeyState, Pins, fetch_host_key, find_pins, known_hosts_name, read_known_hosts
from fleet.shells.pool import Shells
from runtime.errors import DefibError

PARALLEL = 10  # hosts that are read at the same time
TABLE_HEAD = ("HOST", "ADDRESS", "TYPE", "FINGERPRINT", "STATE")
State = KeyState | Literal["unreachable", "failed"]
_SHOWN = {"changed": "CHANGED", "revoked": "REVOKED"}


@dataclass(frozen=True)
class Place:
    """Where a host presents its key, and the file in which Defib expects it."""

    host: str
    address: str
    port: int
    via: str | None
    known_hosts: Path
    control: bool
    legacy: bool = False

    @property
    def name(self) -> str:
        return known_hosts_name(self.address, self.port)


@dataclass(frozen=True)
class Finding:
    """The key of a host and its state; without a key, why there is none."""

    place: Place
    state: State
    key: asyncssh.SSHKey | None = None
    detail: str = ""
    added: bool = False

    def to_json(self) -> dict[str, Any]:
        key = self.key
        return {
            "host": self.place.host, "address": self.place.address, "port": self.place.port,
            "known_hosts": str(self.place.known_hosts), "key_type": key.get_algorithm() if key else None,
            "fingerprint": key.get_fingerprint() if key else None, "state": self.state, "detail": self.detail,
            "added": self.added,
        }  # fmt: skip


def pin_keys(load: Callable[[], LoadedInventory], selection: HostSelection, *, yes: bool, as_json: bool) -> int:
    """Show the keys of hosts, and pin the new ones if they are confirmed; returns 1 unless all keys are pinned then.

    Raises DefibError.
    """
    loaded = load()
    hosts, others = selection.find_ssh_hosts(loaded.inventory)
    for host in others:
        print_text(f"{host.name}: skipped, it has no SSH settings", sys.stderr)
    places = _find_places(hosts)
    _check_resolved(loaded, places)
    findings = uvloop.run(read_keys(loaded.inventory, places))
    if not as_json:
        _print_findings(findings)
    new = sum(each.state == "new" for each in findings)
    problems: list[str] = []
    if new and (yes or (not as_json and _ask(new))):
        before, findings = findings, _pin(findings)
        pairs = zip(before, findings, strict=True)
        problems = [after.detail for old, after in pairs if after.detail not in ("", old.detail)]
    if as_json:
        print_json({"keys": [each.to_json() for each in findings]})
    else:
        _print_outcome(findings, problems)
    return int(any(each.state != "pinned" for each in findings))


def _find_places(hosts: Iterable[Host]) -> list[Place]:
    """Return the places of keys: one for each host, or two if controls use another port or another file."""
    places: dict[tuple[str, int, Path], Place] = {}
    for host in hosts:
        for control in (False, True):
            ssh = host.ssh_for(control=control)
            place = Place(host.name, host.address, ssh.port, ssh.via, ssh.known_hosts, control, ssh.legacy)
            places.setdefault((host.name, place.port, place.known_hosts), place)
    return list(places.values())


def _check_resolved(loaded: LoadedInventory, places: Sequence[Place]) -> None:
    """Check the references in what is used; a host without an account yet has none in its keys. Raises DefibError."""
    for place in places:
        loaded.require_resolved(*(f"hosts.{place.host}.{key}" for key in ("address", "ssh", "control_ssh")))
        if place.via:
            loaded.require_resolved(*loaded.connection_sections(place.via, control=place.control))


async def read_keys(inventory: Inventory, places: Sequence[Place]) -> list[Finding]:
    """Return the keys that hosts present, with their states."""
    slots = asyncio.Semaphore(PARALLEL)
    shells = {control: Shells(inventory.hosts, control=control) for control in (False, True)}

    async def read(place: Place) -> Finding:
        async with slots:
            return await _read_key(place, shells[place.control])

    try:
        return await asyncio.gather(*map(read, places))
    finally:
        await asyncio.gather(*(each.close() for each in shells.values()))


async def _read_key(place: Place, shells: Shells) -> Finding:
    try:
        known = await asyncio.to_thread(_read_pinned, place.known_hosts)
    except DefibError as error:
        return Finding(place, "failed", detail=str(error))
    pins = find_pins(known, place.address, place.port)
    tunnel = shells.tunnel(place.via) if place.via else None
    try:
        key = await fetch_host_key(place.address, place.port, pins, tunnel, legacy=place.legacy)
    except ShellError as error:
        through = f"through {place.via}: " if place.via else ""
        return Finding(place, "unreachable", detail=f"{through}{error}")
    return _judge(place, pins, key)


def _read_pinned(path: Path) -> asyncssh.SSHKnownHosts:
    """Return the pinned keys; none if there is no such file yet. Raises DefibError."""
    try:
        return read_known_hosts(path)[0]
    except FileNotFoundError:
        return asyncssh.import_known_hosts("")
    except OSError as error:
        raise DefibError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DefibError(f"{path}: cannot be read: {error}") from error


def _judge(place: Place, pins: Pins, key: asyncssh.SSHKey) -> Finding:
    state, detail = pins.judge(key), ""
    if state == "changed":
        pinned = " and ".join(_describe(each) for each in pins.keys)
        detail = f"pinned is {pinned}"
    elif state == "new" and pins.keys_of_address:
        detail = f"{place.address} has another key at port 22"
    elif state == "pinned" and pins.authorities:
        detail = "by a certificate authority, whose certificates are not checked here"
    return Finding(place, state, key, detail)


def _describe(key: asyncssh.SSHKey) -> str:
    return f"{key.get_algorithm()} {key.get_fingerprint()}"


def _print_findings(findings: Sequence[Finding]) -> None:
    print_text(format_table([TABLE_HEAD, *map(_table_row, findings)]))
    types = sorted({each.key.get_algorithm() for each in findings if each.key and each.state in ("new", "changed")})
    if types:
        print_text("\nCompare with what each host shows on its console:")
    for name in types:
        kind = name.removeprefix("ssh-").partition("-")[0]
        print_text(f"  ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub")
    for each in findings:
        if each.state == "changed":
            fix = f"ssh-keygen -R '{each.place.name}' -f {each.place.known_hosts}"
            print_text(
                f"\n{each.place.host}: the key has CHANGED; Defib does not connect, and this command does not replace "
                f"the pinned key. Somebody may be between you and the host. If the new key is the one that the host's "
                f"console shows, such as after a reinstallation, remove the old one and run this again:\n  {fix}"
            )


def _table_row(finding: Finding) -> list[str]:
    key, shown = finding.key, _SHOWN.get(finding.state, finding.state)
    state = f"{shown}: {finding.detail}" if key is None else f"{shown}{parenthesized(finding.detail)}"
    described = [key.get_algorithm(), key.get_fingerprint()] if key else ["", ""]
    return [finding.place.host, finding.place.name, *described, state]


def _ask(new: int) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"\nPin {format_count(new, 'new key')}? [y/N] ").strip().lower() in ("y", "yes")


def _pin(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings after the new keys were added to their files; where they were not, the detail says why."""
    new = [each for each in findings if each.state == "new"]
    outcomes: dict[Place, Finding] = {}
    for path in dict.fromkeys(each.place.known_hosts for each in new):
        those = [each for each in new if each.place.known_hosts == path]
        try:
            states = add_keys(
                path, [HostKey(each.place.address, each.place.port, each.key) for each in those if each.key]
            )
        except DefibError as error:
            outcomes |= {each.place: replace(each, detail=str(error)) for each in those}
            continue
        for each, found in zip(those, states, strict=True):
            outcomes[each.place] = _judge_again(each, found)
    return [outcomes.get(each.place, each) for each in findings]


def _judge_again(finding: Finding, found: KeyState) -> Finding:
    """Return the finding after a new key was added, unless the file had an entry for the host by then."""
    if found == "new":
        return replace(finding, state="pinned", added=True, detail="")
    if found == "pinned":
        return replace(finding, state="pinned", detail="")
    return replace(finding, state=found, detail=f"{finding.place.host}: another key has been pinned meanwhile")


def _print_outcome(findings: Sequence[Finding], problems: Iterable[str]) -> None:
    added = Counter(each.place.known_hosts for each in findings if each.added)
    for path, number in added.items():
        print_text(f"pinned {format_count(number, 'key')} in {path}")
    for problem in dict.fromkeys(problems):
        print_text(problem, sys.stderr)
    waiting = sum(each.state == "new" for each in findings)
    if waiting:
        print_text(f"{format_count(waiting, 'new key')} not pinned; --yes pins without asking", sys.stderr)
