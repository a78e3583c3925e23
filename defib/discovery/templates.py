"""Templates for services that several hosts have alike, as in a fleet of equal servers."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defib.discovery.model import Proposal
from fleet.inventory.model import Host

HOSTS_AT_LEAST = 3


@dataclass(frozen=True, slots=True)
class SharedService:
    """A template: its name, the proposals that it replaces, and the selector of exactly their hosts."""

    name: str
    proposals: Sequence[Proposal]
    for_hosts: Mapping[str, Any]

    @property
    def what(self) -> str:
        """What it is on the first host; images may differ."""
        return self.proposals[0].what

    @property
    def service(self) -> Mapping[str, Any]:
        return {key: value for key, value in self.proposals[0].service.items() if key != "host"}

    @property
    def remarks(self) -> list[str]:
        """The remarks that are the same on all hosts."""
        others = [set(each.remarks) for each in self.proposals]
        return [remark for remark in self.proposals[0].remarks if all(remark in each for each in others)]


Offer = SharedService | Proposal


def find_shared(
    proposals: Sequence[Proposal], hosts: Mapping[str, Host], taken: Collection[str]
) -> tuple[list[SharedService], list[Proposal]]:
    """Return templates for what at least `HOSTS_AT_LEAST` hosts have alike, and the other proposals.

    Names of templates differ from those `taken`.
    """
    alike: dict[tuple[str, str], list[Proposal]] = {}
    others: list[Proposal] = []
    for proposal in proposals:
        if proposal.id == f"{proposal.base}-{proposal.host}":  # the ID that a template makes
            own = {key: value for key, value in proposal.service.items() if key != "host"}
            alike.setdefault((proposal.base, json.dumps(own)), []).append(proposal)
        else:
            others.append(proposal)
    shared, names = list[SharedService](), set(taken)
    for (name, _), group in alike.items():
        if len(group) < HOSTS_AT_LEAST or name in names:
            others += group
            continue
        names.add(name)
        shared.append(SharedService(name, group, _select([each.host for each in group], hosts)))
    order = {proposal.id: number for number, proposal in enumerate(proposals)}
    return shared, sorted(others, key=lambda each: order[each.id])


def _select(names: Sequence[str], hosts: Mapping[str, Host]) -> Mapping[str, Any]:
    """Return a selector of exactly these hosts: their group if it has no others, else their names."""
    group = hosts[names[0]].group
    if group and {name for name, host in hosts.items() if host.group == group} == set(names):
        return {"group": group}
    return {"names": sorted(names)}
