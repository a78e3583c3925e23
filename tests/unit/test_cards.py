"""Cards: every state, both languages, any content of labels."""

import json
import re
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
from remediator.incidents.timeline import TimelineEvent
from remediator.notifications.channels import ChannelMessage
from remediator.notifications.channels.feishu import FeishuOptions, format_message
from remediator.notifications.channels.feishu_app import FeishuAppOptions, format_request
from remediator.notifications.channels.feishu_cards import SIZE_LIMIT, escape_markup, format_line, message_size
from remediator.notifications.content import Attempt, Notification, NotificationState, annotations_in_language
from remediator.notifications.durations import format_duration
from remediator.notifications.links import build_links
from remediator.notifications.messages import MENTIONING, render_card
from remediator.notifications.outbox import MessageForm
from remediator.notifications.phrases import translate
from remediator.notifications.rendering import Templates, describe_event
from remediator.policy.situation import Blocked, Refusal, Wait
from tests.support import inventory_of

ZONE = "Asia/Shanghai"
AT = datetime(2026, 11, 24, 3, 0, tzinfo=ZoneInfo(ZONE))
STATES: list[NotificationState] = [*get_args(get_args(NotificationState)[0]), "acting", "watched", "test"]
OF_PROBLEMS = [state for state in STATES if state != "report"]  # of which tests/unit/test_reports.py has the cards
LANGUAGES: dict[str, Templates] = {"en": Templates("en"), "zh": Templates("zh")}
MENTION = {"critical": ["all"], "warning": ["all"], "info": ["all"]}


def app(mention: Any) -> FeishuAppOptions:
    options = {"app_id": "cli_x", "app_secret": "s", "chat_id": "oc_x", "long_connection": True, "mention": mention}
    return FeishuAppOptions.model_validate(options)


def bot(mention: Any) -> FeishuOptions:
    return FeishuOptions.model_validate({"webhook": "http://f/", "mention": mention})


APP = app({})


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    probe, control = {"http": {"url": "http://h/"}}, {"command": {"restart": ["true"], "logs": ["true"]}}
    service = {"name": "Web page", "host": "h", "probe": probe, "control": control, "runbook": "https://wiki/web"}
    remediator = {"url": "http://defib:9095", "alertmanager_url": "http://am:9093", "grafana_url": "http://g:3000/"}
    written = {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service}, "remediator": remediator,
    }  # fmt: skip
    return inventory_of(tmp_path_factory.mktemp("config"), written).inventory


def sample(state: NotificationState, inventory: Inventory, **more: Any) -> Notification:
    labels = {"alertname": "ServiceDown", "service": "web", "severity": "critical"}
    service = inventory.services["web"]
    return Notification(**{
        "state": state, "severity": "critical", "labels": labels, "annotations": {"summary": "no answer"}, "service": service,
        "since": AT, "duration": 41.2 if state in ("recovered", "unobserved", "alert_over") else None, "open_for": 4000.0,
        "on_call": [Person(open_id="ou_ann", name="Ann")], "details": {"probe": "timeout: no answer within 10 s"},
        "attempts": [Attempt("restart", "failed", "exit status 1", "", AT, None), Attempt("restart", "succeeded", "", "ann", AT, 3.0)],
        "attempt": (2, 3), "firing": ["ServiceDown"], "incident": 7,
        "links": build_links(inventory, service, labels, {}, 7), "buttons": {"acknowledge": {"incident": 7}},
        **more,
    })  # fmt: skip


