"""Feishu's protocol: signatures, responses, requests."""

import time
from email.utils import formatdate
from typing import Any

import pytest

from defib.demo import feishu_cards
from remediator.notifications.cards import Button, Card, Line, Span
from remediator.notifications.channels import ChannelMessage, SendResult
from remediator.notifications.channels.feishu import compute_signature, format_message, parse_reply, plan_retry
from remediator.notifications.channels.feishu_app import FeishuAppOptions, format_request
from remediator.notifications.channels.feishu_cards import (
    SIZE_LIMIT,
    message_size,
    render_version_1,
    render_version_2,
    shorten_to_fit,
    simplify_card,
)
from remediator.notifications.channels.http import HttpReply


def test_the_signature_is_the_documented_one() -> None:
    assert compute_signature("test-secret", 1599360473) == "wSds2BzzFIIGf/WrhUO+NI1q/9j+FRJd3JNHKAq0NZY="


OK = b'{"StatusCode":0,"StatusMessage":"success","code":0,"data":{},"msg":"success"}'


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome"),
    [
        (200, {}, OK, "sent"),
        (200, {}, b'{"code":11232,"msg":"frequency limited"}', "retry"),
        (429, {}, b"", "retry"),
        (400, {"x-ogw-ratelimit-reset": "7"}, b'{"code":99991400}', "retry"),
        (200, {}, b'{"code":230020}', "retry"),
        (200, {}, b'{"code":230049}', "retry"),
        (500, {}, OK, "retry"),
        (500, {}, b'{"code":19001}', "retry"),
        (200, {}, b"<html>", "retry"),
        (200, {}, b"{}", "retry"),
        (200, {}, b"[1]", "retry"),
        (200, {}, b'{"StatusCode":0}', "sent"),
        (200, {}, b'{"StatusCode":0,"StatusMessage":"success"}', "sent"),
        (200, {}, b'{"StatusCode":1}', "retry"),
        (200, {}, b'{"StatusCode":false}', "retry"),
        (200, {}, b'{"StatusCode":0,"code":null}', "retry"),
        (200, {}, b'{"StatusCode":0,"code":19001}', "reject"),
        (500, {}, b'{"StatusCode":0}', "retry"),
        (200, {}, b'{"code":true}', "retry"),
        (200, {}, b'{"code":"0"}', "retry"),
        (200, {}, b'{"code":19021,"msg":"sign match fail"}', "resend"),
        (200, {}, b'{"code":9499,"msg":"Bad Request"}', "resend"),
        (200, {}, b'{"code":9499,"msg":"too many request"}', "retry"),
        (200, {}, b'{"code":9499,"msg":"Too Many Requests, try later"}', "retry"),
        (200, {}, b'{"code":19001,"msg":"too many request"}', "reject"),
        (200, {}, b'{"code":11246}', "resend"),
        (200, {}, b'{"code":100290}', "resend"),
        (400, {}, b'{"code":230025}', "resend"),
        (400, {}, b'{"code":230099}', "resend"),
        (200, {}, b'{"code":19001}', "reject"),
        (200, {}, b'{"code":19022}', "reject"),
        (200, {}, b'{"code":19024}', "reject"),
        (400, {}, b'{"code":19002}', "reject"),
        (400, {}, b'{"code":230002}', "reject"),
        (400, {}, b'{"code":230034}', "reject"),
        (400, {}, b'{"code":232009}', "reject"),
        (200, {}, b'{"code":10014}', "reject"),
        (400, {}, b'{"code":2200,"msg":"Internal Error"}', "unknown"),
    ],
)
def test_the_result_of_a_response(status: int, headers: dict[str, str], body: bytes, outcome: str) -> None:
    result = plan_retry(parse_reply(HttpReply(status, headers, body)), ChannelMessage(CARD))
    assert result.outcome == outcome
    assert result.retry_after == (7.0 if headers else None)


def test_the_explanation_of_a_response() -> None:
    assert (
        parse_reply(HttpReply(200, {}, b'{"code":19024}')).response
        == "19024: the bot requires one of its keywords in the text"
    )
    assert parse_reply(HttpReply(200, {}, b'{"code":55555,"msg":"new\\n  thing"}')).response == "55555: new thing"


def test_a_refused_signature_shows_the_clock_offset() -> None:
    dated = {"date": formatdate(time.time() - 7200, usegmt=True)}
    result = parse_reply(HttpReply(200, dated, b'{"code":19021}'))
    assert "clock is +7200 s off" in result.response or "clock is +7201 s off" in result.response
    assert result.clock_offset is not None
    assert parse_reply(HttpReply(200, {"date": "nonsense"}, b'{"code":19021}')).clock_offset is None


