"""Alertmanager's receiver `fallback`: the watcher, which notifies of problems of Defib without the remediator."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from defib.deadman import alerts
from defib.deadman.alerts import AlertRelay, Destination
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.inventory.notify import Channel
from remediator.clients.alerts import parse_webhook
from remediator.notifications.channels import ChannelClient, ChannelMessage, SendResult
from runtime.errors import ApiError
from runtime.redaction import Redactor
from tests.forked_defib import run_defib
from tests.integration.peers import web_server
from tests.integration.test_dead_man import Watcher
from tests.support import NO_TLS, eventually, inventory_of

WEBHOOK_TOKEN = "webhook-token-of-the-remediator"
SINCE = "2026-11-30T09:00:00.000Z"


def notification(name: str = "RemediatorDown", *, ends: str = "", number: int = 0, **labels: str) -> dict[str, Any]:
    """What Alertmanager posts about one alert."""
    alert = {
        "status": "resolved" if ends else "firing",
        "labels": {"alertname": name, "severity": "critical", **labels},
        "annotations": {
            "summary": f"{name}: it is *down*",
            "summary_zh": f"{name} 已停止",
            "description": "Nothing is restarted.",
        },
        "startsAt": SINCE,
        "endsAt": ends or "0001-01-01T00:00:00Z",
        "fingerprint": f"{name}-{number}",
    }
    return {"version": "4", "receiver": "fallback", "status": alert["status"], "alerts": [alert], "truncatedAlerts": 0}


class FallbackWatcher(Watcher):
    async def post(self, body: Any, token: str = WEBHOOK_TOKEN) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return await client.post(f"http://127.0.0.1:{self.port}/alerts", content=content, headers=headers)

    def configure(self, notify: dict[str, Any]) -> None:
        """Write the configuration, and reload it if the watcher runs."""
        (self.folder / "config").mkdir(exist_ok=True)
        written = {"remediator": {"webhook_token": WEBHOOK_TOKEN}, "notify": {"language": "en", **notify}}
        (self.folder / "config" / "defib.yaml").write_text(yaml.safe_dump(written))


@pytest.fixture
async def watcher(launcher: Launcher, tmp_path: Path) -> AsyncIterator[FallbackWatcher]:
    made = FallbackWatcher(launcher, tmp_path)
    made.options = ["--pings-optional"]
    async with web_server(made.receive) as port:
        made.configure({"channels": channels(port)})
        yield made


def channels(port: int) -> dict[str, Any]:
    return {"ops": {"webhook": {"url": f"http://127.0.0.1:{port}/hook"}}}


async def test_a_notification_reaches_the_channels_without_a_remediator(watcher: FallbackWatcher) -> None:
    await watcher.start()
    sent = await watcher.post(notification(note=f"see {WEBHOOK_TOKEN}"))
    assert (sent.status_code, sent.json()) == (200, {"alerts": 1, "sent": True})
    over = await watcher.post(notification(ends="2026-11-30T09:05:00Z"), watcher.token)
    assert over.status_code == 200
    fired, resolved = watcher.received
    assert "RemediatorDown" in fired["title"]
    assert (fired["state"], fired["severity"], resolved["state"]) == ("alert", "critical", "alert_over")
    text = "\n".join(fired["text"])
    assert "2026-11-30 17:00:00 CST" in text  # `notify.timezone` is Asia/Shanghai by default
    assert "RemediatorDown: it is *down*" in text
    assert "Nothing is restarted." in text
    assert fired["text"][-1] == "Sent by the watcher, which needs no remediator."
    assert fired["notifications"][0]["since"] == "2026-11-30T09:00:00Z"
    assert resolved["notifications"][0]["duration_seconds"] == 300.0
    everything = json.dumps(watcher.received) + (watcher.folder / "log").read_text()
    assert WEBHOOK_TOKEN not in everything
    assert watcher.token not in everything


async def test_messages_are_in_the_language_of_the_configuration(watcher: FallbackWatcher) -> None:
    written = yaml.safe_load((watcher.folder / "config" / "defib.yaml").read_text())
    watcher.configure({**written["notify"], "language": "zh"})
    await watcher.start()
    assert (await watcher.post(notification())).status_code == 200
    text = "\n".join(watcher.received[0]["text"])
    assert "RemediatorDown 已停止" in text
    assert "由监视端发送，不依赖 remediator。" in text


def many_alerts(count: int) -> dict[str, Any]:
    made = notification()
    made["alerts"] = [notification(number=number, instance=f"h{number}")["alerts"][0] for number in range(count)]
    return made


async def test_a_notification_of_many_alerts_is_one_message(watcher: FallbackWatcher) -> None:
    await watcher.start()
    assert (await watcher.post(many_alerts(30))).status_code == 200
    (message,) = watcher.received
    assert (len(message["notifications"]), message["form"]) == (20, "group")
    assert message["text"][-2] == "10 more alerts: see Alertmanager"


@pytest.mark.parametrize(
    ("body", "token", "status"),
    [
        (notification(), "", 401),
        (notification(), "wrong", 401),
        (b"{", WEBHOOK_TOKEN, 400),
        (b"[]", WEBHOOK_TOKEN, 400),
        ({**notification(), "version": "3"}, WEBHOOK_TOKEN, 400),
        ({**notification(), "alerts": []}, WEBHOOK_TOKEN, 400),
        ({**notification(), "alerts": [{"status": "odd"}]}, WEBHOOK_TOKEN, 400),
        (b'{"version": "4", "x": "' + b"x" * alerts.MAX_BODY + b'"}', WEBHOOK_TOKEN, 413),
        ({**notification(), "alerts": [{}] * 5001}, WEBHOOK_TOKEN, 413),
    ],
    ids=["anonymous", "stranger", "text", "list", "version", "empty", "alert", "long", "many"],
)
async def test_what_is_not_from_alertmanager_is_refused(
    watcher: FallbackWatcher, body: Any, token: str, status: int
) -> None:
    await watcher.start()
    assert (await watcher.post(body, token)).status_code == status
    assert watcher.received == []


async def test_the_token_permits_nothing_else(watcher: FallbackWatcher) -> None:
    await watcher.start()
    assert (await watcher.ask(f"/ping/{WEBHOOK_TOKEN}")).status_code == 404
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        headers = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}
        for path in ("/api/v1/identity", "/api/v1/access"):
            answer = await client.get(f"http://127.0.0.1:{watcher.port}{path}", headers=headers)
            assert answer.status_code == 403, path


async def test_a_reference_to_the_token_that_cannot_be_resolved_is_no_token(watcher: FallbackWatcher) -> None:
    path = watcher.folder / "config" / "defib.yaml"
    path.write_text(path.read_text().replace(WEBHOOK_TOKEN, "${NOT_SET_HERE}"))
    await watcher.start()
    for token in ("${NOT_SET_HERE}", ""):
        assert (await watcher.post(notification(), token)).status_code == 401
    assert (await watcher.post(notification(), watcher.token)).status_code == 200


async def test_what_no_channel_accepts_is_sent_again(watcher: FallbackWatcher) -> None:
    watcher.accepts = False
    await watcher.start()
    refused = await watcher.post(notification())
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "not_accepted")
    watcher.accepts = True
    assert (await watcher.post(notification())).status_code == 200
    assert (await watcher.post(notification())).status_code == 200  # the answer may have been lost
    assert len(watcher.received) == 1


async def test_one_channel_that_accepts_it_is_enough(watcher: FallbackWatcher) -> None:
    written = yaml.safe_load((watcher.folder / "config" / "defib.yaml").read_text())["notify"]
    written["channels"]["away"] = {"webhook": {"url": "http://127.0.0.1:1/"}}
    watcher.configure(written)
    await watcher.start()
    assert (await watcher.post(notification())).status_code == 200
    assert len(watcher.received) == 1
    assert "alert_retry" in (watcher.folder / "log").read_text()


async def test_without_a_channel_it_is_not_ready_until_a_reload_brings_one(watcher: FallbackWatcher) -> None:
    configured = yaml.safe_load((watcher.folder / "config" / "defib.yaml").read_text())["notify"]
    watcher.configure({})
    await watcher.start()
    assert (await watcher.ask("/-/ready")).status_code == 503
    assert (await watcher.post(notification())).status_code == 503
    watcher.configure(configured)
    await watcher.launcher.kill(watcher.pid, signal.SIGHUP)

    async def is_ready() -> bool:
        return (await watcher.ask("/-/ready")).status_code == 200

    await eventually(is_ready)
    assert (await watcher.post(notification())).status_code == 200


async def test_the_default_channels_are_those_of_remediator_down(watcher: FallbackWatcher) -> None:
    written = yaml.safe_load((watcher.folder / "config" / "defib.yaml").read_text())["notify"]
    written["channels"]["team"] = {"webhook": {"url": "${NOT_SET_HERE}"}}
    written["routes"] = [{"match": {"severity": "critical"}, "channels": ["ops"]}, {"channels": ["team"]}]
    watcher.configure(written)
    await watcher.start()
    assert (await watcher.post(notification())).status_code == 200
    assert len(watcher.received) == 1


class ClockedRelay(ChannelClient):
    """A relay with a channel in this process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(httpx.AsyncClient(verify=NO_TLS))
        webhook = {"ops": {"webhook": {"url": "http://ops.invalid/"}}}
        inventory = inventory_of(folder, {"notify": {"language": "en", "channels": webhook}}).inventory
        self.messages: list[ChannelMessage] = []
        self.accepts = True
        self.held = asyncio.Event()
        self.held.set()
        self.relay = AlertRelay(Destination(inventory, ["ops"]), self, Redactor())

    async def send(self, channel: Channel, message: ChannelMessage, now: float) -> SendResult:
        del channel, now
        await self.held.wait()
        if not self.accepts:
            return SendResult("retry", "HTTP 500")
        self.messages.append(message)
        return SendResult("sent", "")

    async def deliver(self, number: int, name: str = "NoticesDead") -> bool:
        return await self.relay.deliver(parse_webhook(json.dumps(notification(name, number=number)).encode()))

    @property
    def titles(self) -> list[str]:
        return [message.card.title for message in self.messages]


