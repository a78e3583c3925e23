"""`defib status`: a summary of what is wrong."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import tzinfo
from typing import Any

from defib import hosts, incidents, services
from defib.maintenance import describe_automation, describe_maintenance
from defib.output import format_count, format_table, format_time, print_json, print_text, terminal_width
from defib.remediator_client import Connect, RemediatorClient
from fleet.json_client import HttpStatusError

ALL_UP, BROKEN, UNKNOWN = 0, 1, 2  # exit status
SHOWN = 20  # services
OTHERS_SHOWN = 10  # incidents, hosts, maintenance
NAMES_SHOWN, PROBLEMS_SHOWN = 5, 3
INDENT = "  "
_LISTED = "down,degraded,unknown"  # a stopped service is as somebody wants it


async def show_status(connect: Connect, *, as_json: bool) -> int:
    """Print the summary; the exit status says whether all services are up."""
    async with connect() as remediator:
        overview = await services.read_overview(remediator, {"state": _LISTED, "limit": str(SHOWN)})
        with_problems = await _read_hosts_with_problems(remediator)
    status = _find_exit_status(overview)
    if as_json:
        print_json({**overview, "hosts": with_problems})
    else:
        print_text("\n".join(_format(overview, with_problems, remediator.zone, terminal_width())))
    return status


async def _read_hosts_with_problems(remediator: RemediatorClient) -> list[dict[str, Any]] | None:
    """Return None if the exporter cannot be reached."""
    try:
        return [each for each in await hosts.read_hosts(remediator) if each["problem_count"]]
    except HttpStatusError:
        return None


def _find_exit_status(overview: Mapping[str, Any]) -> int:
    counts = overview["counts"]
    if counts["down"] or counts["degraded"] or overview["incident_count"]:
        return BROKEN
    return UNKNOWN if counts["unknown"] or overview["problems"] else ALL_UP


def _format(
    overview: Mapping[str, Any],
    with_problems: Sequence[Mapping[str, Any]] | None,
    zone: tzinfo | None,
    width: int | None,
) -> Iterator[str]:
    yield ", ".join(f"{count} {state}" for state, count in overview["counts"].items() if count) or "no services"
    for line in _describe_banners(overview, zone):
        yield format_table([[line]], width)
    now, opened = overview["at"], overview["incidents"][:OTHERS_SHOWN]
    rows = [incidents.table_row(each, now, zone) for each in opened]
    yield from _section(
        format_count(overview["incident_count"], "open incident"), [incidents.TABLE_HEAD, *rows], width,
        cut=incidents.WHAT, more=overview["incident_count"] - len(rows), command="list incidents --state open",
    )  # fmt: skip
    rows = [services.table_row(each, now) for each in overview["services"]]
    yield from _section(
        format_count(overview["total"], "service") + " down, degraded or unknown", [services.TABLE_HEAD, *rows], width,
        cut=services.SEEN, more=overview["total"] - len(rows), command=f"list services --state {_LISTED}",
    )  # fmt: skip
    if with_problems is None:
        yield "the hosts cannot be read from the exporter"
        return
    rows = [[each["name"], hosts.describe_problems(each, PROBLEMS_SHOWN)] for each in with_problems[:OTHERS_SHOWN]]
    yield from _section(
        format_count(len(with_problems), "host") + " with problems", [("HOST", "PROBLEMS"), *rows], width,
        cut=1, more=len(with_problems) - len(rows), command="list hosts",
    )  # fmt: skip


def _describe_banners(overview: Mapping[str, Any], zone: tzinfo | None) -> Iterator[str]:
    yield from services.describe_problems(overview, zone)
    if not overview["automation"]["enabled"]:
        yield from describe_automation(overview["automation"], zone)
    maintenance = overview["maintenance"]
    for each in maintenance[:OTHERS_SHOWN]:
        yield f"maintenance: {describe_maintenance(each, zone)}"
    if len(maintenance) > OTHERS_SHOWN:
        yield f"maintenance: {len(maintenance) - OTHERS_SHOWN} more: defib maintenance"
    for each in overview.get("on_call", ()):  # an older remediator has none
        until = f", until {format_time(each['until'], zone)}" if each["until"] else ""
        yield f"on call: {each['name']} (calendar {each['calendar']}{until})"
    if overview["mismatched"]:
        names = ", ".join(overview["mismatched"][:NAMES_SHOWN])
        yield f"only one of the exporter and the remediator has these services; reload both: {names}"


def _section(
    title: str, table: Sequence[Sequence[str]], width: int | None, *, cut: int, more: int, command: str
) -> Iterator[str]:
    """Yield the lines of a table with a head, its title, and how to see `more`; nothing if it has no rows."""
    if len(table) == 1:
        return
    yield f"\n{title}"
    inner = None if width is None else width - len(INDENT)
    yield from (INDENT + line for line in format_table(table, inner, cut=cut).splitlines())
    if more > 0:
        yield f"{INDENT}{more} more: defib {command}"
