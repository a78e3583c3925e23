"""Feishu's protocol: signatures, answers, what is sent where."""

import time
from email.utils import formatdate

import pytest

from defib.demo import feishu_cards
from remediator.notifications.channels import feishu_app
from remediator.notifications.channels.feishu import Heard, Letter, message, read, sign
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.notifications.channels.feishu_cards import SIZE_LIMIT, Button, Card, fitted, size, version_1, version_2


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
        (200, {}, b'{"code":230049}', "again"),
        (500, {}, OK, "again"),
        (500, {}, b'{"code":19001}', "again"),
        (200, {}, b"<html>", "again"),
        (200, {}, b"{}", "again"),
        (200, {}, b"[1]", "again"),
        (200, {}, b'{"StatusCode":0}', "sent"),
        (200, {}, b'{"StatusCode":0,"StatusMessage":"success"}', "sent"),
        (200, {}, b'{"StatusCode":1}', "again"),
        (200, {}, b'{"StatusCode":false}', "again"),
        (200, {}, b'{"StatusCode":0,"code":null}', "again"),
        (200, {}, b'{"StatusCode":0,"code":19001}', "dead"),
        (500, {}, b'{"StatusCode":0}', "again"),
        (200, {}, b'{"code":true}', "again"),
        (200, {}, b'{"code":"0"}', "again"),
        (200, {}, b'{"code":19021,"msg":"sign match fail"}', "sign again"),
        (200, {}, b'{"code":9499,"msg":"Bad Request"}', "degrade"),
        (200, {}, b'{"code":9499,"msg":"too many request"}', "again"),
        (200, {}, b'{"code":9499,"msg":"Too Many Requests, try later"}', "again"),
        (200, {}, b'{"code":19001,"msg":"too many request"}', "dead"),
        (200, {}, b'{"code":11246}', "degrade"),
        (200, {}, b'{"code":100290}', "degrade"),
        (400, {}, b'{"code":230025}', "degrade"),
        (400, {}, b'{"code":230099}', "degrade"),
        (200, {}, b'{"code":19001}', "dead"),
        (200, {}, b'{"code":19022}', "dead"),
        (200, {}, b'{"code":19024}', "dead"),
        (400, {}, b'{"code":19002}', "dead"),
        (400, {}, b'{"code":230002}', "dead"),
        (400, {}, b'{"code":230034}', "dead"),
        (400, {}, b'{"code":232009}', "dead"),
        (200, {}, b'{"code":10014}', "dead"),
        (400, {}, b'{"code":2200,"msg":"Internal Error"}', "unknown"),
    ],
)
def test_what_an_answer_means(status: int, headers: dict[str, str], body: bytes, what: str) -> None:
    answer = read(Heard(status, headers, body))
    assert answer.what == what
    assert answer.after == (7.0 if headers else None)


def test_an_answer_in_words() -> None:
    assert read(Heard(200, {}, b'{"code":19024}')).words == "19024: the bot wants one of its keywords in the text"
    assert read(Heard(200, {}, b'{"code":55555,"msg":"new\\n  thing"}')).words == "55555: new thing"


def test_a_refused_signature_tells_how_far_the_clocks_are_apart() -> None:
    dated = {"date": formatdate(time.time() - 7200, usegmt=True)}
    answer = read(Heard(200, dated, b'{"code":19021}'))
    assert "clock is +7200 s off" in answer.words or "clock is +7201 s off" in answer.words
    assert answer.offset is not None
    assert read(Heard(200, {"date": "nonsense"}, b'{"code":19021}')).offset is None


LINES = tuple(f"line {n}" for n in range(40))
CARD = Card(
    "title",
    "red",
    LINES,
    LINES,
    "and {0} more",
    ("all",),
    (Button("Page", "https://x/"), Button("Do", value={"answer": "acknowledge"})),
)


def test_a_custom_bot_is_sent_a_card_or_plain_text() -> None:
    whole = message(Letter(CARD))
    assert not feishu_cards.check_version_1(whole["card"])
    assert "<at id=all></at>" in whole["card"]["elements"][1]["text"]["content"]
    assert [each["text"]["content"] for each in feishu_cards.find_buttons(whole["card"])] == [
        "Page"
    ]  # it takes no answers
    calm = message(Letter(CARD, degraded=1))
    assert (calm["msg_type"], "<at" in str(calm)) == ("interactive", False)
    plain = message(Letter(CARD, degraded=2))
    assert plain["msg_type"] == "text"
    assert plain["content"]["text"].splitlines()[-1] == "and 15 more"
    assert "<" not in plain["content"]["text"]


def app(**more: str) -> FeishuAppOptions:
    return FeishuAppOptions.model_validate({"app_id": "cli_x", "app_secret": "s", **(more or {"chat_id": "oc_x"})})


def test_where_an_app_s_letters_go() -> None:
    assert feishu_app.request(app(), Letter(CARD, uuid="u"))[:2] == (
        "POST",
        "/open-apis/im/v1/messages?receive_id_type=chat_id",
    )
    _method, path, body = feishu_app.request(app(email="a@b.cn"), Letter(CARD, uuid="u"))
    assert (path, body["receive_id"], body["uuid"]) == (
        "/open-apis/im/v1/messages?receive_id_type=email",
        "a@b.cn",
        "u",
    )
    assert feishu_app.request(app(), Letter(CARD, message_id="om_1"))[:2] == ("PATCH", "/open-apis/im/v1/messages/om_1")
    _method, path, body = feishu_app.request(app(), Letter(CARD, reply_to="om_1"))
    assert (path, body["reply_in_thread"]) == ("/open-apis/im/v1/messages/om_1/reply", True)


def test_cards_of_version_2_are_taken() -> None:
    assert not feishu_cards.check_version_2(version_2(CARD))
    assert version_2(CARD)["config"]["update_multi"] is True
    assert not feishu_cards.check_version_2(version_2(CARD.plainer()))
    assert "<at" not in str(version_2(CARD.plainer()))


@pytest.mark.parametrize("character", ["x", "字", "&#42;", "\U0001f600"])
def test_what_is_too_long_is_cut_by_lines_and_counted(character: str) -> None:
    lines = tuple(character * 500 for _ in range(400))
    made = Card("t", "red", lines, lines, "… {0} more")
    for wrap in (version_1, version_2):
        fits = fitted(made, lambda card: {"card": wrap(card)})  # noqa: B023 - it is called here
        assert size(fits) <= SIZE_LIMIT
        content = str(fits)
        assert "more" in content
        assert content.count(character * 500) > SIZE_LIMIT // (len((character * 500).encode()) + 50) - 3
