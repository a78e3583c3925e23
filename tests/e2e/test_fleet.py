"""Everything that can be broken on one machine is broken, on real parts and the shipped files, changed in addresses alone.

Each alert must arrive where it belongs and end once the fault is mended; while all is broken, every query of the dashboards
is asked. `make test` breaks one thing for each file of rules, beside a host and servers that lie, of which nothing may come;
`make test-all` all that arrives within a quarter of an hour, and `make fleet` the rest too, an hour and a half in all.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from tests.dashboard_queries import queries
from tests.fleet import Fleet, card, logged, running
from tests.hostile_checks import check_nothing_hostile_is_believed
from tests.metric_names import RULES, rules
from tests.support import eventually

LONG = os.environ.get("DEFIB_FLEET") == "long"
pytestmark = [
    pytest.mark.needs(
        "dockerd", "systemd", "prometheus", "prometheus-alertmanager", "sshd", "busybox", "mkfs.ext4", "losetup"
    ),
    pytest.mark.timeout(9000 if LONG else 3000),
    pytest.mark.usefixtures("docker"),
]
Labels = Mapping[str, str]
CRITICAL, WARNING, INFO = {"severity": "critical"}, {"severity": "warning"}, {"severity": "info"}


@dataclass(frozen=True)
class Fault:
    """One thing that breaks, the alerts that tell of it, and whether those end as soon as it is mended.

    What `lingers` looks back over some time, or is asked of a host that is asked ever more rarely.
    """

    name: str
    alerts: tuple[tuple[str, Labels], ...]
    do: Callable[[Fleet], Awaitable[object] | object]
    undo: Callable[[Fleet], Awaitable[object] | object]
    where: str = "remediator"
    lingers: bool = False
    long: bool = False
    after: float = field(default=600)  # seconds in which it must have arrived


def mode(service: str, broken: str) -> dict[str, Any]:
    """How a page is broken and mended."""
    return {
        "do": lambda fleet: fleet.pages.modes.update({service: broken}),
        "undo": lambda fleet: fleet.pages.modes.update({service: "up"}),
    }


def command(do: str, undo: str) -> dict[str, Any]:
    """Break and mend by a shell's command, in which {box} stands for what the host `box` has."""
    return {"do": lambda fleet: shell(fleet, do), "undo": lambda fleet: shell(fleet, undo)}


