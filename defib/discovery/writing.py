"""Proposed services as a YAML file with comments.

Texts from hosts are quoted, and their `${…}` is escaped: it would otherwise be a reference to a secret. In comments,
they take one line without control characters.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from defib.discovery.model import Findings, HostProposals, Proposal
from defib.discovery.templates import Offer, SharedService
from defib.output import format_count
from runtime.terminal import UNSAFE, escape_controls, one_line

COMMENT_LIMIT = 300  # characters of a text in a comment
_WIDTH = 10**9  # of a line: PyYAML would break long ones

_HEAD = """\
# Services that `defib discover` proposed. Check the probes, then reload the exporter and the remediator.
# Nothing is restarted automatically: set `on_failure: restart` where Defib may do so.
"""


def render(hosts: Sequence[tuple[Findings, HostProposals]], chosen: Sequence[Offer]) -> str:
    """Return a file with the chosen services and templates, and what else was found in comments."""
    shared = [each for each in chosen if isinstance(each, SharedService)]
    single = [each for each in chosen if isinstance(each, Proposal)]
    concerned = {each.host for each in single} | {each.host for one in shared for each in one.proposals}
    lines = [(found.host, [summarize(found), *describe_rest(found, proposed)]) for found, proposed in hosts]
    parts = [_HEAD]
    for text in describe_alike(each for each in lines if each[0] in concerned):
        parts += ["#\n", *map(_comment, text.split("\n"))]
    if shared:
        parts += ["templates:\n", *map(_render_template, shared)]
    if single:
        parts += ["services:\n", *map(_render_service, single)]
    return "".join(parts).replace("services:\n\n", "services:\n").replace("templates:\n\n", "templates:\n")


def describe_alike(hosts: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines about each host, once for hosts with the same; the first line begins with their names."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, lines in hosts:
        alike.setdefault(tuple(lines), []).append(name)
    return ["\n".join([f"{', '.join(names)}: {lines[0]}", *lines[1:]]) for lines, names in alike.items()]


def describe_rest(found: Findings, proposed: HostProposals) -> list[str]:
    """Return lines with what is left out or could not be read, and the collectors for a host."""
    lines = [f"left out: {each}" for each in proposed.left_out]
    lines += [f"not read: {note}" for note in found.notes]
    if found.missing:
        lines.append(f"not installed: {', '.join(found.missing)}")
    if proposed.collect:
        lines.append(f"to collect its metrics, add to the host: collect: {render_flow(proposed.collect)}")
    return list(map(one_line, lines))


def summarize(found: Findings) -> str:
    """Return what a host has in one line: `2 containers, 1 program, 8 × NVIDIA H100`."""
    counts = [
        (len(found.containers), "container"), (len(found.units), "unit"), (len(found.programs), "program"),
        (len(found.listeners), "listening port"),
    ]  # fmt: skip
    cards = Counter(each.values.get("name", "GPU") for each in found.gpus)
    return (
        ", ".join(
            [format_count(number, noun) for number, noun in counts if number]
            + [f"{number} × {name}" for name, number in cards.items()]
        )
        or "nothing"
    )


def _render_service(proposal: Proposal) -> str:
    comments = "".join(_comment(text, "  ") for text in (proposal.what, *proposal.remarks))
    return f"\n{comments}  {_render_scalar(proposal.id)}:\n{_render_keys(proposal.service, '    ')}"


def _render_template(shared: SharedService) -> str:
    count = f"on {format_count(len(shared.proposals), 'host')}: {shared.what}"
    comments = "".join(_comment(text, "  ") for text in (count, *shared.remarks))
    body = f"    for_hosts: {render_flow(shared.for_hosts)}\n    service:\n{_render_keys(shared.service, '      ')}"
    return f"\n{comments}  {_render_scalar(shared.name)}:\n{body}"


def _render_keys(service: Mapping[str, Any], indent: str) -> str:
    lines = []
    for key, value in service.items():
        if key == "probe":
            lines += [
                f"{indent}{key}:\n",
                *(f"{indent}  {name}: {render_flow(part)}\n" for name, part in value.items()),
            ]
        else:
            lines.append(f"{indent}{key}: {render_flow(value)}\n")
    return "".join(lines)


def _comment(text: str, indent: str = "") -> str:
    shown = one_line(escape_controls(text)).replace("\t", " ")
    return f"{indent}# {shown if len(shown) <= COMMENT_LIMIT else shown[:COMMENT_LIMIT] + '…'}\n"


def render_flow(value: Any) -> str:
    """Return a value in one line of YAML, from which the configuration's loader reads the same value."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_render_scalar(str(key))}: {render_flow(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(render_flow, value))}]"
    return _render_scalar(value)


def _render_scalar(value: Any) -> str:
    if not isinstance(value, str):
        return str(yaml.safe_dump([value], default_flow_style=True)).strip()[1:-1]
    # Without allow_unicode, double quotes have escapes for all that is not ASCII, such as marks of text direction.
    plain = value.isprintable() and UNSAFE.search(value) is None
    style: dict[str, Any] = {"allow_unicode": True} if plain else {"default_style": '"'}
    # In a list, so that what is special in flow collections only is quoted, too.
    dumped = yaml.safe_dump([value.replace("${", "$${")], default_flow_style=True, width=_WIDTH, **style)
    return str(dumped).strip()[1:-1]
