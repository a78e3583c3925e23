"""A report as JSON, and its summary for a card."""

from dataclasses import asdict, replace
from typing import Any

from remediator.reports.report import Counts, Report, ServiceReport, TeamReport
from runtime.times import format_rfc3339

RECOVERED_BY = ("defib", "person", "self")
WORST_SHOWN = 5  # services of a card
WATCHED_SHOWN = 5  # of a card, each of certificates and disks


def describe(report: Report) -> dict[str, Any]:
    """Return a report as the API shows it."""
    return {
        "from": format_rfc3339(report.start),
        "to": format_rfc3339(report.end),
        "missing": [{"part": part, "text": text} for part, text in report.missing.items()],
        "total": {
            **_describe_team(report.total), "alerts_only": report.alerts_only, "stopped": report.stopped,
            "gpus": report.gpu_count, "gpu_utilization_ratio": report.gpu_utilization,
        },
        "teams": [{"team": each.team, **_describe_team(each)} for each in report.teams],
        "services": [_describe_service(each) for each in report.services],
        "gpus": [
            {
                "host": each.host, "container": each.container, "gpus": each.gpus, "gpu_hours": each.hours,
                "memory_bytes": each.memory, "utilization_ratio": each.utilization,
            }
            for each in report.gpus
        ],
        "certificates": [
            {"service": each.service, "name": each.name, "expires_at": format_rfc3339(each.expires)}
            for each in report.certificates
        ],
        "disks": [
            {
                "host": each.host, "mountpoint": each.mountpoint, "used_ratio": each.used,
                "available_bytes": each.available, "full_in_seconds": each.full_in, "alerts": list(each.alerts),
                "severity": each.severity or None,
            }
            for each in report.disks
        ],
        "omitted": dict(report.omitted),
    }  # fmt: skip


def _describe_team(team: TeamReport) -> dict[str, Any]:
    return {
        "services": team.services, "observed": team.observed, "availability": team.availability,
        **_describe_counts(team.counts),
    }  # fmt: skip


def _describe_service(service: ServiceReport) -> dict[str, Any]:
    return {
        "id": service.id, "name": service.name, "team": service.team, "host": service.host, "removed": service.removed,
        "availability": service.availability, "observed_seconds": service.observed, "down_seconds": service.down,
        "maintenance_seconds": service.maintenance, **_describe_counts(service.counts),
    }  # fmt: skip


def _describe_counts(counts: Counts) -> dict[str, Any]:
    described = asdict(counts)
    described["recovered_by"] = {by: counts.recovered_by.get(by, 0) for by in RECOVERED_BY}
    for name in ("recovery_median", "recovery_longest"):
        described[f"{name}_seconds"] = described.pop(name)
    return described


def summarize(report: Report) -> dict[str, Any]:
    """Return what a card shows of a report: the numbers, the worst services, and what to watch."""
    failed = [
        each
        for each in report.services
        if each.counts.incidents or (each.availability is not None and each.availability < 1)
    ]
    described = describe(
        replace(
            report, services=failed[:WORST_SHOWN], teams=(), gpus=(), certificates=report.certificates[:WATCHED_SHOWN],
            disks=report.disks[:WATCHED_SHOWN],
        )
    )  # fmt: skip
    return {
        **{name: described[name] for name in ("from", "to", "missing", "total", "certificates", "disks")},
        "worst": described["services"],
        "certificate_count": len(report.certificates) + report.omitted.get("certificates", 0),
        "disk_count": len(report.disks) + report.omitted.get("disks", 0),
    }
