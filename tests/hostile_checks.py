"""Checks that hostile hosts and servers in a fleet caused no wrong action, alert, mute or card."""

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from defib.demo import feishu_cards
from tests import hostile
from tests.fleet import Fleet
from tests.hostile import DOWN, FRAMED, HEALTHY, LURED, MENDED
from tests.metric_names import RULES, rules
from tests.support import eventually

DOWN_STATE, NEEDED, WATCHED, OVER = "服务故障", "需要人工处理", "已重启，正在观察", "已恢复"
ALERT_STATES = ("告警", "告警已解除")
EXPECTED = {name: [DOWN_STATE] for name in DOWN} | {MENDED: [DOWN_STATE, WATCHED, OVER], FRAMED: [DOWN_STATE, NEEDED]}
SCRAPES = 20  # of the hostile node_exporter
# As `服务故障: web`, `需要人工处理: web，3 次重启均失败` and `告警 × 2: GPUHot · h`.
TITLE = re.compile(
    r"(?P<state>[^:×（]+?)(?P<many> × [0-9/ ]+)?: (?P<about>[^ ，]+)(?:，[^·（]*)?(?: · (?P<of>[^ ]+))?(?: （.*）)?"
)
BEGINNINGS = ("**", "› ", "▪ ", "✅ ")
MARKUP = re.compile(r"[*<>\[\]()\\_~`&]")


async def wait_for_hostile_data(fleet: Fleet) -> None:
    """Wait until all hostile responses were read several times, and the cards of real failures have arrived."""
    lies = fleet.hostile
    assert lies is not None
    node, web = lies.node, lies.web
    scraped = (
        f'gpu_recovery_needed{{host="hostile", action="{_quoted(hostile.MARKUP)}"}}',
        f'host_container_up{{host="hostile", container="{_quoted(hostile.LYING_CONTAINER)}"}}',
    )

    async def served() -> bool:
        answered = node.asked > SCRAPES and all(web.turns[name] > 2 * len(web.places) for name in hostile.WEB)
        return answered and all([await fleet.ask(each) for each in scraped])

    async def cards_arrived() -> bool:
        shown = _titles(fleet)
        return all(titles[-1] in shown[name] for name, titles in EXPECTED.items())

    await eventually(served, 300)
    await eventually(cards_arrived, 120)
    node.page = hostile.TOO_MANY
    asked = node.asked
    await eventually(lambda: _asked_again(fleet, asked + 3))


async def _asked_again(fleet: Fleet, times: int) -> bool:
    assert fleet.hostile is not None
    return fleet.hostile.node.asked > times


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


async def check_nothing_hostile_is_believed(fleet: Fleet) -> None:
    """Check that nothing was restarted, muted or forged, and that every card is right. Raises AssertionError."""
    await wait_for_hostile_data(fleet)
    await _check_actions(fleet)
    await _check_mutes(fleet)
    await _check_alerts(fleet)
    _check_cards(fleet)
    await _check_console(fleet)


async def _check_actions(fleet: Fleet) -> None:
    """Check that only services that are down were restarted, once each, and that no probe followed a redirect."""
    assert fleet.hostile is not None
    assert Counter(fleet.hostile.restarts.read_text().split()) == {FRAMED: 1, MENDED: 1}
    actions = (await fleet.stack.get("remediator", "/api/v1/actions"))["actions"]
    assert sorted((each["service"], each["kind"], each["state"], each["requested_by"]) for each in actions) == [
        (MENDED, "restart", "succeeded", "alert"), (FRAMED, "restart", "failed", "alert"),
    ]  # fmt: skip
    assert fleet.hostile.web.followed == []
    for name, reasons in hostile.WEB.items():
        probed = await fleet.stack.get("exporter", f"/api/v1/services/{name}")
        assert (probed["up"], probed["last"]["reason"] in reasons) == (False, True), probed
    (refusals,) = await fleet.ask('defib_remediator_webhook_refusals_total{code="401"}')
    assert refusals["value"][1] == "0"


async def _check_mutes(fleet: Fleet) -> None:
    silences = await fleet.stack.client.get(f"{fleet.stack.url('alertmanager')}/api/v2/silences")
    assert silences.json() == []
    assert (await fleet.stack.get("remediator", "/api/v1/maintenance"))["maintenance"] == []
    automation = await fleet.stack.get("remediator", "/api/v1/automation")
    assert (automation["enabled"], automation["at"]) == (True, None)
    for name in HEALTHY:
        explained = await fleet.stack.get("remediator", f"/api/v1/services/{name}/explain")
        shut = {each["gate"] for each in explained["gates"] if not each["open"]}
        assert shut <= {"not-an-alert-to-act-on", "already-up"}, (name, shut)


