"""Cards as people read them: every state, both languages, whatever labels hold."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defib.demo import feishu_cards
from fleet.inventory.model import Inventory
from fleet.inventory.notify import ButtonAction, Person
from remediator.notifications import cards, reader, rendering
from remediator.notifications.channels import feishu, feishu_app
from remediator.notifications.channels.feishu import Letter
from remediator.notifications.channels.feishu_cards import SIZE_LIMIT, size
from remediator.notifications.outbox import Form
from remediator.notifications.reader import Attempt, State, Story
from remediator.notifications.rendering import Templates, escape
from remediator.policy.situation import Blocked, Refusal, Wait
from tests.support import inventory_of

ZONE = "Asia/Shanghai"
AT = datetime(2026, 11, 24, 3, 0, tzinfo=ZoneInfo(ZONE))
STATES: list[State] = [*get_args(get_args(State)[0]), "acting", "watched", "test"]
LANGUAGES: dict[str, Templates] = {"en": Templates("en"), "zh": Templates("zh")}
MENTION = {"critical": ["all"], "warning": ["all"], "info": ["all"]}
APP = feishu_app.FeishuAppOptions.model_validate({"app_id": "cli_x", "app_secret": "s", "chat_id": "oc_x"})


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    probe, control = {"http": {"url": "http://h/"}}, {"command": {"restart": ["true"], "logs": ["true"]}}
    service = {"name": "Web page", "host": "h", "probe": probe, "control": control, "runbook": "https://wiki/web"}
    remediator = {"url": "http://defib:9095", "alertmanager_url": "http://am:9093", "grafana_url": "http://g:3000/"}
    written = {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service}, "remediator": remediator,
    }  # fmt: skip
    return inventory_of(tmp_path_factory.mktemp("config"), written).inventory


def story(state: State, inventory: Inventory, **more: Any) -> Story:
    labels = {"alertname": "ServiceDown", "service": "web", "severity": "critical"}
    service = inventory.services["web"]
    return Story(**{
        "state": state, "severity": "critical", "labels": labels, "annotations": {"summary": "no answer"}, "service": service,
        "since": AT, "lasted": 41.2 if state in ("recovered", "unobserved", "alert_over") else None, "open_for": 4000.0,
        "on_call": [Person(open_id="ou_ann", name="Ann")], "facts": {"probe": "timeout: no answer within 10 s"},
        "attempts": [Attempt("restart", "failed", "exit status 1", "", AT, None), Attempt("restart", "succeeded", "", "ann", AT, 3.0)],
        "attempt": (2, 3), "firing": ["ServiceDown"], "incident": 7,
        "links": reader.links(inventory, service, labels, {}, 7), "answers": {"acknowledge": {"incident": 7}},
        **more,
    })  # fmt: skip


def both(
    told: list[Story], language: str, form: Form = "one", mention: Any = MENTION
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(a custom bot's card, an app's card, the plain text) of stories; what Feishu would refuse fails here."""
    card = cards.card(told, form, LANGUAGES[language], mention, answers=True)
    custom = feishu.message(Letter(card))
    plain = feishu.message(Letter(card, degraded=2))
    request = feishu_app.request(APP, Letter(card, uuid="u"))[2]
    of_app = json.loads(request["content"])
    assert feishu_cards.check_version_1(custom["card"]) == feishu_cards.check_version_2(of_app) == ""
    assert max(map(size, (custom, plain, request))) <= SIZE_LIMIT
    return custom["card"], of_app, plain["content"]["text"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("state", STATES)
def test_every_state_in_both_languages(inventory: Inventory, state: State, language: str) -> None:
    told = story(
        state,
        inventory,
        decision=("wait", "storm", "3 of 4"),
        facts={"action": 3, "kind": "recreate", "output": "a\nb", "probe": "x"},
    )
    custom, of_app, plain = both([told], language)
    words = LANGUAGES[language].words
    for card in (custom, of_app):
        assert words["states"][state] in card["header"]["title"]["content"]
        text = feishu_cards.extract_text(card)
        assert "h" in text
        assert "2026-11-24 03:00:00 CST" in text
        assert ("<at id=all>" in text) is (state == "person_needed")
    assert words["states"][state] in plain
    assert "**" not in plain
    assert "&#" not in plain


TEXTS = {
    "en": [
        "Service down: Web page",
        (
            "**Service** Web page (web)\n**Host** h\n**Severity** critical\n**Since** 2026-11-24 03:00:00 CST\n"
            "**Probe** timeout: no answer within 10 s\n**Summary** no answer\n**Attempt** 2 of 3\n"
            "**Tried** 03:00:00 restart: failed: exit status 1\n**Tried** 03:00:00 restart: succeeded, up after 3 s (ann)\n"
            "**Not restarted** too much is failing at once: the network, or the exporter?: 3 of 4\n**On call** Ann"
        ),
    ],
    "zh": [
        "服务故障: Web page",
        (
            "**服务** Web page (web)\n**主机** h\n**级别** 严重\n**开始** 2026-11-24 03:00:00 CST\n"
            "**探测** timeout: no answer within 10 s\n**摘要** no answer\n**尝试** 2/3\n"
            "**已尝试** 03:00:00 重启: 失败: exit status 1\n**已尝试** 03:00:00 重启: 成功, 3 秒后恢复 (ann)\n"
            "**未重启** 同时故障过多：可能是网络或探测器问题: 3 of 4\n**值班** Ann"
        ),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_card_in_full(inventory: Inventory, language: str) -> None:
    _, of_app, _ = both([story("down", inventory, decision=("wait", "storm", "3 of 4"))], language)
    assert feishu_cards.extract_text(of_app) == "\n".join(TEXTS[language])


@pytest.mark.parametrize(
    ("state", "colour", "title"),
    [
        ("down", "red", "Service down: Web page"),
        ("acting", "yellow", "Restarting: Web page (attempt 2 of 3)"),
        ("recovered", "green", "Recovered: Web page (after 41 s)"),
        ("person_needed", "carmine", "A person is needed: Web page"),
        ("alert", "red", "Alert: ServiceDown · Web page"),
        ("alert_over", "green", "Alert resolved: ServiceDown · Web page"),
    ],
)
def test_title_and_colour(inventory: Inventory, state: State, colour: str, title: str) -> None:
    custom, _, _ = both([story(state, inventory)], "en")
    assert (custom["header"]["template"], custom["header"]["title"]["content"]) == (colour, title)


def test_colour_follows_severity(inventory: Inventory) -> None:
    found = [
        both([story("down", inventory, severity=each)], "en")[0]["header"]["template"]
        for each in ("critical", "warning", "info")
    ]
    assert found == ["red", "orange", "blue"]


def test_buttons(inventory: Inventory) -> None:
    custom, of_app, _ = both([story("down", inventory)], "en")
    links = {each["text"]["content"]: each["url"] for each in feishu_cards.find_buttons(custom)}
    assert links == {
        "Grafana": "http://g:3000/d/defib-service?var-service=web",
        "Runbook": "https://wiki/web",
        "Logs": "http://defib:9095/api/v1/services/web/logs",
        "Console": "http://defib:9095/incidents/7",
        "Silence …": "http://am:9093/#/silences/new?filter=%7Bservice%3D%22web%22%7D",
    }
    first = feishu_cards.find_buttons(of_app)[0]
    assert first["behaviors"] == [{"type": "callback", "value": {"answer": "acknowledge", "incident": 7}}]
    assert len(feishu_cards.find_buttons(of_app)) == 6


def test_no_button_leads_elsewhere_than_to_the_web(inventory: Inventory) -> None:
    for url in ("javascript:alert(1)", "file:///etc/passwd", "data:x", "http://x/" + "a" * 5000, "http://x/\u202e"):
        assert "runbook" not in reader.links(inventory, None, {}, {"runbook_url": url}, None)
    hostile = {"a": 'x"}\n\\', "service": "gone"}
    assert "%5Cn%5C%5C%22%2C" in reader.links(inventory, None, hostile, {}, None)["silence"]


@pytest.mark.parametrize(
    ("mention", "severity", "called"),
    [
        (MENTION, "info", ["all"]),
        ({"critical": ["on_call", "ou_bob"]}, "critical", ["ou_ann", "ou_bob"]),
        ({"critical": ["all"], "warning": ["on_call"]}, "critical", ["all"]),
        ({"critical": ["all"], "warning": ["on_call"]}, "warning", ["ou_ann"]),
        ({"critical": ["all"]}, "info", []),
    ],
)
def test_mention_by_severity(inventory: Inventory, mention: Any, severity: str, called: list[str]) -> None:
    assert calls(story("person_needed", inventory, severity=severity), mention) == called


def calls(told: Story, mention: Any) -> list[str]:
    return list(cards.card([told], "one", LANGUAGES["en"], mention, answers=False).calls)


@pytest.mark.parametrize("state", STATES)
def test_all_are_called_only_where_a_person_is_needed_and_nobody_where_it_is_to_be_quiet(
    inventory: Inventory, state: State
) -> None:
    mention = {"critical": ["all", "on_call", "ou_bob"]}
    some = ["ou_ann", "ou_bob"] if state in cards.CALLING else []
    assert calls(story(state, inventory), mention) == (["all", *some] if state == "person_needed" else some)
    assert calls(story(state, inventory, quiet=True), mention) == []


def test_nobody_is_called_once_somebody_has_acknowledged(inventory: Inventory) -> None:
    _, of_app, _ = both([story("reminder", inventory, acknowledged=("ann", AT))], "en")
    assert "<at" not in feishu_cards.extract_text(of_app)
    assert "Acknowledged by** ann, 2026-11-24" in feishu_cards.extract_text(of_app)


def test_a_group_says_what_they_share_once(inventory: Inventory) -> None:
    told = [
        story(
            "alert",
            inventory,
            service=None,
            labels={"alertname": "DiskFull", "job": "node", "instance": f"n{n}"},
            annotations={"summary": f"disk {n}"},
        )
        for n in range(3)
    ]
    told[1] = replace(told[1], state="alert_over")
    custom, _, plain = both(told, "en", "group")
    text = feishu_cards.extract_text(custom)
    assert custom["header"]["title"]["content"] == "Alert × 2 of 3: DiskFull"
    assert text.count("node") == 1
    assert all(f"n{n}" in text and f"disk {n}" in text for n in range(3))
    assert "**Alert resolved** 1 of 3" in text
    assert "instance: n2" in plain


def test_what_lasts_stands_first_in_a_group_and_gives_it_its_title(inventory: Inventory) -> None:
    def told(over: int) -> list[Story]:
        labels = [{"alertname": "DiskFull", "instance": f"n{n}"} for n in range(200)]
        states: list[State] = ["alert_over" if n < over else "alert" for n in range(200)]
        return [story(state, inventory, service=None, labels=each) for state, each in zip(states, labels, strict=True)]

    custom, _, _ = both(told(199), "en", "group")
    assert custom["header"] == {
        "template": "red",
        "title": {"tag": "plain_text", "content": "Alert × 1 of 200: DiskFull"},
    }
    assert "n199" in feishu_cards.extract_text(custom)
    custom, of_app, _ = both(told(200), "en", "group")
    assert custom["header"] == {
        "template": "green",
        "title": {"tag": "plain_text", "content": "Alert resolved × 200: DiskFull"},
    }
    assert "<at" not in feishu_cards.extract_text(of_app)


def test_a_group_is_acknowledged_by_one_press(inventory: Inventory) -> None:
    told = [story("down", inventory, answers={"acknowledge": {"incident": n}}) for n in (1, 2)]
    card = cards.card(told, "summary", LANGUAGES["en"], {}, answers=True, notice=5, told_at=9.5)
    assert [(each.text, each.value or each.url) for each in card.buttons] == [
        ("Acknowledge", {"answer": "acknowledge", "notice": 5, "since": 9}), ("Runbook", "https://wiki/web"), ("Console", "http://defib:9095/"),
    ]  # fmt: skip
    told = [replace(each, answers={}) for each in told]
    assert cards.card(told, "summary", LANGUAGES["en"], {}, answers=True, notice=5).buttons[0].text == "Runbook"


def test_what_is_over_calls_nobody_and_silences_nothing(inventory: Inventory) -> None:
    late = story("person_needed", inventory, lasted=30.0)
    assert cards.card([late], "one", LANGUAGES["en"], {"critical": ["all"]}, answers=True).calls == ()
    custom, _, _ = both([story("recovered", inventory)], "en")
    assert [each["text"]["content"] for each in feishu_cards.find_buttons(custom)] == [
        "Grafana",
        "Runbook",
        "Logs",
        "Console",
    ]
    assert "**Summary**" not in feishu_cards.extract_text(custom)  # what the alert said is not so any more


def test_a_mention_in_a_title_is_none(inventory: Inventory) -> None:
    _, of_app, _ = both(
        [story("alert", inventory, service=None, labels={"alertname": "<at id=all></at>"})], "en", mention={}
    )
    assert of_app["header"]["title"]["content"] == "Alert: ‹at id=all>‹/at>"


def test_a_summary_names_all_it_has_room_for_and_counts_the_rest(inventory: Inventory) -> None:
    told = [
        story("down", inventory, service=None, labels={"service": f"service-{n}", "host": f"h{n % 4}"})
        for n in range(1000)
    ]
    custom, of_app, _ = both(told, "en", "summary")
    for card in (custom, of_app):
        lines = feishu_cards.extract_text(card).splitlines()
        assert lines[0] == "Service down × 1000"
        named = sum(1 for line in lines if line.startswith("▪"))
        assert named > 150
        left = next(int(line.split()[2]) for line in lines if line.startswith("… and"))
        assert named + left == 1000
    assert "**Host** h0: 250" in feishu_cards.extract_text(custom)


HOSTILE = [
    "<at id=all></at>", '<at user_id="all"></at>', "[x](javascript:alert(1))", "**bold** `code` ~no~ _u_", 'a\\b"c\nd\0e',
    "\u202eevil\u2066", "{{ 1234 * 5678 }}{% for x in y %}", "&#60;at id=all&#62;", "</font><font color='red'>", "\U0001f600\ud83d", "字" * 20_000, "x\n" * 25_000,
]  # fmt: skip


def forged(card: Mapping[str, Any]) -> list[str]:
    """Markup in a card that is not ours."""
    shown = json.dumps(card, ensure_ascii=True)
    return [
        each
        for each in ("<at", "](", "<font", "\\u202e", "\\u2066", "\\u0000", "7006652", "~no~", "`code`")
        if each in shown
    ]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("state", ["down", "alert", "could_not_restart", "approval", "watchdog_missing"])
def test_nothing_from_outside_is_markup(inventory: Inventory, state: State, text: str, language: str) -> None:
    labels = {"alertname": text, "service": text, "host": text, "severity": text, "x": text, text: "y"}
    facts = {"probe": text, "why": text, "output": text, "who": text, "kind": text, "action": 1}
    told = story(
        state, inventory, service=None, labels=labels, annotations={"summary": text, text: text}, facts=facts,
        decision=("wait", text, text), attempts=[Attempt(text, text, text, text, AT, 1.0)], firing=[text, "b"], acknowledged=(text, AT),
    )  # fmt: skip
    custom, of_app, plain = both([told], language, mention={})
    assert forged({"elements": custom["elements"], "body": of_app["body"]["elements"][0]}) == []
    assert "<" not in plain
    for form in ("group", "summary"):
        custom, of_app, _ = both([told, told], language, form, mention={})
        assert forged({"elements": custom["elements"], "body": of_app["body"]["elements"][0]}) == []


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=30), st.text(max_size=300), max_size=8), st.sampled_from(["en", "zh"]))
def test_whatever_labels_hold_is_shown_as_it_is(labels: dict[str, str], language: str) -> None:
    told = Story("alert", "info", {"alertname": "A", **labels}, labels, None, AT, None, 1.0, [], {})
    card = cards.card([told], "one", LANGUAGES[language], {}, answers=False)
    assert not any(set(line) & set("<>[]()\\_~`") for line in card.body)
    # All that is left of markup is what makes names bold.
    for line in card.body:
        assert line.count("**") == 2
        assert line.replace("**", "").count("*") == 0
    custom = feishu.message(Letter(card))["card"]
    assert feishu_cards.check_version_1(custom) == ""
    assert size(custom) <= SIZE_LIMIT


