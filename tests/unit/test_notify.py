"""Who hears of what."""

from pathlib import Path
from typing import Any

import pytest

from fleet.inventory.notify import Notify
from tests.support import inventory_of, load_problems, write

A, B, C = ({"feishu": {"webhook": f"http://f/{name}"}} for name in "abc")
CRITICAL = {"severity": "critical", "team": "docs"}


def notify(folder: Path, *routes: dict[str, Any], **more: Any) -> Notify:
    written = {"channels": {"a": A, "b": B, "c": C, "also_a": A}, "routes": list(routes), **more}
    return inventory_of(folder, {"notify": written}).inventory.notify


def test_the_first_route_wins_unless_it_continues(tmp_path: Path) -> None:
    told = notify(tmp_path, {"match": {"team": ["docs", "web"]}, "channels": ["a"], "continue": True},
                  {"match": {"severity": "critical"}, "channels": ["b", "a"]}, {"channels": ["c"]})  # fmt: skip
    assert told.channels_for(CRITICAL, "down") == ["a", "b"]
    assert told.channels_for({"team": "web"}, "down") == ["a", "c"]
    assert told.channels_for({}, "alert") == ["c"]


def test_states_choose_routes(tmp_path: Path) -> None:
    told = notify(tmp_path, {"states": ["person_needed"], "channels": ["b"], "continue": True},
                  {"states": ["down", "recovered"], "channels": ["a"], "continue": True}, {"channels": ["c"]})  # fmt: skip
    assert told.channels_for(CRITICAL, "down") == ["a", "c"]
    # Those told of the beginning hear how it goes on, but for what their route leaves out.
    assert told.follow_up_channels(["a", "c"], CRITICAL, "person_needed") == ["c", "b"]
    assert told.follow_up_channels(["a", "c"], CRITICAL, "recovered") == ["a", "c"]
    # Who was told by a route that is there no more, or by escalation, hears the end.
    assert told.follow_up_channels(["b"], CRITICAL, "recovered") == ["b", "a"]


def test_a_state_s_former_name_is_taken(tmp_path: Path) -> None:
    told = notify(tmp_path, {"states": ["gave_up"], "channels": ["b"]})
    assert told.routes[0].states == ["person_needed"]
    assert told.channels_for({}, "person_needed") == ["b"]


APP = {"app_id": "cli_x", "app_secret": "s"}


def test_a_place_is_told_once_however_many_channels_and_routes_lead_there(tmp_path: Path) -> None:
    channels = {
        "one": A, "again": {"feishu": {**A["feishu"], "secret": "s"}}, "other": B,
        "chat": {"feishu_app": {**APP, "chat_id": "oc_x"}}, "same": {"feishu_app": {**APP, "chat_id": "oc_x"}},
        "person": {"feishu_app": {**APP, "open_id": "ou_x"}},
    }  # fmt: skip
    told = notify(tmp_path, {"channels": ["one", "chat"], "continue": True},
                  {"channels": ["again", "one", "same", "person", "other"]}, channels=channels)  # fmt: skip
    assert told.channels_for({}, "automation_on") == ["one", "chat", "person", "other"]
    assert told.follow_up_channels(["again"], {}, "recovered") == ["again"]


def test_reminders_are_as_often_as_the_channel_s_route_says(tmp_path: Path) -> None:
    told = notify(tmp_path, {"states": ["person_needed"], "channels": ["a"], "remind": "5m", "continue": True},
                  {"channels": ["b"], "remind": "1h", "continue": True}, {"channels": ["c"]})  # fmt: skip
    assert [told.reminder_interval(name, {}, "person_needed", 7.0) for name in "abc"] == [300.0, 3600.0, 7.0]


def test_on_call_is_who_the_routes_name(tmp_path: Path) -> None:
    people = {"ann": {"open_id": "ou_a", "name": "安"}, "bob": {"open_id": "ou_b"}}
    told = notify(tmp_path, {"match": {"team": "docs"}, "channels": ["a"], "on_call": ["ann"]},
                  {"channels": ["b"], "on_call": ["bob"]}, people=people)  # fmt: skip
    assert [person.open_id for person in told.on_call(CRITICAL, "down", 0.0)] == ["ou_a"]
    assert [person.open_id for person in told.on_call({}, "alert", 0.0)] == ["ou_b"]
    found = told.person("ou_a")
    assert found is not None
    assert found[0] == "ann"
    assert told.person("ou_c") is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("routes: [{channels: [x]}]", "there is no channel 'x'"),
        ("routes: [{channels: [], on_call: [ann]}]", "there is no person 'ann'"),
        ("routes: [{channels: [], escalate: {after: 5m, channels: [x]}}]", "there is no channel 'x'"),
        ("routes: [{channels: [], escalate: {after: 5m, channels: []}}]", "must not be empty"),
        ("routes: [{channels: [], states: [broken]}]", "must be 'down'"),
        ("people: {a: {open_id: ou_x}, b: {open_id: ou_x}}", "have the same open_id"),
        ("people: {a: {open_id: x}}", "open_id"),
        ("people: {a: {open_id: ou_x, may: [dance]}}", "'acknowledge'"),
        ("channels: {a: {feishu: {webhook: http://f/, mention: [bob]}}}", "must be all, on_call or an open_id"),
        ("channels: {a: {feishu: {webhook: http://f/, mention: {grave: [all]}}}}", "grave"),
        ("channels: {a: {feishu_app: {app_id: cli_x, app_secret: s}}}", "exactly one of chat_id, open_id, email"),
        ("channels: {a: {feishu_app: {app_id: cli_x, app_secret: s, chat_id: oc_x, email: a@b}}}", "exactly one of"),
        ("channels: {a: {feishu_app: {app_id: cli_x, app_secret: s, chat_id: y}}}", "chat_id"),
        ("templates: nowhere", "there is no directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    assert any(wrong in each for each in load_problems(write(tmp_path, a=f"notify: {{{text}}}"))), load_problems(
        tmp_path
    )
