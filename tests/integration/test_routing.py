"""The shipped alertmanager.yml in a real Alertmanager: who is told of what, and what mutes what."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from tests.support import eventually

pytestmark = pytest.mark.needs("prometheus-alertmanager")
WEB = {"service": "web", "host": "h", "severity": "critical"}


@pytest.fixture
async def stack(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(launcher, tmp_path, hurried=False, fallback="http://127.0.0.1:1/")
    await made.start_alertmanager()
    yield made
    await made.client.aclose()


async def told(stack: Stack, *alerts: dict[str, str]) -> list[tuple[str, list[str]]]:
    """The state of each alert, and its receivers, in order."""
    url = f"{stack.url('alertmanager')}/api/v2/alerts"
    posted = [{"labels": labels} for labels in alerts]
    assert (await stack.client.post(url, json=posted)).is_success

    async def seen() -> list[tuple[str, list[str]]]:
        found: dict[str, Any] = {
            str(sorted(each["labels"].items())): each for each in (await stack.client.get(url)).json()
        }
        listed = [found.get(str(sorted(labels.items()))) for labels in alerts]
        if any(each is None or each["status"]["state"] == "unprocessed" for each in listed):
            return []
        return [(each["status"]["state"], sorted(to["name"] for to in each["receivers"])) for each in listed if each]

    return await eventually(seen)


@pytest.mark.parametrize(
    ("source", "muted", "heard"),
    [
        (
            {"alertname": "HostDown", "host": "h", "severity": "critical"},
            [
                {"alertname": "ServiceDown", **WEB},
                {"alertname": "BreakerOpen", **WEB, "severity": "warning"},
                {"alertname": "HostDiskFull", "host": "h", "mountpoint": "/", "severity": "critical"},
            ],
            [
                {"alertname": "ServiceDown", **WEB, "host": "other"},
                {"alertname": "ServiceDown", **WEB, "site": "sh"},
                {"alertname": "ServiceDown", "service": "nowhere", "severity": "critical"},
                {"alertname": "ActionsQueued", "severity": "warning"},
            ],
        ),
        (
            {"alertname": "ServiceDown", **WEB},
            [
                {"alertname": name, **WEB, "severity": "warning"}
                for name in ("ServiceSlow", "ServiceComponentDown", "ServiceErrorBudgetBurn", "LLMSlow")
            ],
            [
                {"alertname": "ServiceFlapping", **WEB, "severity": "warning"},
                {"alertname": "ServiceSlow", "service": "other", "severity": "warning"},
                {"alertname": "ServiceSlow", **WEB, "site": "sh", "severity": "warning"},
                {"alertname": "HostDiskFull", "host": "h", "mountpoint": "/", "severity": "warning"},
            ],
        ),
        (
            {"alertname": "HostDiskFull", "host": "h", "mountpoint": "/", "severity": "critical"},
            [{"alertname": "HostDiskFull", "host": "h", "mountpoint": "/", "severity": "warning"}],
            [
                {"alertname": "HostDiskFull", "host": "h", "mountpoint": "/data", "severity": "warning"},
                {"alertname": "HostInodesFull", "host": "h", "mountpoint": "/", "severity": "warning"},
            ],
        ),
        (
            {"alertname": "GPUErrors", "host": "h", "gpu": "0", "fault": "uncorrected", "severity": "critical"},
            [],
            [{"alertname": "GPUErrors", "host": "h", "gpu": "0", "fault": "memory_pending", "severity": "warning"}],
        ),
        (
            {"alertname": "PrometheusFailing", "instance": "a", "fault": "x", "severity": "critical"},
            [{"alertname": "PrometheusFailing", "instance": "a", "fault": "x", "severity": "warning"}],
            [
                {"alertname": "PrometheusFailing", "instance": "b", "fault": "x", "severity": "warning"},
                {"alertname": "PrometheusFailing", "instance": "a", "fault": "x", "site": "sh", "severity": "warning"},
            ],
        ),
        (
            {"alertname": "GatewayDown", "instance": "a", "severity": "critical"},
            [
                {"alertname": name, "instance": "a", "provider": "p", "severity": "warning"}
                for name in ("GatewayQueueLong", "GatewayRateLimited", "GatewayUpstreamFailing")
            ],
            [
                {"alertname": "GatewayQueueLong", "instance": "b", "provider": "p", "severity": "warning"},
                {"alertname": "PrometheusFailing", "instance": "a", "severity": "critical"},
            ],
        ),
        (
            {"alertname": "GatewayUpstreamFailing", "instance": "a", "provider": "p", "fault": "clients", "severity": "critical"},
            [
                {"alertname": "GatewayUpstreamFailing", "instance": "a", "provider": "p", "fault": "upstream", "severity": "warning"},
                {"alertname": "GatewayQueueLong", "instance": "a", "provider": "p", "severity": "warning"},
                {"alertname": "GatewayRateLimited", "instance": "a", "provider": "p", "severity": "warning"},
            ],
            [
                {"alertname": "GatewayUpstreamFailing", "instance": "a", "provider": "q", "fault": "upstream", "severity": "warning"},
                {"alertname": "GatewayRateLimited", "instance": "b", "provider": "p", "severity": "warning"},
            ],
        ),
        (
            {"alertname": "GatewayRateLimited", "instance": "a", "provider": "p", "severity": "warning"},
            [{"alertname": "GatewayQueueLong", "instance": "a", "provider": "p", "severity": "warning"}],
            [{"alertname": "GatewayQueueLong", "instance": "a", "provider": "q", "severity": "warning"}],
        ),
        # Neither has a host or a service: labels that both lack count as equal.
        (
            {"alertname": "ExporterDown", "severity": "critical"},
            [],
            [{"alertname": "AutomationOff", "severity": "warning"}, {"alertname": "NoticesUnsent", "severity": "warning"}],
        ),
    ],
    ids=["host", "service", "disk", "card", "instance", "gateway", "model API", "rate", "strangers"],
)  # fmt: skip
async def test_what_mutes_what(
    stack: Stack, source: dict[str, str], muted: list[dict[str, str]], heard: list[dict[str, str]]
) -> None:
    states = [state for state, _ in await told(stack, source, *muted, *heard)]
    assert states == ["active", *["suppressed"] * len(muted), *["active"] * len(heard)]


async def test_what_must_not_pass_through_the_remediator_alone_goes_another_way_too(stack: Stack) -> None:
    elsewhere = ("RemediatorDown", "WebhookRefused", "NoticesUnsent", "NoticesDead")
    by_integration = [{"alertname": "NotificationsFailing", "integration": name} for name in ("webhook", "email")]
    names = ("ServiceDown", "Watchdog", "FeishuDisconnected", "AlertmanagerDown")
    found = await told(stack, *({"alertname": name} for name in (*elsewhere, *names)), *by_integration)
    both = ["defib", "fallback"]
    assert [to for _, to in found] == [*[both] * len(elsewhere), *[["defib"]] * len(names), both, ["defib"]]