async def shell(fleet: Fleet, text: str) -> None:
    names = {"tools": Path(sys.executable).parent, "supervisor": fleet.supervisor, "container": fleet.container}
    told = text.format(**names, systemctl=f"{fleet.systemd}/systemctl")
    process = await asyncio.create_subprocess_shell(
        told, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{told}: {output.decode()}"


def broken_cards(fleet: Fleet) -> None:
    lost = "Unable to determine the device handle for GPU 0000:03:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
    hot = card(1, **{"temperature.gpu": "93", "clocks_event_reasons.hw_slowdown": "Active"})
    bad = card(
        2,
        **{
            "ecc.errors.uncorrected.volatile.total": "2", "remapped_rows.failure": "1", "remapped_rows.pending": "Yes",
            "gpu_recovery_action": "Reset",
        },
    )  # fmt: skip
    fleet.cards([card(0, **{"utilization.gpu": "0"}), hot, bad], lost=lost)


def whole_cards(fleet: Fleet) -> None:
    fleet.cards([card(index) for index in range(4)])


async def report(fleet: Fleet, **values: Any) -> None:
    """Send a ping of the agent."""
    url = f"{fleet.stack.url('pings')}/{fleet.stack.ping_key}/writer"
    assert (await fleet.stack.client.post(url, json=values)).text == "OK"


async def flap(fleet: Fleet) -> None:
    for _ in range(5):
        fleet.pages.modes["flap"] = "down"
        await asyncio.sleep(16)
        fleet.pages.modes["flap"] = "up"
        await asyncio.sleep(16)


async def burn(fleet: Fleet) -> None:
    await asyncio.sleep(1860)  # what was not watched for half an hour cannot have been down too long
    for _ in range(3):  # one outage is what ServiceDown tells of
        fleet.pages.modes["burn"] = "down"
        await asyncio.sleep(120)
        fleet.pages.modes["burn"] = "up"
        await asyncio.sleep(60)


def misconfigure(fleet: Fleet) -> None:
    fleet.config.with_name("more.yaml").write_text("services: [nonsense]\n")
    os.kill(fleet.stack.pids["exporter"], signal.SIGHUP)


def configure(fleet: Fleet) -> None:
    fleet.config.with_name("more.yaml").unlink()
    os.kill(fleet.stack.pids["exporter"], signal.SIGHUP)


async def knock(fleet: Fleet) -> None:
    url = f"{fleet.stack.url('remediator')}/webhook/alertmanager"
    for _ in range(3):
        answer = await fleet.stack.client.post(url, json={}, headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401


async def automation(fleet: Fleet, *, enabled: bool) -> None:
    url = f"{fleet.stack.url('remediator')}/api/v1/automation"
    answer = await fleet.stack.client.put(url, json={"enabled": enabled, "reason": "to see whether it is told"})
    assert answer.is_success, answer.text


async def automation_off(fleet: Fleet) -> None:
    """Once a breaker is open: while nothing is tried, no attempts are used up."""
    await eventually(lambda: fleet.ask("defib_remediator_breaker_open == 1"), 600)
    await automation(fleet, enabled=False)


async def stutter(fleet: Fleet) -> None:
    """Stop the exporter for seconds at a time, so that its probes begin late."""
    for _ in range(120):
        os.kill(fleet.stack.pids["exporter"], signal.SIGSTOP)
        await asyncio.sleep(4)
        os.kill(fleet.stack.pids["exporter"], signal.SIGCONT)
        await asyncio.sleep(4)


def renew(fleet: Fleet) -> None:
    for each in (fleet.expired, fleet.expiring):
        each.renew(timedelta(days=90))


def nothing(_fleet: Fleet) -> None:
    """What is mended by time alone."""


FAULTS = [
    # Mended first: what is sent afterwards tells that it is.
    Fault(
        "Feishu's clock is another", (("FeishuClockSkew", WARNING),), lambda fleet: fleet.feishu_ahead(400),
        lambda fleet: fleet.feishu_ahead(0),
    ),
    Fault("a page is down", (("ServiceDown", {"service": "page", "team": "test", **CRITICAL}),), **mode("page", "down")),
    Fault("a page flaps", (("ServiceFlapping", {"service": "flap"}),), flap, nothing, lingers=True),
    Fault(
        "a page was down too long", (("ServiceErrorBudgetBurn", {"service": "burn", **WARNING}),), burn, nothing,
        lingers=True, long=True, after=2700,
    ),
    Fault("a probe hangs", (("ServiceProbeStale", {"service": "stale"}),), **mode("stale", "hang")),
    Fault(
        "an agent has used its rounds", (("AgentRoundsUsedUp", {"service": "writer", **CRITICAL}),),
        lambda fleet: report(fleet, rounds=30), lambda fleet: report(fleet, rounds=1),
    ),
    Fault(
        "the gateway dies", (("GatewayDown", CRITICAL),),
        lambda fleet: fleet.launcher.kill(fleet.stack.pids["gateway"], signal.SIGKILL),
        lambda fleet: fleet.stack.start_program("gateway"),
    ),
    Fault("a channel stops", (("ServiceComponentDown", {"service": "channels", "component": "2"}),), **mode("channels", "down")),
    Fault(
        "certificates",
        (("CertificateExpiring", {"service": "expiring", **CRITICAL}), ("CertificateExpired", {"service": "expired"})),
        lambda fleet: fleet.expired.renew(timedelta(hours=-1)),
        renew,
    ),
    Fault("a host falls", (("HostDown", {"host": "gone"}),), lambda f: f.fell("gone"), lambda f: f.rise("gone"), lingers=True),
    Fault("a shell fails", (("HostShellFailing", {"host": "mute"}),), lambda f: f.fell("mute"), lambda f: f.rise("mute"), lingers=True),
    Fault("a key changes", (("HostKeyChanged", {"host": "swapped"}),), Fleet.swap_key, Fleet.pin_key, lingers=True),
    Fault("a clock is off", (("HostClockSkew", {"host": "late"}),), lambda f: f.clock(90), lambda f: f.clock(0)),
    Fault(
        "a host is strained",
        (
            ("HostMemoryLow", {"host": "strained", **CRITICAL}), ("HostRebooted", {"host": "strained"}),
        ),
        Fleet.strain, Fleet.relieve,
    ),
    Fault(
        "a disk fills",
        (
            ("HostDiskFull", {"host": "box", "mountpoint": "{disk}", **CRITICAL}),
            ("HostInodesFull", {"host": "box", "mountpoint": "{disk}", **CRITICAL}),
        ),
        lambda fleet: asyncio.to_thread(fleet.disk.fill), lambda fleet: asyncio.to_thread(fleet.disk.empty),
    ),
    Fault(
        "a unit stops", (("HostUnitFailed", {"host": "box", "unit": "well.service"}),),
        **command("{systemctl} stop well.service", "{systemctl} start well.service"),
    ),
    Fault(
        "a program stops", (("HostProgramDown", {"host": "box", "program": "worker"}),),
        **command("{tools}/supervisorctl -c {supervisor} stop worker", "{tools}/supervisorctl -c {supervisor} start worker"),
    ),
    Fault(
        "a container stops", (("HostContainerDown", {"host": "box"}),),
        **command("docker run -d --name {container}-x --pull never --network host {container} /bin/sleep 100000 && docker kill {container}-x",
                  "docker rm -f {container}-x"),
    ),
    Fault(
        "cards break",
        (
            ("GPUUnhealthy", {"host": "box", "gpu": "3"}), ("GPUUnhealthy", {"gpu": "2", "fault": "recovery"}),
            ("GPUMissing", {"host": "box"}), ("GPUErrors", {"gpu": "2", "fault": "uncorrected"}),
            ("GPUErrors", {"gpu": "2", "fault": "remap_failure"}), ("GPUErrors", {"gpu": "2", "fault": "memory_pending"}),
            ("GPUHot", {"gpu": "1"}), ("GPUThrottled", {"gpu": "1", "reason": "hw_slowdown"}),
        ),
        broken_cards, whole_cards,
    ),
    Fault(
        "a card logs an error", (("GPUErrors", {"gpu": "3", "fault": "xid", "xid": "79"}),),
        lambda fleet: fleet.kernel_log(logged(30, 79, "0000:03:00")), nothing, lingers=True,
    ),
    Fault("a configuration is refused", (("ConfigReloadFailed", {"job": "defib-exporter"}),), misconfigure, configure),
    Fault("somebody knocks", (("WebhookRefused", {"code": "401"}),), knock, nothing, "fallback", lingers=True),
    Fault("Feishu refuses", (("NoticesDead", {"channel": "refused"}),), nothing, nothing, "fallback", lingers=True),
    Fault(
        "a notice cannot be sent", (("NoticesUnsent", CRITICAL),), nothing, lambda fleet: fleet.stuck.start(fleet.stuck_port),
        "fallback", after=900,
    ),
    Fault(
        "the long connection is lost", (("FeishuDisconnected", {"channel": "app"}),), lambda fleet: fleet.app.stop(),
        lambda fleet: fleet.app.start(fleet.app_port), long=True, after=1500,
    ),
    Fault("nobody approves", (("ActionsQueued", WARNING),), **mode("asking", "down"), long=True, after=1500),
    Fault("a page is slow", (("ServiceSlow", {"service": "slow", "against": "limit"}),), **mode("slow", "slow"), long=True, lingers=True, after=1500),
    Fault(
        "restarts do not help", (("BreakerOpen", {"service": "hopeless"}),), **mode("hopeless", "down"), long=True, after=1800,
    ),
    Fault(
        "a collector fails", (("HostCollectFailing", {"host": "odd", "collector": "system"}),),
        lambda fleet: (fleet.tools_of("odd") / "grep").symlink_to("/bin/false"),
        lambda fleet: (fleet.tools_of("odd") / "grep").unlink(), long=True, lingers=True, after=1500,
    ),
    Fault(
        "automation is off", (("AutomationOff", WARNING),), automation_off,
        lambda fleet: automation(fleet, enabled=True), long=True, after=3600,
    ),
    Fault("a host is strained for long", (("HostLoadHigh", {"host": "strained", **CRITICAL}),), nothing, nothing, long=True, lingers=True, after=3600),
    Fault(
        "a container crashes again and again", (("HostCrashLoop", {"host": "box", "container": "{container}-y"}),),
        **command("docker run -d --name {container}-y --restart always --pull never --network host {container} /bin/busybox false", "docker rm -f {container}-y"),
        lingers=True,
    ),
]  # fmt: skip
CHOSEN = [fault for fault in FAULTS if LONG or not fault.long]


@pytest.fixture
async def fleet(launcher: Launcher, tmp_path: Path, systemd: Path) -> AsyncIterator[Fleet]:
    async with running(launcher, tmp_path, systemd) as made:
        yield made


async def call(work: Callable[[Fleet], Awaitable[object] | object], fleet: Fleet) -> None:
    done = work(fleet)
    if asyncio.iscoroutine(done):
        await done


async def all_arrive(fleet: Fleet, wanted: list[tuple[str, str, Labels]], status: str, within: float) -> None:
    """Wait until the last of each alert that was received has this status."""
    ends = time.monotonic() + within
    while True:
        found = {(name, str(labels)): await fleet.received(where, name, labels) for where, name, labels in wanted}
        left = [(key, (row or {}).get("status")) for key, row in found.items() if (row or {}).get("status") != status]
        if not left:
            return
        assert time.monotonic() < ends, f"not {status} within {within:g} s: {left}"
        await asyncio.sleep(2)


def alerts_of(faults: list[Fault]) -> list[tuple[str, str, Labels]]:
    return [(fault.where, name, labels) for fault in faults for name, labels in fault.alerts]


# One for each file of rules, of those that fire at once.
AT_ONCE = {
    "a page is down": "ServiceDown", "an agent has used its rounds": "AgentRoundsUsedUp", "certificates": "CertificateExpired", "a key changes": "HostKeyChanged",
    "the gateway dies": "GatewayDown", "cards break": "GPUErrors", "Feishu refuses": "NoticesDead",
}  # fmt: skip


@pytest.mark.timeout(900)
async def test_one_fault_for_each_file_of_rules(launcher: Launcher, tmp_path: Path, systemd: Path) -> None:
    faults = [fault for fault in FAULTS if fault.name in AT_ONCE]
    told = [(where, name, labels) for where, name, labels in alerts_of(faults) if name in AT_ONCE.values()]
    files = {path.stem for path in RULES for rule in rules(path) if rule.get("alert") in AT_ONCE.values()}
    assert files == {path.stem for path in RULES}
    async with running(launcher, tmp_path, systemd, hurried=True, hostile=True) as fleet:
        # Where a card is that is lost afterwards is known only once it has been seen.
        await eventually(lambda: fleet.ask('gpu_healthy{gpu="3"} == 1'))
        for fault in faults:
            await call(fault.do, fleet)
        assert fleet.hostile is not None
        fleet.hostile.fail()
        await all_arrive(fleet, told, "firing", 240)
        for fault in faults:
            await call(fault.undo, fleet)
        soon = alerts_of([fault for fault in faults if not fault.lingers])
        over = [each for each in soon if each in told and each[0] == "remediator"]
        await all_arrive(fleet, over, "resolved", 240)
        await check_nothing_hostile_is_believed(fleet)


@pytest.mark.long
async def test_everything_that_breaks_is_told_of_and_ends(fleet: Fleet) -> None:
    await restarted_once(fleet)
    await quiet_at_first(fleet)
    async with asyncio.TaskGroup() as breaking:
        for fault in CHOSEN:
            breaking.create_task(call(fault.do, fleet), name=fault.name)
        for within in sorted({fault.after for fault in CHOSEN}):
            await all_arrive(fleet, alerts_of([fault for fault in CHOSEN if fault.after == within]), "firing", within)
    await every_query_is_answered(fleet)
    for fault in CHOSEN:
        await call(fault.undo, fleet)
    await all_arrive(fleet, alerts_of([fault for fault in CHOSEN if not fault.lingers]), "resolved", 240)
    if LONG:
        await all_arrive(fleet, alerts_of([fault for fault in CHOSEN if fault.lingers]), "resolved", 2700)
    await without_the_exporter(fleet)
    await without_the_remediator(fleet)
    await without_alertmanager(fleet)


async def restarted_once(fleet: Fleet) -> None:
    """The container dies and is brought back: the whole loop, at the shipped intervals."""
    await eventually(lambda: up(fleet, "web"), 120)
    await shell(fleet, "docker kill {container}")

    async def recovered() -> bool:
        listed = await fleet.stack.get("remediator", "/api/v1/incidents")
        return any(each["service"] == "web" and each["recovered_by"] == "defib" for each in listed["incidents"])

    await eventually(recovered, 180)


async def up(fleet: Fleet, service: str) -> bool:
    return any(row["value"][1] == "1" for row in await fleet.ask(f'service:up:max{{service="{service}"}}'))


async def quiet_at_first(fleet: Fleet) -> None:
    """A fleet that is well tells nothing but what it was made with: a certificate's last days, and a probe that hangs."""

    async def alone() -> bool:
        rows = await fleet.ask('ALERTS{alertstate="firing", severity!="info"}')
        # The systemd of the tests has a unit that cannot start; and this machine may have been started just now.
        told = {row["metric"]["alertname"] for row in rows} - {
            "CertificateExpiring",
            "ServiceProbeStale",
            "HostUnitFailed",
        }
        left = {name for name in told if not name.startswith(("HostDisk", "HostMemory", "HostLoad", "HostOOM"))}
        return not left

    await eventually(alone, 120)


# What looks back further than this fleet is old.
EMPTY_AT_FIRST = ("service:probe_duration_seconds:avg1d",)
# What no host of this fleet has: node_exporter, fans, MIG, a free card, and what its cards do not report. Queries for these
# are answered in tests/integration/test_dashboard_answers.py. And the gateway, which is dead.
ABSENT = (
    "node_",
    "gateway_",
    "gpu_expected_count",
    "gpu_fan_speed_ratio",
    "gpu_mig_instance_info",
    "gpu_retired_pages",
    'sensor="memory"',
    "< 0.05",
)


async def every_query_is_answered(fleet: Fleet) -> None:
    """No query of a dashboard is an error, nor empty."""
    empty = []
    for query in queries():
        now = query.instant or query.of_labels
        asked = await (fleet.ask if now else fleet.ask_of_last_hour)(query.expression)
        excused = query.text.startswith(EMPTY_AT_FIRST) or any(each in query.text for each in ABSENT)
        if not asked and not excused:
            empty.append(f"{query.where}: {query.text}")
    assert not empty, "\n".join(empty)


async def without_the_exporter(fleet: Fleet) -> None:
    await fleet.launcher.kill(fleet.stack.pids["exporter"], signal.SIGKILL)
    told: list[tuple[str, str, Labels]] = [("remediator", "ExporterDown", CRITICAL)]
    await all_arrive(fleet, told, "firing", 180)
    await fleet.stack.start_program("exporter")
    await all_arrive(fleet, told, "resolved", 120)

    async def asked() -> bool:
        hosts = {row["metric"]["host"] for row in await fleet.ask("host_up == 1")}
        return hosts == set(fleet.sshds) and await up(fleet, "alive")

    await eventually(asked, 120)
    hosts: list[tuple[str, str, Labels]] = [
        ("remediator", name, {}) for name in ("HostDown", "HostShellFailing", "HostKeyChanged")
    ]
    await all_arrive(fleet, hosts, "resolved", 120)


async def without_the_remediator(fleet: Fleet) -> None:
    """That it is gone, and that Alertmanager cannot reach it, comes by another way."""
    await fleet.launcher.kill(fleet.stack.pids["remediator"], signal.SIGKILL)
    gone: list[tuple[str, str, Labels]] = [("fallback", "RemediatorDown", CRITICAL)]
    await all_arrive(fleet, gone, "firing", 180)
    failing: list[tuple[str, str, Labels]] = [("fallback", "NotificationsFailing", {"integration": "webhook"})]
    await all_arrive(fleet, failing, "firing", 420)
    await fleet.stack.start_program("remediator")
    await all_arrive(fleet, gone, "resolved", 120)


async def without_alertmanager(fleet: Fleet) -> None:
    """Nobody can be told by it; Prometheus knows, and tells once it is back."""
    await fleet.launcher.kill(fleet.stack.pids["alertmanager"], signal.SIGKILL)

    async def known() -> bool:
        return bool(await fleet.ask('ALERTS{alertname="AlertmanagerDown", alertstate="firing"}'))

    await eventually(known, 180)
    if LONG:
        await asyncio.sleep(420)
    await fleet.stack.start_alertmanager()
    if LONG:
        failing: list[tuple[str, str, Labels]] = [("remediator", "PrometheusFailing", CRITICAL)]
        await all_arrive(fleet, failing, "firing", 120)
        stuttering = asyncio.create_task(stutter(fleet))
        names = ("ExporterOverloaded", "EventLoopBlocked")
        await all_arrive(fleet, [("remediator", name, WARNING) for name in names], "firing", 1200)
        stuttering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stuttering
        os.kill(fleet.stack.pids["exporter"], signal.SIGCONT)

    async def over() -> bool:
        return not await fleet.ask('ALERTS{alertname="AlertmanagerDown"}')

    await eventually(over, 120)


def test_no_alert_is_forgotten() -> None:
    """Each is broken here, or said why not."""
    here = {name for fault in FAULTS for name, _ in fault.alerts} | {
        "Watchdog", "ExporterDown", "RemediatorDown", "AlertmanagerDown", "NotificationsFailing", "PrometheusFailing",
        "ExporterOverloaded", "EventLoopBlocked",
    }  # fmt: skip
    elsewhere = {
        "ConfigMismatch": "would hold every restart; tests/integration/test_lifecycle.py has it",
        "LLMSlow": "compares with two hours before",
        **dict.fromkeys(
            ("AgentStuck", "AgentRoundsHigh", "AgentRateLimited", "AgentBacklog", "AgentBlocked"),
            "agents report themselves; tests/integration/test_agents.py has them",
        ),
        **dict.fromkeys(
            ("GatewayQueueLong", "GatewayRateLimited", "GatewayUpstreamFailing"),
            "need a model API; tests/integration/test_gateway_alerts.py has them",
        ),
        "HostDiskFilling": "looks back over hours",
        "GPUIdleHeld": "waits for half a day",
        # The machine of the tests has them in common with others; tests/integration/test_collectors.py has their metrics.
        **dict.fromkeys(
            (
                "HostOOMKill",
                "HostRAIDDegraded",
                "HostClockUnsynchronized",
                "HostNetworkErrors",
                "HostConntrackFull",
                "HostFileDescriptorsLow",
                "HostDiskSaturated",
            ),
            "is the kernel's",
        ),
        **dict.fromkeys(("LogErrors", "HTTPErrorRatio"), "tests/integration/test_host_logs.py has their metrics"),
        "ServicesVanished": "most of the fleet would have to be removed; alerts/tests/service_gaps_test.yml has it",
        "AlertmanagerClusterFailing": "there is one Alertmanager; alerts/tests/monitoring_test.yml has it",
        "DeadManPingFailing": "nothing is pinged here; tests/integration/test_dead_man.py has its metric",
        "ServiceSourceFailing": "tests/integration/test_sources.py has its metric",
    }
    assert {rule["alert"] for rule in rules() if "alert" in rule} == here | set(elsewhere)
