"""What must be so of a fleet whatever its hostile parts have said: what was done, kept and told is right."""

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from defib.demo import feishu_cards
from tests import hostile
from tests.fleet import Fleet
from tests.hostile import DOWN, FRAMED, HEALTHY, LURED, MENDED
from tests.names import RULES, rules
from tests.support import eventually

DOWN_STATE, NEEDED, WATCHED, OVER = "服务故障", "需要人工处理", "已重启，正在观察", "已恢复"
ALERT_STATES = ("告警", "告警已解除")
EXPECTED = {name: [DOWN_STATE] for name in DOWN} | {MENDED: [DOWN_STATE, WATCHED, OVER], FRAMED: [DOWN_STATE, NEEDED]}
ENOUGH = 20  # scrapes of the node_exporter that lies
TITLE = re.compile(r"(?P<state>[^:×（]+?)(?P<many> × [0-9/ ]+)?: (?P<about>[^ ]+)(?: · (?P<of>[^ ]+))?(?: （.*）)?")
BEGINNINGS = ("**", "› ", "▪ ", "✅ ")
MARKUP = re.compile(r"[*<>\[\]()\\_~`&]")


async def lies_are_served(fleet: Fleet) -> None:
    """Wait until every lie was told often enough, and the cards of what is really down have come."""
    lies = fleet.hostile
    assert lies is not None
    node, web = lies.node, lies.web
    scraped = (
        f'gpu_recovery_needed{{host="hostile", action="{_quoted(hostile.MARKUP)}"}}',
        f'host_container_up{{host="hostile", container="{_quoted(hostile.LYING_CONTAINER)}"}}',
    )

    async def served() -> bool:
        answered = node.asked > ENOUGH and all(web.turns[name] > 2 * len(web.places) for name in hostile.WEB)
        return answered and all([await fleet.ask(each) for each in scraped])

    async def told() -> bool:
        shown = _titles(fleet)
        return all(titles[-1] in shown[name] for name, titles in EXPECTED.items())

    await eventually(served, 300)
    await eventually(told, 120)
    node.page = hostile.TOO_MANY
    asked = node.asked
    await eventually(lambda: _asked_again(fleet, asked + 3))


async def _asked_again(fleet: Fleet, times: int) -> bool:
    assert fleet.hostile is not None
    return fleet.hostile.node.asked > times


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


async def nothing_hostile_is_believed(fleet: Fleet) -> None:
    """Nothing was restarted, muted or forged, and every card is right. Raises AssertionError."""
    await lies_are_served(fleet)
    await _nothing_was_done(fleet)
    await _nothing_is_muted(fleet)
    await _nothing_was_forged(fleet)
    _cards_are_right(fleet)
    await _console_is_right(fleet)


async def _nothing_was_done(fleet: Fleet) -> None:
    """Only what is down and can be restarted was, each once; no probe went where a redirect led it."""
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


async def _nothing_is_muted(fleet: Fleet) -> None:
    silences = await fleet.stack.client.get(f"{fleet.stack.url('alertmanager')}/api/v2/silences")
    assert silences.json() == []
    assert (await fleet.stack.get("remediator", "/api/v1/maintenance"))["maintenance"] == []
    automation = await fleet.stack.get("remediator", "/api/v1/automation")
    assert (automation["enabled"], automation["at"]) == (True, None)
    for name in HEALTHY:
        explained = await fleet.stack.get("remediator", f"/api/v1/services/{name}/explain")
        shut = {each["gate"] for each in explained["gates"] if not each["open"]}
        assert shut <= {"not-an-alert-to-act-on", "already-up"}, (name, shut)


async def _nothing_was_forged(fleet: Fleet) -> None:
    """The healthy services were up all the time, and no alert or incident is of them."""
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
    # What else is broken meanwhile has its own test: the page, and two certificates.
    assert {*DOWN, "page"} <= {each["service"] for each in incidents} <= {*DOWN, "page", "expired", "expiring"}
    assert [each for each in incidents if each["acknowledged_at"]] == []


def _titles(fleet: Fleet) -> dict[str, list[str]]:
    """The states that the cards of each service told, in order."""
    found: dict[str, list[str]] = {name: [] for name in DOWN}
    for card in fleet.feishu.received:
        title = TITLE.fullmatch(card.title)
        if title is not None and title["state"] not in ALERT_STATES:
            found.setdefault(title["about"], []).append(title["state"])
    return found


def _cards_are_right(fleet: Fleet) -> None:
    refused = {why.partition(":")[0] for _, why in fleet.feishu.refused}
    assert refused <= {"19021", "11232"}, "a secret that is wrong, and a busy bot"
    assert fleet.app.apps.in_chat == []
    shown = _titles(fleet)
    assert shown.keys() == {*DOWN}, shown
    # No restart helps against such an answer: after two minutes a person is asked for.
    if shown[LURED][-1] == NEEDED:
        shown[LURED].pop()
    for name, states in shown.items():
        # What goes on before a card is sent is told by that card.
        assert states == [state for state in EXPECTED[name] if state in states], (name, states)
        assert states[-1:] == EXPECTED[name][-1:], (name, states)
    for card in fleet.feishu.received:
        _title_is_right(fleet, card.title)
        assert feishu_cards.mentions(card.message) == [], card.text
        lines = list(_lines(card.message["card"]))
        assert [line for line in lines if not line.startswith(BEGINNINGS)] == [], card.text
        assert [line for line in lines if MARKUP.search(_printed(line))] == [], card.text
        _names_are_right(fleet, card.title, lines)
        own = tuple(f"{fleet.stack.url(program)}/" for program in ("remediator", "alertmanager"))
        assert all(each["url"].startswith(own) for each in feishu_cards.buttons(card.message["card"])), card.text


def _title_is_right(fleet: Fleet, text: str) -> None:
    title = TITLE.fullmatch(text)
    assert title is not None, text
    if title["state"] in ALERT_STATES:
        alerts = {rule["alert"] for path in RULES for rule in rules(path) if "alert" in rule}
        assert title["about"] in alerts, text
        assert title["of"] in {None, *fleet.hosts, "expired", "expiring"}, text


def _names_are_right(fleet: Fleet, text: str, lines: list[str]) -> None:
    """A card names one service and one host, whatever is printed in it."""
    title = TITLE.fullmatch(text)
    assert title is not None
    said = {
        name: [line.removeprefix(f"**{name}** ") for line in lines if line.startswith(f"**{name}** ")]
        for name in ("服务", "主机")
    }
    assert said["服务"] in ([], [title["of"] or title["about"]]), text
    assert len(said["主机"]) <= 1, text
    assert {*said["主机"]} <= {*fleet.hosts}, text


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    for element in card["elements"]:
        yield from element.get("text", {}).get("content", "").splitlines()


def _printed(line: str) -> str:
    """A line without the names that a card sets in bold, and without what is escaped."""
    return re.sub(r"&#\d+;", "", re.sub(r"\*\*(?:[^*&]|&#\d+;)+\*\*", "", line))


async def _console_is_right(fleet: Fleet) -> None:
    """Its pages show what hosts and servers said as text."""
    incidents = (await fleet.stack.get("remediator", "/api/v1/incidents"))["incidents"]
    for path in ("/", *(f"/incidents/{each['id']}" for each in incidents)):
        page = (await fleet.stack.client.get(f"{fleet.stack.url('remediator')}{path}")).text
        assert "<at" not in page
        assert f'href="{hostile.LINK}' not in page
        if path != "/" and any(each["service"] == "shouting" and path.endswith(f"/{each['id']}") for each in incidents):
            assert "<at id=all>" in html.unescape(page)
