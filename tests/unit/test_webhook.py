import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remediator.clients.alerts import Alert, InvalidPayloadError, parse_webhook

ALERT = {
    "status": "firing",
    "labels": {"alertname": "ServiceDown", "service": "web"},
    "annotations": {},
    "startsAt": "2026-11-22T03:39:44.743142112Z",
    "endsAt": "0001-01-01T00:00:00Z",
    "fingerprint": "ba42e0a5ef2ba835",
}


def delivery(*alerts: Any, **changed: Any) -> bytes:
    return json.dumps({"version": "4", "status": "firing", "alerts": list(alerts), **changed}).encode()


def alerts_of(body: bytes) -> list[Alert]:
    return parse_webhook(body).alerts


@pytest.mark.parametrize(("told", "count"), [(5, 5), (0, 0), (-1, 0), ("x", 0), (True, 0), (None, 0)])
def test_what_alertmanager_left_out_is_counted(told: Any, count: int) -> None:
    assert parse_webhook(delivery(ALERT, truncatedAlerts=told)).truncated == count


def test_a_delivery_gives_its_alerts() -> None:
    (alert,) = alerts_of(delivery(ALERT))
    assert (alert.name, alert.status, alert.starts_at) == ("ServiceDown", "firing", ALERT["startsAt"])


def test_unknown_and_missing_optional_fields_are_let_be() -> None:
    bare = {key: value for key, value in ALERT.items() if key in ("status", "startsAt", "fingerprint")}
    assert alerts_of(delivery(bare, notification_reason="x", routeLabels={}))[0].labels == {}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": "4"}', b'{"version": "4", "alerts": {}}',
        delivery(ALERT, version="3"), delivery(ALERT, version=4), delivery("x"), delivery({}),
        delivery({**ALERT, "status": "maybe"}), delivery({**ALERT, "fingerprint": ""}),
        delivery({**ALERT, "labels": []}), delivery({**ALERT, "labels": {"a": 1}}), delivery({**ALERT, "startsAt": None}),
    ],
)  # fmt: skip
def test_what_is_no_delivery(body: bytes) -> None:
    with pytest.raises(InvalidPayloadError):
        parse_webhook(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(["version", "alerts", "status"]), json_values))
def test_any_json_is_a_delivery_or_is_refused(payload: Any) -> None:
    try:
        parse_webhook(json.dumps(payload).encode())
    except InvalidPayloadError as error:
        assert len(str(error)) < 100


@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_labels_of_any_text_can_be_stored(labels: dict[str, str]) -> None:
    (alert,) = alerts_of(delivery({**ALERT, "labels": labels}))
    json.dumps(dict(alert.labels), ensure_ascii=False).encode()


def test_a_lone_surrogate_becomes_text() -> None:
    (alert,) = alerts_of(delivery({**ALERT, "labels": {"a": "\ud800"}}))
    assert alert.labels == {"a": "?"}


def test_captured_deliveries(shared: Path) -> None:
    for path in shared.glob("alertmanager/*.json"):
        body = json.loads(path.read_text())["body"]
        assert len(alerts_of(json.dumps(body).encode())) == len(body["alerts"])