@pytest.fixture
def clocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClockedRelay:
    monkeypatch.setattr(alerts, "MINUTE", 1.0)
    monkeypatch.setattr(alerts, "CHECK_EVERY", 0.05)
    return ClockedRelay(tmp_path)


async def test_a_flood_becomes_few_messages_and_one_about_the_others(clocked: ClockedRelay) -> None:
    running = asyncio.create_task(clocked.relay.run())
    sent = [await clocked.deliver(number) for number in range(alerts.PER_MINUTE)]
    left_out = [await clocked.deliver(100 + number) for number in range(5)]
    left_out.append(await clocked.deliver(1, "RemediatorDown"))
    assert (set(sent), set(left_out), len(clocked.messages)) == ({True}, {False}, alerts.PER_MINUTE)
    clocked.accepts = False
    await asyncio.sleep(1.2)  # the message about the others is refused, and is tried again
    assert len(clocked.messages) == alerts.PER_MINUTE
    clocked.accepts = True

    async def has_summary() -> bool:
        return len(clocked.messages) > alerts.PER_MINUTE

    await eventually(has_summary)
    assert clocked.titles[-1] == "6 more notifications about Defib"
    assert clocked.messages[-1].card.lines[0].plain == "Alerts: NoticesDead × 5, RemediatorDown × 1"
    assert await clocked.deliver(200)
    running.cancel()


