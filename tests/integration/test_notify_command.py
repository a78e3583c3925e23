"""Notifications on the command line: `defib notify test`, templates in `defib check`, `defib acknowledge`, `defib silence`."""

import asyncio
import json
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT
from tests.forked_defib import run_defib
from tests.integration.loop import Loop
from tests.support import eventually


class _TagChecker(HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """An element of SVG."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_well_formed(page: str) -> None:
    checker = _TagChecker()
    checker.feed(page)
    checker.close()
    assert checker.open == []


async def defib(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command and return its exit status, stdout and stderr."""
    done = await asyncio.to_thread(run_defib, *arguments, "--config", str(folder))
    return done.returncode, done.stdout, done.stderr


async def write_configuration(folder: Path, feishu: FeishuSimulator, **notify: Any) -> Path:
    app = {"app_id": APP_ID, "app_secret": APP_SECRET, "chat_id": CHAT, "url": feishu.url}
    channels = {"bot": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}}, "app": {"feishu_app": app}}
    written = {"notify": {"language": "en", "channels": channels, "routes": [{"channels": ["bot"]}], **notify}}
    await asyncio.to_thread((folder / "defib.yaml").write_text, yaml.safe_dump(written))
    return folder


async def test_a_test_message_to_every_channel(tmp_path: Path, feishu: FeishuSimulator) -> None:
    config = await write_configuration(tmp_path, feishu)
    assert await defib(config, "notify", "test") == (0, "app: 0: success\nbot: 0: success\n", "")
    assert feishu.received[0].title == "Test message of Defib: this channel works"
    assert feishu.apps.in_chat[0].title == "Test message of Defib: this channel works"


async def test_the_answers_as_json(tmp_path: Path, feishu: FeishuSimulator) -> None:
    config = await write_configuration(tmp_path, feishu)
    feishu.keyword = "on fire"
    status, out, _ = await defib(config, "--json", "notify", "test")
    app, bot = json.loads(out)["channels"]
    assert (status, app) == (1, {"channel": "app", "sent": True, "response": "0: success"})
    assert (bot["channel"], bot["sent"], bot["response"].partition(":")[0]) == ("bot", False, "19024")


async def test_only_the_secrets_of_a_channel_are_needed_to_test_it(tmp_path: Path, feishu: FeishuSimulator) -> None:
    unset = {"feishu": {"webhook": "${FEISHU_UNSET}"}}
    bot = {"feishu": {"webhook": feishu.webhook, "secret": SECRET}}
    config = await write_configuration(tmp_path, feishu, channels={"bot": bot, "other": unset})
    assert (await defib(config, "notify", "test", "bot"))[0] == 0
    status, _, err = await defib(config, "notify", "test", "other")
    assert (status, "notify.channels.other.feishu.webhook: the environment variable FEISHU_UNSET" in err) == (
        1,
        True,
    ), err


async def test_the_error_of_a_channel_is_explained(tmp_path: Path, feishu: FeishuSimulator) -> None:
    config = await write_configuration(tmp_path, feishu)
    feishu.keyword = "on fire"
    result = await defib(config, "notify", "test", "bot")
    assert result == (1, "bot: 19024: the bot requires one of its keywords in the text\n", "")
    feishu.keyword, feishu.secret = None, "another"
    status, out, _ = await defib(config, "notify", "test", "bot")
    assert (status, out.startswith("bot: 19021: the signature or the clock is wrong; this machine's clock is")) == (
        1,
        True,
    )
    feishu.apps.receivers.clear()
    assert (await defib(config, "notify", "test", "app"))[:2] == (1, "app: 230002: the bot is not in the chat\n")
    await feishu.stop()
    status, out, err = await defib(config, "notify", "test", "bot")
    assert (status, out) == (1, f"bot: cannot connect to {feishu.url.removeprefix('http://')}\n")
    assert "demo-token" not in out + err
    status, _, err = await defib(config, "notify", "test", "nowhere")
    assert (status, err) == (1, "defib: the inventory has no channel 'nowhere' (channels: app, bot)\n")


async def test_check_renders_the_templates(tmp_path: Path, feishu: FeishuSimulator) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "group.j2").write_text(
        "{% for story in stories %}\n{{ story.labels.nothing }}{{ story.bogus }}\n{% endfor %}"
    )
    config = await write_configuration(tmp_path, feishu, templates="own")
    status, _, err = await defib(config, "check")
    (line,) = err.splitlines()
    assert (status, line.startswith(f"{own}/group.j2:2: "), line.endswith("has no attribute 'bogus'")) == (
        1,
        True,
        True,
    )
    status, out, _ = await defib(config, "--json", "check")
    (wrong,) = json.loads(out)["errors"]
    assert (status, wrong["file"], wrong["line"]) == (1, f"{own}/group.j2", 2)
    assert (await defib(config, "check", "--for", "exporter"))[0] == 0


