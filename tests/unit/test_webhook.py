"""Parsing of webhook payloads of Alertmanager."""

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


def payload_of(*alerts: Any, **changed: Any) -> bytes:
    return json.dumps({"version": "4", "status": "firing", "alerts": list(alerts), **changed}).encode()


def alerts_of(body: bytes) -> list[Alert]:
    return parse_webhook(body).alerts


@pytest.mark.parametrize(("truncated", "count"), [(5, 5), (0, 0), (-1, 0), ("x", 0), (True, 0), (None, 0)])
def test_truncated_alerts_are_counted(truncated: Any, count: int) -> None:
    assert parse_webhook(payload_of(ALERT, truncatedAlerts=truncated)).truncated == count


def test_the_alerts_of_a_payload_are_parsed() -> None:
    (alert,) = alerts_of(payload_of(ALERT))
    assert (alert.name, alert.status, alert.starts_at) == ("ServiceDown", "firing", ALERT["startsAt"])


def test_unknown_fields_and_missing_optional_fields_are_ignored() -> None:
    bare = {key: value for key, value in ALERT.items() if key in ("status", "startsAt", "fingerprint")}
    assert alerts_of(payload_of(bare, notification_reason="x", routeLabels={}))[0].labels == {}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": "4"}', b'{"version": "4", "alerts": {}}',
        payload_of(ALERT, version="3"), payload_of(ALERT, version=4), payload_of("x"), payload_of({}),
        payload_of({**ALERT, "status": "maybe"}), payload_of({**ALERT, "fingerprint": ""}),
        payload_of({**ALERT, "labels": []}), payload_of({**ALERT, "labels": {"a": 1}}), payload_of({**ALERT, "startsAt": None}),
    ],
)  # fmt: skip
def test_invalid_payloads_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidPayloadError):
        parse_webhook(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["version", "alerts", "status"]), json_values))
def test_any_json_is_parsed_or_refused(payload: Any) -> None:
    try:
        parse_webhook(json.dumps(payload).encode())
    except InvalidPayloadError as error:
        assert len(str(error)) < 100


@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_labels_of_any_text_can_be_stored(labels: dict[str, str]) -> None:
    (alert,) = alerts_of(payload_of({**ALERT, "labels": labels}))
    json.dumps(dict(alert.labels), ensure_ascii=False).encode()


def test_a_lone_surrogate_is_replaced() -> None:
    (alert,) = alerts_of(payload_of({**ALERT, "labels": {"a": "\ud800"}}))
    assert alert.labels == {"a": "?"}


def test_payloads_captured_from_alertmanager_are_parsed(shared: Path) -> None:
    for path in shared.glob("alertmanager/*.json"):
        body = json.loads(path.read_text())["body"]
        assert len(alerts_of(json.dumps(body).encode())) == len(body["alerts"])