def test_a_refused_message_is_sent_once_more_in_each_simpler_form() -> None:
    def next_result(code: int, retry_state: Any) -> SendResult:
        reply = parse_reply(HttpReply(200, {}, f'{{"code":{code}}}'.encode()))
        return plan_retry(reply, ChannelMessage(CARD, retry_state=retry_state))

    without_mentions = next_result(11246, None)
    assert (without_mentions.outcome, next_result(11246, without_mentions.retry_state).outcome) == ("resend", "reject")
    plain = next_result(9499, without_mentions.retry_state)
    assert (plain.outcome, next_result(9499, plain.retry_state).outcome) == ("resend", "reject")
    signed_again = next_result(19021, None)
    assert (signed_again.outcome, next_result(19021, signed_again.retry_state).outcome) == ("resend", "reject")


def test_only_a_message_that_is_still_being_sent_does_not_pause_the_bot() -> None:
    codes = (230049, 230020, 11232)
    results = [parse_reply(HttpReply(200, {}, f'{{"code":{code}}}'.encode())) for code in codes]
    assert [result.pause_channel for result in results] == [False, True, True]


CARD = Card(
    "title",
    "down",
    "critical",
    "red",
    tuple(Line.of(f"line {n}") for n in range(40)),
    "and {0} more",
    ("all",),
    (Button("Page", "https://x/"), Button("Do", value={"answer": "acknowledge"})),
)


def test_a_custom_bot_is_sent_a_card_or_plain_text() -> None:
    body = format_message(ChannelMessage(CARD))
    assert not feishu_cards.check_version_1(body["card"])
    assert "<at id=all></at>" in body["card"]["elements"][1]["text"]["content"]
    assert [each["text"]["content"] for each in feishu_cards.find_buttons(body["card"])] == ["Page"]  # only links
    without_mentions = format_message(ChannelMessage(CARD, retry_state={"degraded": 1}))
    assert (without_mentions["msg_type"], "<at" in str(without_mentions)) == ("interactive", False)
    plain = format_message(ChannelMessage(CARD, retry_state={"degraded": 2}))
    assert plain["msg_type"] == "text"
    assert plain["content"]["text"].splitlines()[-1] == "and 15 more"
    assert "<" not in plain["content"]["text"]


def app(**more: str) -> FeishuAppOptions:
    return FeishuAppOptions.model_validate({"app_id": "cli_x", "app_secret": "s", **(more or {"chat_id": "oc_x"})})


def test_the_requests_of_an_app() -> None:
    assert format_request(app(), ChannelMessage(CARD, key="k"))[:2] == (
        "POST",
        "/open-apis/im/v1/messages?receive_id_type=chat_id",
    )
    _method, path, body = format_request(app(email="a@b.cn"), ChannelMessage(CARD, key="k"))
    assert (path, body["receive_id"]) == ("/open-apis/im/v1/messages?receive_id_type=email", "a@b.cn")
    again, plain = (
        format_request(app(), ChannelMessage(CARD, key="k", retry_state=each))[2] for each in ({}, {"degraded": 2})
    )
    assert again["uuid"] == body["uuid"] != plain["uuid"]
    assert len(body["uuid"]) <= 50
    assert format_request(app(), ChannelMessage(CARD, update_id="om_1"))[:2] == (
        "PATCH",
        "/open-apis/im/v1/messages/om_1",
    )
    _method, path, body = format_request(app(), ChannelMessage(CARD, reply_to="om_1"))
    assert (path, body["reply_in_thread"]) == ("/open-apis/im/v1/messages/om_1/reply", True)


def test_cards_of_version_2_are_valid() -> None:
    assert not feishu_cards.check_version_2(render_version_2(CARD))
    assert render_version_2(CARD)["config"]["update_multi"] is True
    assert not feishu_cards.check_version_2(render_version_2(simplify_card(CARD)))
    assert "<at" not in str(render_version_2(simplify_card(CARD)))


@pytest.mark.parametrize("character", ["x", "字", "&#42;", "\U0001f600"])
def test_long_cards_are_cut_by_lines_and_counted(character: str) -> None:
    # Template text is not escaped.
    lines = tuple(Line((Span("template", character * 500),)) for _ in range(400))
    card = Card("t", "down", "critical", "red", lines, "… {0} more")
    for wrap in (render_version_1, render_version_2):
        fits = shorten_to_fit(card, lambda shown: {"card": wrap(shown)})  # noqa: B023 - called in this iteration
        assert message_size(fits) <= SIZE_LIMIT
        content = str(fits)
        assert "more" in content
        assert content.count(character * 500) > SIZE_LIMIT // (len((character * 500).encode()) + 50) - 3