async def test_notifications_that_are_being_sent_count(clocked: ClockedRelay) -> None:
    """And one that is repeated meanwhile is sent once."""
    clocked.held.clear()
    started = [asyncio.create_task(clocked.deliver(number)) for number in (*range(alerts.PER_MINUTE), 0)]
    await asyncio.sleep(0.1)
    with pytest.raises(ApiError) as refused:
        await clocked.deliver(50)
    assert refused.value.status == 503
    clocked.held.set()
    assert set(await asyncio.gather(*started)) == {True}
    assert len(clocked.messages) == alerts.PER_MINUTE


async def test_failures_do_not_count(clocked: ClockedRelay) -> None:
    clocked.accepts = False
    for number in range(2 * alerts.PER_MINUTE):
        with pytest.raises(ApiError):
            await clocked.deliver(number)
    clocked.accepts = True
    assert await clocked.deliver(0)


async def test_a_channel_that_hangs_is_not_waited_for(clocked: ClockedRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "ACCEPT_WITHIN", 0.1)
    clocked.held.clear()
    with pytest.raises(ApiError) as refused:
        await clocked.deliver(0)
    assert refused.value.status == 502


@pytest.mark.needs("prometheus-alertmanager")
async def test_remediator_down_reaches_the_chat_while_no_remediator_runs(
    launcher: Launcher, tmp_path: Path, feishu: FeishuSimulator
) -> None:
    """With the files that `defib init` writes for a chat, but for the ports."""
    for name, text in (("hook", feishu.webhook), ("secret", SECRET)):
        (tmp_path / name).write_text(text)
    chat = ["--feishu-webhook", str(tmp_path / "hook"), "--feishu-secret", str(tmp_path / "secret"), "--language", "en"]
    made = await asyncio.to_thread(run_defib, "init", "config", "--checkout", "--no-input", *chat, cwd=tmp_path)
    assert made.returncode == 0, made
    (command,) = re.findall(r"^  defib (deadman .*?)  +notifies", made.stdout, re.MULTILINE)
    assert command == "deadman --listen 127.0.0.1:9192 --pings-optional --directory config/data/deadman"
    watcher = FallbackWatcher(launcher, tmp_path)
    watcher.options = ["--pings-optional"]
    await watcher.start()
    port, remediator = reserve_ports(2)
    text = (tmp_path / "config-monitoring" / "alertmanager.yml").read_text()
    text = text.replace("127.0.0.1:9192", f"127.0.0.1:{watcher.port}").replace(
        "127.0.0.1:9095", f"127.0.0.1:{remediator}"
    )
    (tmp_path / "alertmanager.yml").write_text(text.replace("group_interval: 15s", "group_interval: 1s"))
    argv = [
        "prometheus-alertmanager", f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    ]  # fmt: skip
    await launcher.start(argv, tmp_path / "alertmanager.log")
    rules = yaml.safe_load((Path(__file__).parents[2] / "alerts" / "rules" / "monitoring.yml").read_text())["groups"]
    (rule,) = (each for group in rules for each in group["rules"] if each.get("alert") == "RemediatorDown")
    annotations = {name: re.sub(r"{{.*}}", "", text) for name, text in rule["annotations"].items()}
    alert: dict[str, Any] = {
        "labels": {"alertname": "RemediatorDown", "severity": "critical"},
        "annotations": annotations,
    }
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:

        async def post() -> bool:
            try:
                return (await client.post(f"http://127.0.0.1:{port}/api/v2/alerts", json=[alert])).is_success
            except httpx.HTTPError:
                return False

        # Feishu refuses the first message: Alertmanager repeats it.
        feishu.faults.append((500, {}, b""))
        await eventually(post)

        async def received(count: int) -> bool:
            return len(feishu.received) == count

        await eventually(lambda: received(1))
        alert["endsAt"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        assert await post()
        await eventually(lambda: received(2))
    assert not feishu.faults
    fired, resolved = (message.text for message in feishu.received)
    assert "RemediatorDown" in fired
    assert "Nothing is restarted and no notifications are sent." in fired
    assert "RemediatorDown" in resolved