@given(st.text())
def test_escaped_text_has_no_markup_left(text: str) -> None:
    assert not set(escape(text)) & set("*<>[]()\\_~`")


def test_both_languages_have_the_same_words() -> None:
    def shape(words: Any) -> Any:
        return {key: shape(value) for key, value in words.items()} if isinstance(words, dict) else type(words)

    english, chinese = LANGUAGES["en"].words, LANGUAGES["zh"].words
    assert shape(english) == shape(chinese)
    assert set(english["reasons"]) == {*get_args(Refusal), *get_args(Wait), *get_args(Blocked)}
    assert set(english["states"]) == set(STATES)
    assert set(english["answers"]) == set(get_args(ButtonAction))


def test_plain_text_is_no_larger_than_feishu_takes(inventory: Inventory) -> None:
    labels = {f"label{n}": "\U0001f600" * 600 for n in range(60)}
    told = [story("alert", inventory, service=None, labels=labels)] * 3
    _, _, plain = both(told, "zh", "group")
    assert len(plain.encode()) < SIZE_LIMIT


def test_durations() -> None:
    words = LANGUAGES["en"].words
    said = [rendering.duration(words, seconds) for seconds in (0.2, 41.4, 61, 3599, 7260, 90000, -5)]
    assert said == ["0.2 s", "41 s", "1 min 1 s", "59 min 59 s", "2 h 1 min", "1 d 1 h", "0 s"]


