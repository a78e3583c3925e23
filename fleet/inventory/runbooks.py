"""Runbooks: commands that Defib runs on a host while an alert about it fires."""

import shlex
from collections.abc import Callable
from typing import Annotated

from pydantic import Field, PrivateAttr

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.inventory.host_selector import HostSelector
from fleet.inventory.units import PositiveDuration

# The shipped alerts with the label `host` and without `service`; a test compares them with `alerts/rules`.
HOST_ALERTS = frozenset(
    {
        "GPUErrors", "GPUHot", "GPUIdleHeld", "GPUMissing", "GPUThrottled", "GPUUnhealthy", "HTTPErrorRatio",
        "HostClockSkew",
        "HostClockUnsynchronized", "HostCollectFailing", "HostConntrackFull", "HostContainerDown", "HostCrashLoop",
        "HostDiskFilling", "HostDiskFull", "HostDiskSaturated", "HostFileDescriptorsLow", "HostInodesFull",
        "HostLoadHigh", "HostMemoryLow", "HostNetworkErrors", "HostOOMKill", "HostProgramDown", "HostRAIDDegraded",
        "HostRebooted", "HostUnitFailed", "LogErrors",
    }
)  # fmt: skip
# Those that say that nothing can be run on the host.
UNREACHABLE_ALERTS = frozenset({"HostDown", "HostKeyChanged", "HostShellFailing"})
# The others, which are about a service or about Defib itself.
OTHER_ALERTS = frozenset(
    {
        "ActionsQueued", "AgentBacklog", "AgentBlocked", "AgentRateLimited", "AgentRoundsHigh", "AgentRoundsUsedUp",
        "AgentStuck", "AlertmanagerClusterFailing", "AlertmanagerDown", "AutomationOff", "BreakerOpen",
        "CertificateExpired", "CertificateExpiring", "ConfigMismatch", "ConfigReloadFailed", "DeadManPingFailing",
        "EventLoopBlocked", "ExporterDown", "ExporterOverloaded", "FeishuClockSkew", "FeishuDisconnected",
        "GatewayDown", "GatewayQueueLong", "GatewayRateLimited", "GatewayUpstreamFailing", "LLMSlow",
        "NoticesDead", "NoticesUnsent", "NotificationsFailing", "PrometheusFailing", "RemediatorDown",
        "ServiceComponentDown", "ServiceDown", "ServiceErrorBudgetBurn", "ServiceFlapping", "ServiceProbeStale",
        "ServiceSlow", "ServiceSourceFailing", "ServicesVanished", "Watchdog", "WebhookRefused",
    }
)  # fmt: skip
AlertName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.:-]*$")]


class Runbook(ConfigModel):
    """A command for the hosts that `hosts` selects, by default for all that have a shell.

    It is run while one of `alerts`, or of `own_alerts` of the user's rules, fires for the host.
    """

    alerts: list[AlertName] = []
    own_alerts: list[AlertName] = []
    hosts: HostSelector | None = None
    run: Annotated[Annotated[list[str], Field(min_length=1)], REFERENCES_ARE_SECRET]
    timeout: PositiveDuration = 120.0
    resolve_within: PositiveDuration = 900.0
    approve: bool = True
    attempts: int = Field(1, ge=1)
    _command: str = PrivateAttr("")

    @property
    def command(self) -> str:
        """The command as people read it, without secrets; empty before `mask_command`."""
        return self._command

    def mask_command(self, redact: Callable[[str], str]) -> None:
        self._command = redact(shlex.join(map(str, self.run)))
