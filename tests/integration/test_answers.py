"""Pressed buttons with a real remediator, over callbacks and a long connection."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT, ENCRYPT_KEY, VERIFICATION_TOKEN, Message
from tests.integration.long_connection import TICKET, LongConnection
from tests.integration.loop import TOKEN, Loop, alert, delivery
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")
UNDER_WAY = "In progress; the card will show the result"  # what is answered in time, whatever it takes
BEGUN = ("Restart started", UNDER_WAY)
PEOPLE = {"ann": {"open_id": "ou_ann", "role": "admin"}, "bob": {"open_id": "ou_bob", "may": ["acknowledge"]}}


async def begin(
    loop: Loop, *, service: dict[str, Any] | None = None, remediator: dict[str, Any] | None = None, **options: Any
) -> Message:
    """Start with a service that is down and only notified; returns its card."""
    await loop.feishu.start()
    app = {"app_id": APP_ID, "app_secret": APP_SECRET, "chat_id": CHAT, "url": loop.feishu.url, **options}
    notify = {"people": PEOPLE, "channels": {"app": {"feishu_app": app}}, "routes": [{"channels": ["app"]}]}
    await loop.start(
        {"web": loop.service("web", **(service or {"on_failure": "notify"}))}, notify=notify, remediator=remediator
    )
    await loop.kill("web")
    await loop.fire("web")
    return await card_with(loop, "acknowledge")


async def card_with(loop: Loop, answer: str) -> Message:
    async def there() -> Message | None:
        cards = loop.feishu.apps.in_chat
        return cards[0] if cards and answer in cards[0].values else None

    found = await eventually(there)
    assert found is not None
    return found


@pytest.fixture
async def card(loop: Loop) -> Message:
    return await begin(loop, encrypt_key=ENCRYPT_KEY, verification_token=VERIFICATION_TOKEN)


async def send(loop: Loop, event: Any, key: str = ENCRYPT_KEY, **headers: str) -> tuple[int, Any]:
    body, signed = loop.feishu.apps.callback(event, key)
    return await post(loop, body, {**signed, **headers})


async def post(loop: Loop, body: bytes, headers: dict[str, str], channel: str = "app") -> tuple[int, Any]:
    url = f"{loop.stack.url('remediator')}/webhook/feishu/{channel}"
    answer = await loop.stack.client.post(url, content=body, headers=headers)
    return answer.status_code, answer.json()


async def press(loop: Loop, card: Message, answer: str, person: str = "ou_ann") -> str:
    """Press a button; returns the text that is shown to the person."""
    status, response = await send(loop, loop.feishu.apps.event(card, answer, person))
    assert status == 200
    return str(response["toast"]["content"])


async def test_a_url_verification_is_answered(loop: Loop, card: Message) -> None:
    event = {"type": "url_verification", "challenge": "c-1", "token": VERIFICATION_TOKEN}
    assert await send(loop, event) == (200, {"challenge": "c-1"})
    assert (await send(loop, {**event, "token": "another"}))[0] == 401


async def test_the_first_press_acknowledges(loop: Loop, card: Message) -> None:
    assert await press(loop, card, "acknowledge", "ou_bob") == "Acknowledged by bob"
    assert (
        await press(loop, loop.feishu.apps.messages[card.id], "restart", "ou_bob")
        == "You are not allowed to do this (your open_id is ou_bob)"
    )
    incident = await loop.incident()
    assert incident["acknowledged_by"] == "bob"
    assert [each["detail"]["by"] for each in incident["timeline"] if each["event"] == "acknowledged"] == ["bob"]

    async def shown() -> bool:
        return "Acknowledged by** bob" in card.text and "acknowledge" not in card.values

    await eventually(shown)
    assert loop.restarts() == []


async def test_a_press_restarts_the_service_once(loop: Loop) -> None:
    pressed_twice = loop.folder / "pressed twice"
    slow = f"while [ ! -e '{pressed_twice}' ]; do sleep 0.1; done; touch {{alive}}"
    service = {"on_failure": "notify", "restart": slow}
    card = await begin(loop, service=service, encrypt_key=ENCRYPT_KEY, verification_token=VERIFICATION_TOKEN)
    assert await press(loop, card, "restart") in BEGUN
    await press(loop, card, "restart")
    pressed_twice.touch()
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")

    async def green() -> bool:
        return card.colour == "green"

    await eventually(green)
    assert loop.restarts() == ["web"]
    incident = await loop.incident()
    assert incident["recovered_by"] == "person"
    assert [each["asked_by"] for each in incident["actions"]] == ["ann"]
    assert card.titles[-1].startswith("Recovered: web (was down")
    # The buttons of an earlier version of the card do nothing after the end of the incident.
    old = Message(card.id, card.at, [next(each for each in card.cards if "restart" in json.dumps(each))])
    assert await press(loop, old, "restart") == "This has ended"
    assert await press(loop, old, "acknowledge") == "This has ended"
    assert loop.restarts() == ["web"]


async def test_an_operation_that_lasts_longer_continues_after_the_response(loop: Loop) -> None:
    service = loop.service("web", on_failure="notify")
    control = {**service["control"], "command": {**service["control"]["command"], "logs": ["sleep", "30"]}}
    card = await begin(loop, service={"on_failure": "notify", "control": control}, encrypt_key=ENCRYPT_KEY)
    assert await press(loop, card, "restart") == UNDER_WAY  # collecting evidence takes a while
    await eventually(loop.begun)


async def test_a_press_switches_automation_off(loop: Loop, card: Message) -> None:
    assert await press(loop, card, "automation") == "Automation is off, by ann"
    response = (await loop.ask("GET", "/api/v1/automation")).json()
    assert (response["enabled"], response["by"]) == (False, "ann")


async def test_texts_that_cannot_be_stored(loop: Loop, card: Message) -> None:
    """JSON may have halves of surrogate pairs in any text; Feishu signs such an event, too."""
    lone = "\ud800"

    async def press_changed(change: Callable[[dict[str, Any]], None]) -> str:
        event = loop.feishu.apps.event(card, "acknowledge")
        change(event)
        status, response = await send(loop, event)
        assert status == 200
        return str(response["toast"]["content"])

    def value(event: dict[str, Any]) -> dict[str, Any]:
        return dict[str, Any](event["event"]["action"].setdefault("value", {}))

    shown = {
        "open_id": await press_changed(lambda event: event["event"]["operator"].update(open_id=f"ou_{lone}")),
        "answer": await press_changed(
            lambda event: event["event"]["action"].update(value={**value(event), "answer": lone})
        ),
        "key": await press_changed(lambda event: event["event"]["action"].update(value={**value(event), lone: lone})),
        "event_id": await press_changed(lambda event: event["header"].update(event_id=f"{uuid4().hex}{lone}")),
    }
    assert shown == {
        "open_id": "You are not allowed to do this (your open_id is ou_?)",
        "answer": "This button is unknown",
        "key": "Acknowledged by ann",
        "event_id": "Acknowledged by ann",
    }
    log = loop.stack.log_path("remediator").read_text()
    assert "button_press_failed" not in log
    assert "Traceback" not in log


async def test_silencing_without_alertmanager_is_refused(loop: Loop, card: Message) -> None:
    assert "silence" not in card.values
    event = loop.feishu.apps.event(card, "acknowledge")
    event["event"]["action"]["value"]["answer"] = "silence"
    assert (await send(loop, event))[1]["toast"]["content"] == "Not silenced: remediator.alertmanager_url is not set"


@pytest.mark.needs("prometheus-alertmanager")
async def test_a_press_creates_a_silence_in_alertmanager(loop: Loop) -> None:
    loop.stack._folder.mkdir(exist_ok=True)
    await loop.stack.start_alertmanager()
    card = await begin(loop, encrypt_key=ENCRYPT_KEY, remediator={"alertmanager_url": loop.stack.url("alertmanager")})
    assert (await press(loop, card, "silence")).startswith("Silenced until ")
    (silence,) = await loop.stack.get("alertmanager", "/api/v2/silences")
    assert [(each["name"], each["value"]) for each in silence["matchers"]] == [("service", "web")]
    assert silence["createdBy"] == "ann"
    assert "silenced" in [each["event"] for each in (await loop.incident())["timeline"]]


async def test_a_press_approves_the_queued_action(loop: Loop) -> None:
    steps = [{"recreate": {"command": ["sh", "-c", f"touch {loop.folder}/web.alive"], "attempts": 1}}]
    service = {"on_failure": "restart", "remediation": {"steps": steps}}
    card = await begin(loop, service=service, encrypt_key=ENCRYPT_KEY)
    card = await card_with(loop, "approve")
    assert await press(loop, card, "approve") == "Approved"
    await loop.until_event("service_up")
    (action,) = (await loop.incident())["actions"]
    assert action["approved_by"] == "ann"


async def test_a_press_acknowledges_an_alert_without_a_service(loop: Loop, card: Message) -> None:
    await loop.post(delivery({**alert("", "DiskFull"), "labels": {"alertname": "DiskFull", "severity": "warning"}}))

    async def there() -> Message | None:
        return next((each for each in loop.feishu.apps.in_chat if "DiskFull" in each.title), None)

    found = await eventually(there)
    assert found is not None
    assert await press(loop, found, "acknowledge") == "Acknowledged by ann"

    async def shown() -> bool:
        return "Acknowledged by" in found.text

    await eventually(shown)


@pytest.mark.parametrize("name", ["notification", "notice"])
async def test_a_group_is_acknowledged_by_cards_of_this_and_earlier_versions(
    loop: Loop, card: Message, name: str
) -> None:
    labels = {"alertname": "DiskFull", "severity": "warning"}
    alerts = [
        {**alert("", "DiskFull"), "fingerprint": each, "labels": {**labels, "instance": each}} for each in ("d1", "d2")
    ]
    await loop.post(delivery(*alerts))

    async def find_card() -> Message | None:
        return next((each for each in loop.feishu.apps.in_chat if "DiskFull" in each.title), None)

    group = await eventually(find_card)
    assert group is not None
    event = loop.feishu.apps.event(group, "acknowledge")
    value = event["event"]["action"]["value"]
    value[name] = value.pop("notification")
    assert (await send(loop, event))[1]["toast"]["content"] == "Acknowledged by ann"

    async def shows_both() -> bool:
        return group.text.count("Acknowledged by") == 2

    await eventually(shows_both)


STALE = str(int(time.time()) - 3600)


FORGED: list[tuple[dict[str, Any], str, dict[str, str], str]] = [
    ({}, "another-key", {}, "signature is wrong"),
    ({}, ENCRYPT_KEY, {"X-Lark-Signature": "0" * 64}, "signature is wrong"),
    ({}, ENCRYPT_KEY, {"X-Lark-Signature": "ü"}, "signature is wrong"),
    ({}, ENCRYPT_KEY, {"X-Lark-Request-Timestamp": STALE}, "signature is wrong"),
    ({"token": "another"}, ENCRYPT_KEY, {}, "verification token is wrong"),
    ({"app_id": "cli_another"}, ENCRYPT_KEY, {}, "for another app"),
    ({"event_type": "im.message.receive_v1"}, ENCRYPT_KEY, {}, "not card.action.trigger"),
    ({"event_id": ""}, ENCRYPT_KEY, {}, "no event_id"),
]


REFUSED = (
    401,
    {"error": {"code": "not_verified", "message": "the callback was refused; the remediator's log has the reason"}},
)


async def test_forged_presses_do_nothing_and_all_get_the_same_answer(loop: Loop, card: Message) -> None:
    log = loop.stack.log_path("remediator")
    for event, key, headers, why in FORGED:
        body, signed = loop.feishu.apps.callback(loop.feishu.apps.event(card, "restart", **event), key)
        sent: dict[str, Any] = {**signed, **{name: value.encode() for name, value in headers.items()}}
        logged = log.read_text().count(why)
        assert await post(loop, body, sent) == REFUSED
        assert log.read_text().count(why) == logged + 1, why
    body, signed = loop.feishu.apps.callback(loop.feishu.apps.event(card, "restart"))
    assert await post(loop, body, signed, "gone") == REFUSED
    assert await post(loop, body, signed, "ops") == REFUSED
    del signed["X-Lark-Signature"]
    assert await post(loop, body, signed) == REFUSED
    assert "the callback is not signed" in log.read_text()
    assert await post(loop, json.dumps({"encrypt": "AAAA" * 8}).encode(), {}) == REFUSED
    assert loop.restarts() == []


async def test_only_the_short_check_of_a_new_url_is_decrypted_without_a_signature(loop: Loop, card: Message) -> None:
    event = {"type": "url_verification", "challenge": "c-1", "token": VERIFICATION_TOKEN}
    body, headers = loop.feishu.apps.callback(event)
    del headers["X-Lark-Signature"]
    assert await post(loop, body, headers) == (200, {"challenge": "c-1"})
    assert await post(loop, body, {**headers, "X-Lark-Signature": ""}) == REFUSED
    for changed in ({"token": "another"}, {"token": 7}, {"token": "\ud800"}, {"challenge": "c" * 4096}):
        body, headers = loop.feishu.apps.callback({**event, **changed})
        del headers["X-Lark-Signature"]
        assert await post(loop, body, headers) == REFUSED


@pytest.mark.parametrize("time", [None, "", "NaN", "inf", "-inf", "1e999", float("nan"), float("inf"), 10**400, True])
async def test_a_press_without_a_time_is_stale(loop: Loop, card: Message, time: Any) -> None:
    event = loop.feishu.apps.event(card, "acknowledge")
    if time is None:
        del event["header"]["create_time"]
    else:
        event["header"]["create_time"] = time
    assert (await send(loop, event))[1]["toast"]["content"] == "This button press is too old"


async def test_old_repeated_unknown_and_invalid_presses_do_nothing(loop: Loop, card: Message) -> None:
    apps = loop.feishu.apps
    # Signed an hour ago, and replayed.
    loop.feishu.now = lambda: time.time() - 3600
    body, headers = apps.callback(apps.event(card, "restart"))
    old = apps.event(card, "restart")
    loop.feishu.now = time.time
    assert await post(loop, body, headers) == REFUSED
    assert "the signature is too old" in loop.stack.log_path("remediator").read_text()
    assert (await send(loop, old))[1]["toast"]["content"] == "This button press is too old"
    # The same event is received again.
    event = apps.event(card, "acknowledge")
    body, headers = apps.callback(event)
    assert (await post(loop, body, headers))[1]["toast"]["content"] == "Acknowledged by ann"
    assert (await post(loop, body, headers))[1]["toast"]["content"] == "This button press was already processed"
    assert (await send(loop, event))[1]["toast"]["content"] == "This button press was already processed"
    # A person who is not in the inventory.
    assert "ou_stranger" in await press(loop, card, "restart", "ou_stranger")
    for value in ({}, {"answer": "dance"}, {"answer": "restart"}, {"answer": "restart", "incident": "1"}, {"answer": "approve", "action": 2**80},
                  {"answer": "acknowledge", "incident": -1}, {"answer": "acknowledge", "incident": 1, "since": 7}, {"answer": "silence", "alert": True}):  # fmt: skip
        pressed = copy.deepcopy(event)  # the card itself may have been changed meanwhile
        pressed["header"]["event_id"] = uuid4().hex
        pressed["event"]["action"]["value"] = value
        status, response = await send(loop, pressed)
        assert (status, response["toast"]["type"]) in ((200, "error"), (200, "warning")), (value, response)
    for raw in (
        b"",
        b"{}",
        b"[]",
        b'{"encrypt": 7}',
        b'{"encrypt": "AAAA"}',
        b"\xff" * 100,
        b"[" * 100_000,
        b"x" * 70_000,
    ):
        assert await post(loop, raw, {}) == REFUSED
    assert await post(loop, b"{}", {}, "gone") == REFUSED
    assert loop.restarts() == []


async def test_presses_over_a_long_connection(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "of-the-environment")
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    connection = LongConnection()
    loop.feishu.extra_routes.append(connection.add_routes)
    card = await begin(loop, long_connection=True)

    async def connected() -> bool:
        return bool(connection.sockets)

    await eventually(connected)
    remediator = loop.stack.pids["remediator"]
    (child,) = Path(f"/proc/{remediator}/task/{remediator}/children").read_text().split()
    environment = Path(f"/proc/{child}/environ").read_text()
    assert ("of-the-environment" in environment, "NO_PROXY=localhost" in environment) == (False, True)
    response = await connection.tell(loop.feishu.apps.event(card, "acknowledge"))
    assert response["toast"]["content"] in ("Acknowledged by ann", UNDER_WAY)
    await loop.until_event("acknowledged")
    assert await connection.tell(loop.feishu.apps.event(card, "restart", event_type="im.message.receive_v1")) is None
    response = await connection.tell(loop.feishu.apps.event(card, "restart", create_time="NaN"))
    assert response["toast"]["content"] in ("This button press is too old", UNDER_WAY)
    # After a lost connection, another process connects.
    await connection.cut()

    async def again() -> bool:
        return connection.connections == 2 and bool(connection.sockets)

    await eventually(again)
    response = await connection.tell(loop.feishu.apps.event(card, "restart"))
    assert response["toast"]["content"] in BEGUN
    await loop.until_event("action_started")
    page = (await loop.stack.client.get(f"{loop.stack.url('remediator')}/metrics", headers=TOKEN)).text
    assert 'defib_remediator_feishu_connected{channel="app"} 1.0' in page
    assert 'defib_remediator_presses_total{answer="acknowledge",outcome="' in page
    text = loop.stack.log_path("remediator").read_text()
    assert TICKET not in text
    assert APP_SECRET not in text