@pytest.mark.needs("sshd")
async def test_acknowledge_on_the_command_line_is_shown_on_the_console(loop: Loop) -> None:
    hostile = "<script>alert(1)</script>"
    service = {**loop.service("web", on_failure="notify"), "name": hostile}
    await loop.start({"web": service})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse")
    config = loop.folder / "config"
    status, out, _ = await defib(config, "acknowledge", "1")
    assert (status, out.startswith("incident 1 is acknowledged by ")) == (0, True)
    listed, shown = [(await defib(config, "incidents", *number))[1] for number in ((), ("1",))]
    assert "acknowledged by" in listed
    failed = "exit: test exited with status 1, expected 0"
    assert failed in listed
    assert f"last failed probe: {failed}" in shown
    status, _, err = await defib(config, "silence", "1")
    assert (status, "remediator.alertmanager_url is not set" in err) == (1, True), err
    assert (await defib(config, "acknowledge", "99"))[2] == "defib: there is no incident 99 (the newest: 1)\n"
    page = await loop.ask("GET", "/incidents")
    assert page.headers["content-type"].startswith("text/html")
    assert "Open incidents <small>1</small>" in page.text
    assert "`on_failure` is `notify`" in page.text
    whole = await loop.ask("GET", "/incidents/1")
    assert failed in page.text
    assert failed in whole.text
    assert failed in loop.feishu.received[0].text
    assert loop.restarts() == []
    assert re.search(r"<span class=.time.>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d</span> Acknowledged by ", whole.text)
    decision = "Decision: does not act (notify-only): not restarted automatically: `on_failure` is `notify`"
    assert f"</span> {decision}" in whole.text
    cells = re.sub(r"<td [^>]*>", "<td>", whole.text)
    assert "<td>ops</td><td>Service down</td><td>sent</td><td>0: success</td>" in cells
    for each in (page, whole):
        assert_well_formed(each.text)
    (notice,) = (await loop.ask("GET", "/api/v1/notifications")).json()["notifications"]
    assert [each["response"] for each in notice["deliveries"]] == ["0: success"]
    assert hostile not in page.text + whole.text
    assert "&lt;script&gt;" in page.text
    assert (await loop.ask("GET", "/incidents/99")).status_code == 404
    await loop.ask("PUT", "/api/v1/automation", {"enabled": False, "reason": "a <b>change</b>"})
    (loop.folder / "web.alive").touch()
    await loop.fire("web", status="resolved")
    await loop.until("recovered")
    page = await loop.ask("GET", "/incidents")
    assert "No open incidents." in page.text
    assert "a &lt;b&gt;change" in page.text
    answer = await loop.ask("POST", "/api/v1/incidents/1/acknowledge", {})
    assert (answer.status_code, answer.json()["acknowledged_by"] != "") == (200, True)


@pytest.mark.needs("sshd", "prometheus-alertmanager")
async def test_silence_on_the_command_line_is_created_in_alertmanager(loop: Loop) -> None:
    loop.stack._folder.mkdir(exist_ok=True)
    await loop.stack.start_alertmanager()
    remediator = {"alertmanager_url": loop.stack.url("alertmanager")}
    await loop.start({"web": loop.service("web", on_failure="notify")}, remediator=remediator)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse")
    config = loop.folder / "config"
    status, out, err = await defib(config, "silence", "1", "--for", "30m", "--comment", "disks are replaced")
    assert status == 0, err
    assert re.fullmatch(r"incident 1 is silenced until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", out)
    assert (await loop.incident())["acknowledged_by"]
    status, out, err = await defib(config, "--json", "silence", "--alert", "1")
    assert (status, json.loads(out or "{}").keys()) == (0, {"id", "until"}), err
    silences = await loop.stack.get("alertmanager", "/api/v2/silences")
    by_length = {_minutes(each): each for each in silences}
    assert set(by_length) == {30, 120}
    assert by_length[30]["comment"] == "disks are replaced"
    assert [each["value"] for each in by_length[30]["matchers"]] == ["web"]
    assert ("alertname", "ServiceDown") in [(each["name"], each["value"]) for each in by_length[120]["matchers"]]
    status, _, err = await defib(config, "silence", "--alert", "99")
    assert (status, err) == (1, "defib: there is no alert 99 (firing: 1)\n")
    status, _, err = await defib(config, "silence", "99")
    assert (status, err) == (1, "defib: there is no incident 99 (the newest: 1)\n")


def _minutes(silence: dict[str, Any]) -> int:
    began, ends = (datetime.fromisoformat(silence[key]) for key in ("startsAt", "endsAt"))
    return round((ends - began).total_seconds() / 60)


@pytest.mark.needs("sshd")
async def test_escalation_and_reminders(loop: Loop) -> None:
    await loop.feishu.start()
    bot = {"feishu": {"webhook": loop.feishu.webhook, "secret": SECRET}}
    route = {"channels": ["ops"], "escalate": {"after": "1s", "channels": ["lead"]}, "remind": "3s"}
    await loop.start(
        {"web": loop.service("web", on_failure="notify")},
        notify={"channels": {"ops": bot, "lead": bot}, "routes": [route]},
    )
    await loop.kill("web")
    await loop.fire("web")

    async def escalated() -> bool:
        titles = [card.title for card in loop.feishu.received]
        return titles.count("Service down: web") == 2 and "Still not resolved: web" in titles

    await eventually(escalated)
    assert any("not acknowledged for" in card.text for card in loop.feishu.received)
