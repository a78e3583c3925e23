"""Discovery on several hosts in parallel, within a deadline for each."""

import asyncio
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from defib.administrator import AdministratorShell
from defib.discovery.coverage import find_coverage
from defib.discovery.model import Findings, HostProposals
from defib.discovery.proposals import propose
from defib.discovery.reading import read_host
from fleet.inventory.model import Host, Inventory
from fleet.inventory.units import format_duration
from fleet.shells import Shell, ShellError
from fleet.shells.pool import Shells
from runtime.logs import log

TOGETHER = 20  # hosts
DEADLINE = 60.0  # seconds for one host


@dataclass(frozen=True, slots=True)
class HostResult:
    """What was found on a host and what it could become, or why it could not be read."""

    host: Host
    found: Findings
    proposed: HostProposals
    error: str = ""


async def discover_hosts(
    inventory: Inventory,
    hosts: Sequence[Host],
    taken: Collection[str],
    *,
    administrator: str = "",
    deadline: float = DEADLINE,
) -> list[HostResult]:
    """Return the results of all hosts, in their order; services get IDs that are not `taken`.

    Hosts are read with the rights of Defib's account, or of the `administrator`.
    """
    shells, places = Shells(inventory.hosts), asyncio.Semaphore(TOGETHER)

    def find_shell(host: Host) -> Shell:
        if administrator and host.ssh is not None:
            return AdministratorShell(inventory, host, administrator)
        return shells.get(host.name)

    async def read(host: Host) -> Findings | str:
        async with places:
            try:
                async with asyncio.timeout(deadline):
                    return await read_host(host, find_shell(host))
            except TimeoutError:
                return f"not finished within {format_duration(deadline)}"
            except ShellError as error:
                return str(error)
            except Exception as error:  # noqa: BLE001 - one host must not end the others; its traceback is logged
                log.exception("discovery_failed", host=host.name)
                return f"internal error: {type(error).__name__}: {error}"

    try:
        read_all = await asyncio.gather(*map(read, hosts))
    finally:
        await shells.close()
    used, results = set(taken), []
    for host, found in zip(hosts, read_all, strict=True):
        if isinstance(found, str):
            results.append(HostResult(host, Findings(host.name), HostProposals(host.name), found))
            continue
        proposed = propose(found, find_coverage(host, inventory), used)
        collect = {
            name: options for name, options in proposed.collect.items() if getattr(host.collect, name, None) is None
        }
        used |= {each.id for each in proposed.proposals}
        results.append(HostResult(host, found, dataclasses.replace(proposed, collect=collect)))
    return results


def as_json(result: HostResult) -> dict[str, object]:
    """Return a result for scripts."""
    found = dataclasses.asdict(result.found)
    return {
        "host": result.host.name,
        "error": result.error or None,
        **{key: found[key] for key in ("containers", "units", "programs", "listeners")},
        "endpoints": list(found["endpoints"].values()),
        "gpus": [dict(card.values) for card in result.found.gpus],
        "notes": list(result.found.notes),
        "missing": list(result.found.missing),
        "proposals": [
            {"id": each.id, "what": each.what, "service": each.service, "remarks": list(each.remarks)}
            for each in result.proposed.proposals
        ],
        "covered": list(result.proposed.covered),
        "left_out": list(result.proposed.left_out),
        "collect": result.proposed.collect,
    }
