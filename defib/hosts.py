"""`defib list hosts`: what the collectors have read of the hosts, those with problems first."""

from collections.abc import Mapping
from typing import Any

from defib.output import format_table, parenthesized, print_json, print_text, terminal_width
from defib.remediator_client import Connect, RemediatorClient

TABLE_HEAD = ("HOST", "STATE", "CPU", "MEMORY", "FULLEST DISK", "GPUS (USE/MEMORY)", "PROBLEMS")
_STATES = {True: "up", False: "down", None: "unknown"}


async def list_hosts(connect: Connect, *, as_json: bool) -> int:
    """Print the hosts."""
    async with connect() as remediator:
        hosts = await read_hosts(remediator)
    if as_json:
        print_json({"hosts": hosts})
        return 0
    table = format_table([TABLE_HEAD, *map(_table_row, hosts)], terminal_width(), cut=len(TABLE_HEAD) - 1)
    print_text(table if hosts else "no hosts")
    return 0


async def read_hosts(remediator: RemediatorClient) -> list[dict[str, Any]]:
    """Return the hosts, those with most problems first. Raises ClientError."""
    hosts = (await remediator.request("GET", "/api/v1/hosts", timeout=30.0))["hosts"]
    return sorted(hosts, key=lambda host: (-host["problem_count"], host["name"]))


def describe_problems(host: Mapping[str, Any], limit: int | None = None) -> str:
    """Return what is wrong on a host, at most `limit` problems and the number of the others."""
    shown = [_describe_problem(each) for each in host["problems"][:limit]]
    more = host["problem_count"] - len(shown)
    return ", ".join(shown + ([f"{more} more"] if more > 0 else []))


def _describe_problem(problem: Mapping[str, Any]) -> str:
    kind = problem["kind"].replace("_", " ")
    return f"{' '.join(filter(None, [kind, problem['name']]))}{parenthesized(problem['message'] or '')}"


def _table_row(host: Mapping[str, Any]) -> list[str]:
    disk, memory = host["filesystems_fullest"], host["memory"]
    return [
        host["name"], _STATES[host["up"]], _format_ratio(host["cpu_ratio"]),
        _format_used(memory, "total_bytes") if memory is not None else "",
        f"{disk['mountpoint']} {_format_used(disk, 'size_bytes')}" if disk is not None else "",
        " ".join(map(_format_gpu, host["gpus"])), describe_problems(host),
    ]  # fmt: skip


def _format_gpu(gpu: Mapping[str, Any]) -> str:
    if not gpu["healthy"]:
        return "fault"
    total, used = gpu["memory_total_bytes"], gpu["memory_used_bytes"]
    memory = used / total if total and used is not None else None
    return f"{_format_ratio(gpu['utilization_ratio']) or '?'}/{_format_ratio(memory) or '?'}"


def _format_used(part: Mapping[str, Any], size: str) -> str:
    """Return which part of a memory or a disk is used."""
    known = part[size] and part["available_bytes"] is not None
    return _format_ratio(1 - part["available_bytes"] / part[size]) if known else ""


def _format_ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%}"