def both(
    notifications: list[Notification], language: str, form: MessageForm = "one", mention: Any = MENTION
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return a custom bot's card, an app's card and the plain text; fails on what Feishu would refuse."""
    card = render_card(notifications, form, LANGUAGES[language], app(mention))
    custom = format_message(ChannelMessage(card))
    plain = format_message(ChannelMessage(card, retry_state={"degraded": 2}))
    request = format_request(APP, ChannelMessage(card, key="k"))[2]
    of_app = json.loads(request["content"])
    assert feishu_cards.check_version_1(custom["card"]) == feishu_cards.check_version_2(of_app) == ""
    assert max(map(message_size, (custom, plain, request))) <= SIZE_LIMIT
    return custom["card"], of_app, plain["content"]["text"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("state", OF_PROBLEMS)
def test_every_state_in_both_languages(inventory: Inventory, state: NotificationState, language: str) -> None:
    contents = sample(
        state,
        inventory,
        decision=("wait", "storm", "3 of 4"),
        details={"action": 3, "kind": "recreate", "output": "a\nb", "probe": "x"},
    )
    custom, of_app, plain = both([contents], language)
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
            "**Probe** timeout: no answer within 10 s\n**Summary** no answer\n**Attempts used** 2 of 3\n"
            "**Attempt** 03:00:00 restart: failed: exit status 1\n**Attempt** 03:00:00 restart: succeeded, up after 3 s (ann)\n"
            "**Not restarted** too many services fail at once: check the network and the exporter: 3 of 4\n**On call** Ann"
        ),
    ],
    "zh": [
        "服务故障: Web page",
        (
            "**服务** Web page (web)\n**主机** h\n**级别** 严重\n**开始时间** 2026-11-24 03:00:00 CST\n"
            "**探测** 超时：“no answer within 10 s”\n**摘要** no answer\n**已用次数** 2/3\n"
            "**处理记录** 03:00:00 重启: 失败: “exit status 1”\n**处理记录** 03:00:00 重启: 成功, 3 秒后恢复 (ann)\n"
            "**未重启** 同时故障的服务过多：请检查网络和 exporter: “3 of 4”\n**值班** Ann"
        ),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_card_in_full(inventory: Inventory, language: str) -> None:
    _, of_app, _ = both([sample("down", inventory, decision=("wait", "storm", "3 of 4"))], language)
    assert feishu_cards.extract_text(of_app) == "\n".join(TEXTS[language])


@pytest.mark.parametrize(
    ("state", "colour", "title"),
    [
        ("down", "red", "Service down: Web page"),
        ("acting", "yellow", "Restarting: Web page (attempt 2 of 3)"),
        ("recovered", "green", "Recovered: Web page (was down 41 s)"),
        ("person_needed", "carmine", "A person is needed: Web page"),
        ("alert", "red", "Alert: ServiceDown · Web page"),
        ("alert_over", "green", "Alert resolved: ServiceDown · Web page"),
    ],
)
def test_title_and_colour(inventory: Inventory, state: NotificationState, colour: str, title: str) -> None:
    custom, _, _ = both([sample(state, inventory)], "en")
    assert (custom["header"]["template"], custom["header"]["title"]["content"]) == (colour, title)


def test_colour_follows_severity(inventory: Inventory) -> None:
    colours = [
        both([sample("down", inventory, severity=each)], "en")[0]["header"]["template"]
        for each in ("critical", "warning", "info")
    ]
    assert colours == ["red", "orange", "blue"]


def test_buttons(inventory: Inventory) -> None:
    custom, of_app, _ = both([sample("down", inventory)], "en")
    links = {each["text"]["content"]: each["url"] for each in feishu_cards.find_buttons(custom)}
    assert links == {
        "Grafana": "http://g:3000/d/defib-service?var-service=web",
        "Runbook": "https://wiki/web",
        "Logs": "http://defib:9095/services/web/logs",
        "Console": "http://defib:9095/incidents/7",
        "Silence …": "http://am:9093/#/silences/new?filter=%7Bservice%3D%22web%22%7D",
    }
    first = feishu_cards.find_buttons(of_app)[0]
    assert first["behaviors"] == [{"type": "callback", "value": {"answer": "acknowledge", "incident": 7}}]
    assert len(feishu_cards.find_buttons(of_app)) == 6


NO_LINKS = [
    "javascript:alert(1)", "JavaScript:alert(1)//https://wiki/", "file:///etc/passwd", "data:text/html,x", "//wiki/x",
    "http://x/" + "a" * 5000, "http://x/\u202e", "http://x/\n", "https://", "https:///x", "https://wiki@other.example/",
    "lark://x", "vbscript:x", " https://wiki/x", "https://wiki/ x",
]  # fmt: skip


def test_links_are_only_http(inventory: Inventory) -> None:
    for url in NO_LINKS:
        assert "runbook" not in build_links(inventory, None, {}, {"runbook_url": url}, None)
        service = inventory.services["web"].model_copy(update={"runbook": url})
        assert "runbook" not in build_links(inventory, service, {}, {}, None)
        annotations = {"runbook_url": url, "dashboardURL": url, "summary": url}
        assert annotations_in_language(annotations, "en") == {"summary": url}
    for url in ("http://wiki/x", "HTTPS://wiki/x?y=1#z", "https://[2001:db8::1]:8443/x"):
        assert build_links(inventory, None, {}, {"runbook_url": url}, None)["runbook"] == url
        assert annotations_in_language({"runbook_url": url}, "en") == {"runbook_url": url}
    hostile = {"a": 'x"}\n\\', "service": "gone"}
    assert "%5Cn%5C%5C%22%2C" in build_links(inventory, None, hostile, {}, None)["silence"]


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
    assert mentioned(sample("person_needed", inventory, severity=severity), mention) == called


def mentioned(notification: Notification, mention: Any) -> list[str]:
    return list(render_card([notification], "one", LANGUAGES["en"], bot(mention)).mentions)


@pytest.mark.parametrize("state", OF_PROBLEMS)
def test_all_are_mentioned_only_if_a_person_is_needed_and_nobody_if_quiet(
    inventory: Inventory, state: NotificationState
) -> None:
    mention = {"critical": ["all", "on_call", "ou_bob"]}
    some = ["ou_ann", "ou_bob"] if state in MENTIONING else []
    assert mentioned(sample(state, inventory), mention) == (["all", *some] if state == "person_needed" else some)
    assert mentioned(sample(state, inventory, quiet=True), mention) == []


def test_nobody_is_mentioned_after_an_acknowledgement(inventory: Inventory) -> None:
    _, of_app, _ = both([sample("reminder", inventory, acknowledged=("ann", AT))], "en")
    assert "<at" not in feishu_cards.extract_text(of_app)
    assert "Acknowledged by** ann, 2026-11-24" in feishu_cards.extract_text(of_app)


def test_a_group_shows_common_labels_once(inventory: Inventory) -> None:
    contents = [
        sample(
            "alert",
            inventory,
            service=None,
            labels={"alertname": "DiskFull", "job": "node", "instance": f"n{n}"},
            annotations={"summary": f"disk {n}"},
        )
        for n in range(3)
    ]
    contents[1] = replace(contents[1], state="alert_over")
    custom, _, plain = both(contents, "en", "group")
    text = feishu_cards.extract_text(custom)
    assert custom["header"]["title"]["content"] == "Alert × 2 of 3: DiskFull"
    assert text.count("node") == 1
    assert all(f"n{n}" in text and f"disk {n}" in text for n in range(3))
    assert "**Alert resolved** 1 of 3" in text
    assert "instance: n2" in plain


def test_firing_alerts_are_first_in_a_group_and_in_its_title(inventory: Inventory) -> None:
    def contents(over: int) -> list[Notification]:
        labels = [{"alertname": "DiskFull", "instance": f"n{n}"} for n in range(200)]
        states: list[NotificationState] = ["alert_over" if n < over else "alert" for n in range(200)]
        return [sample(state, inventory, service=None, labels=each) for state, each in zip(states, labels, strict=True)]

    custom, _, _ = both(contents(199), "en", "group")
    assert custom["header"] == {
        "template": "red",
        "title": {"tag": "plain_text", "content": "Alert × 1 of 200: DiskFull"},
    }
    assert "n199" in feishu_cards.extract_text(custom)
    custom, of_app, _ = both(contents(200), "en", "group")
    assert custom["header"] == {
        "template": "green",
        "title": {"tag": "plain_text", "content": "Alert resolved × 200: DiskFull"},
    }
    assert "<at" not in feishu_cards.extract_text(of_app)


def test_a_group_has_one_acknowledge_button(inventory: Inventory) -> None:
    contents = [sample("down", inventory, buttons={"acknowledge": {"incident": n}}) for n in (1, 2)]
    card = render_card(contents, "summary", LANGUAGES["en"], APP, first_id=5, created_at=9.5)
    assert [(each.text, each.value or each.url) for each in card.buttons] == [
        ("Acknowledge", {"answer": "acknowledge", "notification": 5, "since": 9}), ("Runbook", "https://wiki/web"), ("Console", "http://defib:9095/"),
    ]  # fmt: skip
    contents = [replace(each, buttons={}) for each in contents]
    assert render_card(contents, "summary", LANGUAGES["en"], APP, first_id=5).buttons[0].text == "Runbook"


def test_ended_problems_mention_nobody_and_have_no_silence_link(inventory: Inventory) -> None:
    late = sample("person_needed", inventory, duration=30.0)
    assert mentioned(late, {"critical": ["all"]}) == []
    custom, _, _ = both([sample("recovered", inventory)], "en")
    assert [each["text"]["content"] for each in feishu_cards.find_buttons(custom)] == [
        "Grafana",
        "Runbook",
        "Logs",
        "Console",
    ]
    assert "**Summary**" not in feishu_cards.extract_text(custom)  # the alert has ended


def test_a_title_cannot_mention(inventory: Inventory) -> None:
    _, of_app, _ = both(
        [sample("alert", inventory, service=None, labels={"alertname": "<at id=all></at>"})], "en", mention={}
    )
    assert of_app["header"]["title"]["content"] == "Alert: ‹at id=all>‹/at>"


def test_a_summary_lists_what_fits_and_counts_the_rest(inventory: Inventory) -> None:
    contents = [
        sample("down", inventory, service=None, labels={"service": f"service-{n}", "host": f"h{n % 4}"})
        for n in range(1000)
    ]
    custom, of_app, _ = both(contents, "en", "summary")
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
def test_texts_from_outside_are_never_markup(
    inventory: Inventory, state: NotificationState, text: str, language: str
) -> None:
    labels = {"alertname": text, "service": text, "host": text, "severity": text, "x": text, text: "y"}
    details = {"probe": text, "why": text, "output": text, "who": text, "kind": text, "action": 1}
    contents = sample(
        state, inventory, service=None, labels=labels, annotations={"summary": text, text: text}, details=details,
        decision=("wait", text, text), attempts=[Attempt(text, text, text, text, AT, 1.0, text)], firing=[text, "b"], acknowledged=(text, AT),
    )  # fmt: skip
    custom, of_app, plain = both([contents], language, mention={})
    assert forged({"elements": custom["elements"], "body": of_app["body"]["elements"][0]}) == []
    assert "<" not in plain
    for form in ("group", "summary"):
        custom, of_app, _ = both([contents, contents], language, form, mention={})
        assert forged({"elements": custom["elements"], "body": of_app["body"]["elements"][0]}) == []


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=30), st.text(max_size=300), max_size=8), st.sampled_from(["en", "zh"]))
def test_labels_are_shown_literally(labels: dict[str, str], language: str) -> None:
    contents = Notification("alert", "info", {"alertname": "A", **labels}, labels, None, AT, None, 1.0, [], {})
    card = render_card([contents], "one", LANGUAGES[language])
    lines = [format_line(line) for line in card.lines]
    assert not any(set(line) & set("<>[]()\\_~`") for line in lines)
    # Labels are bold, and there is no other markup.
    for line in lines:
        assert line.count("**") == 2
        assert line.replace("**", "").count("*") == 0
    custom = format_message(ChannelMessage(card))["card"]
    assert feishu_cards.check_version_1(custom) == ""
    assert message_size(custom) <= SIZE_LIMIT


@given(st.text())
def test_escaped_text_has_no_markup_left(text: str) -> None:
    assert not set(escape_markup(text)) & set("*<>[]()\\_~`")


def test_both_languages_have_the_same_words() -> None:
    def shape(words: Any) -> Any:
        return {key: shape(value) for key, value in words.items()} if isinstance(words, dict) else type(words)

    english, chinese = LANGUAGES["en"].words, LANGUAGES["zh"].words
    assert shape(english) == shape(chinese)
    assert set(english["reasons"]) == {*get_args(Refusal), *get_args(Wait), *get_args(Blocked)}
    assert set(english["states"]) == set(STATES)
    assert set(english["answers"]) == set(get_args(ButtonAction))


def test_plain_text_is_within_the_size_limit(inventory: Inventory) -> None:
    labels = {f"label{n}": "\U0001f600" * 600 for n in range(60)}
    contents = [sample("alert", inventory, service=None, labels=labels)] * 3
    _, _, plain = both(contents, "zh", "group")
    assert len(plain.encode()) < SIZE_LIMIT


def test_durations() -> None:
    words = LANGUAGES["en"].words
    texts = [format_duration(words, seconds) for seconds in (0.2, 41.4, 61, 3599, 7260, 90000, -5)]
    assert texts == ["0.2 s", "41 s", "1 min 1 s", "59 min 59 s", "2 h 1 min", "1 d 1 h", "0 s"]


def test_custom_templates_replace_the_shipped_ones(inventory: Inventory, tmp_path: Path) -> None:
    (tmp_path / "title.j2").write_text("[ops] {% include 'defib/title.j2' %}")
    (tmp_path / "card.j2").write_text(
        "{{ bold('Rack') }} {{ story.labels.rack }}\n{% include 'defib/card.j2' %}\n{{ story.service.id }}"
    )
    own = Templates("en", tmp_path)
    card = render_card([sample("down", inventory, labels={"rack": "<a3>"})], "one", own)
    assert card.title == "[ops] Service down: Web page"
    assert format_line(card.lines[0]) == "**Rack** &#60;a3&#62;"
    assert card.lines[-1].plain == "web"
    assert card.lines[0].plain == "Rack: <a3>"


def test_templates_with_the_former_names_still_work(inventory: Inventory, tmp_path: Path) -> None:
    (tmp_path / "card.j2").write_text(
        "{{ story.facts.probe }} {{ story.lasted }} {{ story.over }} {{ stories | length }} **[wiki](https://wiki)**"
    )
    (tmp_path / "group.j2").write_text(
        "{% for story in stories %}{% include 'defib/card.j2' %}{% endfor %}{{ counted(stories)[0][1] }}"
    )
    own = Templates("en", tmp_path)
    card = render_card([sample("recovered", inventory)], "one", own)
    # Markup of the template's own text is not escaped.
    assert format_line(card.lines[0]) == "timeout: no answer within 10 s 41.2 True 1 **[wiki](https://wiki)**"
    services = [sample("alert", inventory, service=None, labels={"host": f"h{n}"}) for n in range(3)]
    lines = [line.plain for line in render_card(services, "group", own).lines]
    assert [line for line in lines if line.startswith("Host")] == ["Host: h0", "Host: h1", "Host: h2"]
    assert lines[-1] == "3"


def test_annotations_are_in_the_configured_language() -> None:
    annotations = {"summary": "down", "summary_zh": "不可用", "description": "why", "runbook_url": "docs/alerts.md#x"}
    plain = {name: annotations[name] for name in ("description", "runbook_url")}
    assert annotations_in_language(annotations, "en") == {**plain, "summary": "down"}
    assert annotations_in_language(annotations, "zh") == {**plain, "summary": "不可用"}


@pytest.mark.parametrize(("language", "page"), [("en", "alerts.md"), ("zh", "zh/alerts.md")])
def test_runbooks_of_the_shipped_rules_link_to_the_documentation(tmp_path: Path, language: str, page: str) -> None:
    written = {"notify": {"language": language, "links": {"docs": "https://git.example/defib/docs/"}}}
    ours = {"runbook_url": "docs/alerts.md#hostdown"}
    links = build_links(inventory_of(tmp_path / "a", written).inventory, None, {}, ours, None)
    assert links["runbook"] == f"https://git.example/defib/docs/{page}#hostdown"
    assert (Path(__file__).parents[2] / "docs" / page).exists()
    assert "runbook" not in build_links(inventory_of(tmp_path / "b", {}).inventory, None, {}, ours, None)


# The details of every event, as the record holds them.
EVENTS: dict[TimelineEvent, tuple[dict[str, Any], str]] = {
    "incident_opened": ({"after": 6}, "Incident opened; incident 6 was closed while an alert was firing"),
    "incident_closed": ({"state": "recovered", "by": "defib"}, "Incident closed: Recovered (by: restart by Defib)"),
    "alert_firing": ({"alert": "ServiceDown", "starts_at": "x"}, "Alert ServiceDown is firing"),
    "alert_resolved": (
        {"alert": "ServiceDown", "by": "alertmanager", "ends_at": "x"}, "Alert ServiceDown was resolved (by alertmanager)"
    ),
    "alert_end_held": (
        {"alert": "DiskFull", "by": "alertmanager", "ends_at": "x"},
        "Alert DiskFull was resolved (by alertmanager); to be confirmed once Prometheus is seen to work",
    ),
    "decision": (
        {"verb": "wait", "reason": "target-busy", "detail": ""},
        "Decision: wait (target-busy): another action on it is in progress",
    ),
    "caution": ({"action": 3, "message": "no sudo"}, "Could not be checked before action 3: no sudo"),
    "action_queued": (
        {"action": 3, "kind": "recreate", "by": "alert", "who": "ServiceDown"},
        "Action 3 (recreate) waits for approval; requested by ServiceDown",
    ),
    "action_approved": ({"action": 3, "by": "ann"}, "Action 3 was approved by ann"),
    "action_cancelled": ({"action": 3}, "Action 3 was cancelled"),
    "action_started": (
        {"action": 3, "kind": "restart", "by": "person", "who": "ann", "overruled": ["storm", "maintenance"]},
        "Action 3 (restart) started; requested by ann, overruling storm, maintenance",
    ),
    "command_ended": (
        {"action": 3, "outcome": "failed", "exit_status": 0, "why": "no such unit"},
        "Command of action 3: failed, exit status 0: no such unit",
    ),
    "service_up": ({"action": 3}, "First successful probe after action 3"),
    "alert_over": ({"action": 3}, "The alert was resolved after action 3"),
    "action_ended": ({"action": 3, "state": "succeeded", "why": ""}, "Action 3 ended: succeeded"),
    "attempts_reset": ({"action": 3, "kind": "reset", "by": "person", "who": "ann"}, "Attempts were reset by ann"),
    "person_needed": (
        {"reason": "attempts-used-up"}, "Automation ended, a person is needed: all attempts are used up"
    ),
    "acknowledged": ({"by": "ann"}, "Acknowledged by ann"),
    "silenced": ({"by": "ann", "silence": "x"}, "Silenced in Alertmanager by ann"),
    "note": ({"by": "ann", "text": "the disk was full"}, "Note by ann: the disk was full"),
}  # fmt: skip


def test_every_event_has_a_sentence_in_both_languages() -> None:
    events = set(get_args(TimelineEvent))
    assert set(LANGUAGES["en"].words["events"]) == set(LANGUAGES["zh"].words["events"]) == set(EVENTS) == events
    for event, (detail, sentence) in EVENTS.items():
        assert describe_event(LANGUAGES["en"].words, event, detail) == sentence
        chinese = describe_event(LANGUAGES["zh"].words, event, detail)
        assert re.search("[\u4e00-\u9fff]", chinese)
        assert not set("{}") & set(chinese)


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_without_details_has_a_sentence_too(event: TimelineEvent) -> None:
    """Private texts are removed for callers who are not authenticated, and older records have fewer details."""
    for templates in LANGUAGES.values():
        sentence = describe_event(templates.words, event, dict.fromkeys(EVENTS[event][0]))
        assert "None" not in sentence
        assert "{" not in sentence


def test_an_unknown_event_is_shown_by_its_name() -> None:
    assert describe_event(LANGUAGES["en"].words, "something_else", {"by": "{0}"}) == "something_else"


@pytest.mark.parametrize(("language", "kind"), [("en", "restart component {0}"), ("zh", "重启组件 {0}")])
def test_an_action_on_a_component_names_it(inventory: Inventory, language: str, kind: str) -> None:
    attempt = Attempt("restart", "succeeded", "", "ann", AT, 3.0, "{0}")
    _, of_app, _ = both([sample("watched", inventory, attempts=[attempt])], language)
    assert f"03:00:00 {kind}: " in feishu_cards.extract_text(of_app)
    detail = {"action": 3, "kind": "restart", "component": "{0}", "by": "person", "who": "ann"}
    assert kind in describe_event(LANGUAGES[language].words, "action_started", detail)


def test_a_decision_shows_its_name_in_both_languages() -> None:
    detail = {"verb": "wait", "reason": "storm", "detail": "3 of 4"}
    assert describe_event(LANGUAGES["zh"].words, "decision", detail) == (
        "决策：wait（storm）：同时故障的服务过多：请检查网络和 exporter：3 of 4"
    )
    assert describe_event(LANGUAGES["en"].words, "decision", {"verb": "act", "reason": None}) == "Decision: act"


HOST_ALERT_TEXTS = {
    "en": {
        "down": (
            "Alert: HostDiskFull · gpu-1",
            "**Not run** too many services fail at once: check the network and the exporter: 3 of 4",
        ),
        "acting": ("Runbook in progress: HostDiskFull · gpu-1 (attempt 1 of 1)", "**Runs used** 1 of 1"),
        "approval": (
            "Waiting for approval: HostDiskFull · gpu-1",
            "**Step** runbook prune\n**Command** docker image prune\n**To approve** defib approve 3",
        ),
        "could_not_restart": (
            "Runbook failed: HostDiskFull · gpu-1", "**Run** 03:00:00 runbook prune: failed: HostDiskFull was not resolved within 900 s"
        ),
        "recovered": ("Alert resolved: HostDiskFull · gpu-1 (fired for 41 s)", "**Resolved by** runbook of Defib"),
    },
    "zh": {
        "down": ("告警: HostDiskFull · gpu-1", "**未执行** 同时故障的服务过多：请检查网络和 exporter: “3 of 4”"),
        "acting": ("正在执行预案: HostDiskFull · gpu-1 （第 1/1 次）", "**已执行次数** 1/1"),
        "approval": (
            "等待批准: HostDiskFull · gpu-1",
            "**步骤** 预案 prune\n**命令** docker image prune\n**批准命令** defib approve 3",
        ),
        "could_not_restart": ("预案未成功: HostDiskFull · gpu-1", "**执行记录** 03:00:00 预案 prune: 失败: HostDiskFull 在 900 秒内未解除"),
        "recovered": ("告警已解除: HostDiskFull · gpu-1 （持续 41 秒）", "**解除方式** 由 Defib 执行预案"),
    },
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("state", HOST_ALERT_TEXTS["en"])
def test_cards_of_an_alert_with_runbooks(inventory: Inventory, state: NotificationState, language: str) -> None:
    contents = sample(
        state, inventory, service=None, labels={"alertname": "HostDiskFull", "host": "gpu-1", "severity": "critical"},
        is_of_host_alert=True, firing=["HostDiskFull"], attempt=(1, 1), decision=("wait", "storm", "3 of 4"),
        details={"action": 3, "kind": "runbook prune", "command": "docker image prune"},
        recovered_by="defib" if state == "recovered" else "",
        attempts=[Attempt("runbook prune", "failed", "HostDiskFull was not resolved within 900 s", "", AT, None)],
    )  # fmt: skip
    custom, of_app, plain = both([contents], language)
    title, lines = HOST_ALERT_TEXTS[language][state]
    for card in (custom, of_app):
        assert card["header"]["title"]["content"] == title
        assert lines in feishu_cards.extract_text(card)
    assert title in plain
    group = render_card([contents, contents], "summary", LANGUAGES[language], APP)
    assert group.title.startswith(title.partition(":")[0])


@pytest.mark.parametrize(
    ("text", "chinese"),
    [
        ("runbook prune", "预案 prune"),
        ("runbook prune exited 3", "预案 prune 的命令退出码 3"),
        ("runbook a: 1 of 1", "预案 a：1/1"),
        ("runbook a: 1 of 1, runbook b-2: 0 of 2, runbook c: 3 of 3", "预案 a：1/1，预案 b-2：0/2，预案 c：3/3"),
        ("runbook of somebody else", "“runbook of somebody else”"),
    ],
)
def test_what_the_record_says_of_runbooks_is_translated(text: str, chinese: str) -> None:
    assert translate(LANGUAGES["zh"].words, text) == chinese
    assert translate(LANGUAGES["en"].words, text) == text
