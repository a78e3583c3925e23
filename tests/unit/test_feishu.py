import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model import Inventory
from remediator.notices.cards import escape, message
from remediator.notices.feishu import BODY_LIMIT, read, sign
from remediator.notices.outbox import Notice
from tests.support import inventory_of


def test_the_signature_is_the_documented_one() -> None:
    assert sign("test-secret", 1599360473) == "wSds2BzzFIIGf/WrhUO+NI1q/9j+FRJd3JNHKAq0NZY="


OK = b'{"StatusCode":0,"StatusMessage":"success","code":0,"data":{},"msg":"success"}'


@pytest.mark.parametrize(
    ("status", "headers", "body", "what"),
    [
        (200, {}, OK, "sent"),
        (200, {}, b'{"code":11232,"msg":"frequency limited"}', "again"),
        (429, {}, b"", "again"),
        (400, {"x-ogw-ratelimit-reset": "7"}, b'{"code":99991400}', "again"),
        (200, {}, b'{"code":230020}', "again"),
        (500, {}, OK, "again"),
        (200, {}, b"<html>", "again"),
        (200, {}, b"{}", "again"),
        (200, {}, b'{"StatusCode":0}', "again"),
        (200, {}, b'{"code":true}', "again"),
        (200, {}, b'{"code":19021,"msg":"sign match fail"}', "sign again"),
        (200, {}, b'{"code":9499,"msg":"Bad Request"}', "degrade"),
        (200, {}, b'{"code":11246}', "degrade"),
        (200, {}, b'{"code":19001}', "dead"),
        (200, {}, b'{"code":19024}', "dead"),
        (400, {}, b'{"code":19002}', "dead"),
    ],
)
def test_what_an_answer_means(status: int, headers: dict[str, str], body: bytes, what: str) -> None:
    answer = read(status, headers, body)
    assert answer.what == what
    assert answer.after == (7.0 if headers else None)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    service = {"name": "Web page", "host": "h", "probe": {"http": {"url": "http://h/"}}, "runbook": "https://wiki/web"}
    written = {"hosts": {"h": {"address": "h"}}, "services": {"web": service}, "notify": {"language": "en"}}
    return inventory_of(tmp_path_factory.mktemp("config"), written).inventory


def notice(kind: str, **content: Any) -> Notice:
    return Notice(1, kind, "critical", 1, {"labels": {"service": "web", "alertname": "ServiceDown"}, **content}, 1e9, 0)


@pytest.mark.parametrize(
    ("kind", "colour", "title"),
    [
        ("down", "red", "Service down: Web page"),
        ("restarted", "orange", "Restarted, being watched: Web page"),
        ("could_not_restart", "red", "Could not restart: Web page"),
        ("recovered", "green", "Recovered: Web page"),
    ],
)
def test_cards(inventory: Inventory, kind: str, colour: str, title: str) -> None:
    made = message(notice(kind), inventory, ["all"])
    header = made["card"]["header"]
    assert (header["template"], header["title"]["content"]) == (colour, title)
    called = "<at id=all></at>" in json.dumps(made)
    assert called is (kind in ("down", "could_not_restart"))
    assert made["card"]["elements"][-1]["actions"][0]["url"] == "https://wiki/web"


HOSTILE = [
    "<at id=all></at>",
    "[x](javascript:alert(1))",
    "**bold** `code` ~no~",
    'a\\b"c\nd\0e',
    "\u202eevil",
    "{{x}}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_outside_is_markup(inventory: Inventory, text: str) -> None:
    labels = {"alertname": text, "service": text, "x": text}
    made = message(
        Notice(1, "alert", "info", None, {"labels": labels, "annotations": {"y": text}}, 1e9, 0), inventory, []
    )
    shown = json.dumps(made["card"]["elements"], ensure_ascii=False)
    assert "<at" not in shown
    assert "](" not in shown
    assert "\u202e" not in shown


@given(st.text())
def test_escaped_text_has_no_markup_left(text: str) -> None:
    assert not set(escape(text)) & set("*<>[]()\\_~`")


@pytest.mark.parametrize("character", ["x", "字", "*", "\U0001f600"])
def test_no_message_is_larger_than_feishu_takes(inventory: Inventory, character: str) -> None:
    labels = {f"label{n}": character * 50_000 for n in range(40)}
    for plain in (False, True):
        content = {"labels": labels, "annotations": labels, "plain": plain}
        made = message(Notice(1, "alert", "info", None, content, 1e9, 0), inventory, ["all"])
        assert len(json.dumps(made, ensure_ascii=False).encode()) < BODY_LIMIT - 200


def test_a_degraded_message_calls_nobody(inventory: Inventory) -> None:
    made = message(notice("down", plain=True, annotations={"x": '<at user_id="all"></at>'}), inventory, ["all"])
    assert made["msg_type"] == "text"
    assert "<" not in made["content"]["text"]


def test_captured_words_exist_in_both_languages() -> None:
    from remediator.notices.cards import _WORDS  # noqa: PLC0415

    assert _WORDS["zh"].keys() == _WORDS["en"].keys()