async def _check_alerts(fleet: Fleet) -> None:
    """Check that the healthy services were always up, without alerts or incidents."""
    healthy = f'service=~"{"|".join(HEALTHY)}"'
    ups = await fleet.ask(f"min_over_time(service:up:max{{{healthy}}}[1h])")
    assert sorted((row["metric"]["service"], row["value"][1]) for row in ups) == [
        (name, "1") for name in sorted(HEALTHY)
    ]
    assert await fleet.ask(f"count_over_time(ALERTS{{{healthy}}}[1h])") == []
    assert await fleet.ask('count_over_time({service="outsider"}[1h]) or count_over_time({team="outsider"}[1h])') == []
    assert await fleet.ask('count_over_time({job="node", __name__!~"node_[a-z0-9_]+|up|scrape_.*"}[1h])') == []
    rows = [*await fleet.rows(), *fleet.fallback.alerts.values()]
    assert {row["labels"]["service"] for row in rows if row["labels"]["alertname"] == "ServiceDown"} == {*DOWN, "page"}
    assert {row["labels"].get("host", "box") for row in rows} <= {*fleet.hosts}
    assert not {row["labels"].get("service") for row in rows} & {*HEALTHY, "outsider"}
    incidents = (await fleet.stack.get("remediator", "/api/v1/incidents"))["incidents"]
    # Other tests break the page and two certificates at the same time.
    assert (
        {*DOWN, "page"} <= {each["service"] for each in incidents} <= {*DOWN, "page", "expired", "expiring", "writer"}
    )
    assert [each for each in incidents if each["acknowledged_at"]] == []


def _titles(fleet: Fleet) -> dict[str, list[str]]:
    """Return the states on the cards of each service, in order."""
    states: dict[str, list[str]] = {name: [] for name in DOWN}
    for card in fleet.feishu.received:
        title = TITLE.fullmatch(card.title)
        if title is not None and title["state"] not in ALERT_STATES:
            states.setdefault(title["about"], []).append(title["state"])
    return states


def _check_cards(fleet: Fleet) -> None:
    refused = {why.partition(":")[0] for _, why in fleet.feishu.refused}
    assert refused <= {"19021", "11232"}, "only a wrong secret and a rate limit"
    assert fleet.app.apps.in_chat == []
    shown = _titles(fleet)
    assert shown.keys() == {*DOWN}, shown
    # A restart does not help against this response: after two minutes a person is needed.
    if shown[LURED][-1] == NEEDED:
        shown[LURED].pop()
    for name, states in shown.items():
        # A state that ends before its card is sent has none.
        assert states == [state for state in EXPECTED[name] if state in states], (name, states)
        assert states[-1:] == EXPECTED[name][-1:], (name, states)
    for card in fleet.feishu.received:
        _check_title(fleet, card.title)
        assert feishu_cards.find_mentions(card.message) == [], card.text
        lines = list(_lines(card.message["card"]))
        assert [line for line in lines if not line.startswith(BEGINNINGS)] == [], card.text
        assert [line for line in lines if MARKUP.search(_without_markup(line))] == [], card.text
        _check_names(fleet, card.title, lines)
        own = tuple(f"{fleet.stack.url(program)}/" for program in ("remediator", "alertmanager"))
        assert all(each["url"].startswith(own) for each in feishu_cards.find_buttons(card.message["card"])), card.text


def _check_title(fleet: Fleet, text: str) -> None:
    title = TITLE.fullmatch(text)
    assert title is not None, text
    if title["state"] in ALERT_STATES:
        alerts = {rule["alert"] for path in RULES for rule in rules(path) if "alert" in rule}
        assert title["about"] in alerts, text
        assert title["of"] in {None, *fleet.hosts, "expired", "expiring", "writer"}, text


def _check_names(fleet: Fleet, text: str, lines: list[str]) -> None:
    """Check that a card names one service and one host, whatever output it quotes."""
    title = TITLE.fullmatch(text)
    assert title is not None
    named = {
        name: [line.removeprefix(f"**{name}** ") for line in lines if line.startswith(f"**{name}** ")]
        for name in ("服务", "主机")
    }
    assert named["服务"] in ([], [title["of"] or title["about"]]), text
    assert len(named["主机"]) <= 1, text
    assert {*named["主机"]} <= {*fleet.hosts}, text


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    for element in card["elements"]:
        yield from element.get("text", {}).get("content", "").splitlines()


def _without_markup(line: str) -> str:
    """Return a line without bold names and escaped characters."""
    return re.sub(r"&#\d+;", "", re.sub(r"\*\*(?:[^*&]|&#\d+;)+\*\*", "", line))


async def _check_console(fleet: Fleet) -> None:
    """Check that the console escapes the output of hosts and servers."""
    incidents = (await fleet.stack.get("remediator", "/api/v1/incidents"))["incidents"]
    for path in ("/", *(f"/incidents/{each['id']}" for each in incidents)):
        page = (await fleet.stack.client.get(f"{fleet.stack.url('remediator')}{path}")).text
        assert "<at" not in page
        assert f'href="{hostile.LINK}' not in page
        if path != "/" and any(each["service"] == "shouting" and path.endswith(f"/{each['id']}") for each in incidents):
            assert "<at id=all>" in html.unescape(page)