def test_a_user_s_templates_stand_in_place_of_ours(inventory: Inventory, tmp_path: Path) -> None:
    (tmp_path / "title.j2").write_text("[ops] {% include 'defib/title.j2' %}")
    (tmp_path / "card.j2").write_text(
        "{{ bold('Rack') }} {{ story.labels.rack }}\n{% include 'defib/card.j2' %}\n{{ story.service.id }}"
    )
    own = Templates("en", tmp_path)
    card = cards.card([story("down", inventory, labels={"rack": "<a3>"})], "one", own, {}, answers=False)
    assert card.title == "[ops] Service down: Web page"
    assert card.body[0] == "**Rack** &#60;a3&#62;"
    assert card.body[-1] == "web"
    assert card.text[0] == "Rack: <a3>"


def test_a_rule_s_words_are_told_in_the_language_of_the_fleet() -> None:
    said = {"summary": "down", "summary_zh": "不可用", "description": "why", "runbook_url": "docs/alerts.md#x"}
    plain = {name: said[name] for name in ("description", "runbook_url")}
    assert reader.in_language(said, "en") == {**plain, "summary": "down"}
    assert reader.in_language(said, "zh") == {**plain, "summary": "不可用"}


def test_the_runbook_of_our_own_rules_is_where_the_documentation_is(tmp_path: Path) -> None:
    written = {"notify": {"links": {"docs": "https://git.example/defib/docs/"}}}
    ours = {"runbook_url": "docs/alerts.md#hostdown"}
    found = reader.links(inventory_of(tmp_path / "a", written).inventory, None, {}, ours, None)
    assert found["runbook"] == "https://git.example/defib/docs/alerts.md#hostdown"
    assert "runbook" not in reader.links(inventory_of(tmp_path / "b", {}).inventory, None, {}, ours, None)
