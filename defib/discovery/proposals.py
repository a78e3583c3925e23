"""Which services a host's findings could become: one for each thing that runs, however many ports it has."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from defib.discovery import known
from defib.discovery.coverage import Coverage
from defib.discovery.model import Container, Endpoint, Findings, HostProposals, Proposal
from defib.discovery.probes import choose_endpoint, choose_probe, describe_endpoint, name_program
from defib.discovery.things import Thing, find_reason_against, find_things, is_covered
from defib.output import parenthesized
from fleet.managers import supervisor
from fleet.managers.containers import is_label

ID_LIMIT, HOST_LIMIT = 63, 40  # characters of an ID, and of a host's name in it
LISTED = 6  # ports and other things in one line


def propose(found: Findings, coverage: Coverage, taken: Iterable[str]) -> HostProposals:
    """Return the services for a host's findings; their IDs differ from those `taken`."""
    used, proposals = set(taken), list[Proposal]()
    covered, left_out = list[str](), dict[str, list[str]]()
    for thing in find_things(found):
        reason = find_reason_against(thing, found.endpoints)
        if reason == "":
            continue
        if is_covered(thing, coverage):
            covered.append(thing.label)
        elif reason is not None:
            left_out.setdefault(reason, []).append(thing.label)
        else:
            proposals.append(_build(thing, found, used))
    reasons = [f"{list_some(labels)}: {reason}" for reason, labels in left_out.items()]
    return HostProposals(found.host, proposals, covered, reasons, _collect(found, proposals))


def list_some(labels: Sequence[str], limit: int = LISTED) -> str:
    """Return the first labels, and how many more there are."""
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return f"{', '.join(labels[:limit])}{more}"


def _build(thing: Thing, found: Findings, used: set[str]) -> Proposal:
    """Return the proposal for a thing, and add its ID to those in use."""
    endpoint = choose_endpoint(thing, found.endpoints)
    names = _names_of(thing)
    provider, category = known.find_provider(endpoint.kind if endpoint else "", *names)
    base = _base_of(thing, provider, endpoint)
    id_ = _find_id(base, found.host, used)
    chosen = choose_probe(thing, endpoint)
    service: dict[str, Any] = {"host": found.host}
    if provider != "other":
        service |= {"provider": provider, "category": category}
    service["probe"] = chosen.probe
    if (control := _control_of(thing, found)) is not None:
        service["control"] = control
    service["on_failure"] = "notify"
    remarks = [*chosen.remarks, *_remarks_on(thing, endpoint, found.endpoints)]
    return Proposal(id_, base, found.host, _describe(thing, endpoint), service, remarks)


def _names_of(thing: Thing) -> Iterator[str]:
    if thing.container is not None:
        yield thing.container.image.rpartition("/")[2]
    yield thing.name
    if thing.process is not None:
        yield thing.process.name


def _base_of(thing: Thing, provider: str, endpoint: Endpoint | None) -> str:
    name = {"unit": thing.name.removesuffix(".service"), "port": "port"}.get(thing.kind, thing.name)
    if thing.kind in ("process", "port"):
        port = endpoint.port if endpoint else min(thing.ports)
        name = f"{provider if provider != 'other' else name}-{port}"
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "service"


def _find_id(base: str, host: str, used: set[str]) -> str:
    """Return an ID that is not in use, and add it to those in use."""
    for number in itertools.count(1):
        end = f"-{number}" if number > 1 else ""
        room = max(ID_LIMIT - len(host) - len(end) - 1, ID_LIMIT - HOST_LIMIT)
        id_ = f"{base[:room]}-{host}"[: ID_LIMIT - len(end)] + end
        if id_ not in used:
            used.add(id_)
            return id_
    raise AssertionError  # the numbers do not end


def _control_of(thing: Thing, found: Findings) -> dict[str, Any] | None:
    if thing.container is not None:
        return {"docker": _select_container(thing.container, found.containers)}
    if thing.kind == "unit":
        return {"systemd": {"unit": thing.name}}
    if thing.program is not None:
        return {"supervisor": name_program("program", thing.program)}
    return None


def _select_container(container: Container, all_containers: Iterable[Container]) -> dict[str, Any]:
    """Return how a control finds a container: by the labels of compose if no other has them, since names may change."""
    labels = list(container.compose_labels)
    replicas = sum(each.compose_labels == labels for each in all_containers)
    return {"label": labels} if replicas == 1 and all(map(is_label, labels)) else {"container": container.name}


def _describe(thing: Thing, endpoint: Endpoint | None) -> str:
    """Return what a thing is: `container vllm (vllm/vllm-openai:v0.8), port 8000: vLLM, model qwen3-32b`."""
    label = f"process {thing.name}" if thing.kind == "process" else thing.label
    image = f" ({thing.container.image})" if thing.container else ""
    port = "" if endpoint is None or thing.kind == "port" else f", port {endpoint.port}"
    shown = describe_endpoint(endpoint) if endpoint else ""
    return f"{label}{image}{port}{f': {shown}' if shown else ''}"


def _remarks_on(thing: Thing, endpoint: Endpoint | None, endpoints: Mapping[int, Endpoint]) -> Iterator[str]:
    if thing.container is not None:
        container = thing.container
        if container.project:
            yield f"of the compose project {container.project} in {container.directory}: service {container.service}"
        if container.state != "running":
            yield f"the container is {container.state} now"
        if known.starts_nothing(container.command):
            yield (
                "the container's main process is only a shell: a restart needs `after_start`, "
                "as in deploy/examples/mineru.yaml"
            )
    if thing.unit is not None and thing.unit.active == "failed":
        yield "the unit has failed"
    if thing.program is not None and thing.program.state != "RUNNING":
        yield f"the program is {thing.program.state} now"
    if thing.kind in ("process", "port"):
        yield "no control: it is not known what starts it; see `command` in docs/configuration.md"
    if others := [port for port in sorted(thing.ports) if endpoint is None or port != endpoint.port]:
        yield f"listens also on {_list_ports(others, endpoints)}"


def _list_ports(ports: Sequence[int], endpoints: Mapping[int, Endpoint]) -> str:
    shown = {port: describe_endpoint(endpoints[port]) if port in endpoints else "" for port in ports}
    return list_some([f"{port}{parenthesized(text)}" for port, text in shown.items()])


def _collect(found: Findings, proposals: Iterable[Proposal]) -> dict[str, Any]:
    """Return the collectors for what the host has."""
    units = [
        each.service["control"]["systemd"]["unit"] for each in proposals if "systemd" in each.service.get("control", {})
    ]
    configs = sorted({program.config for program in found.programs} - {supervisor.config_name(None)})
    collect: dict[str, Any] = {"system": "30s"}
    if found.gpus:
        collect["gpu"] = "15s"
    if found.has_docker:
        collect["docker"] = "30s"
    if units:
        collect["systemd"] = {"every": "30s", "units": units}
    if found.programs:
        collect["supervisor"] = {"every": "30s", "configs": configs} if configs else "30s"
    return collect
