from hypothesis import given
from hypothesis import strategies as st

from remediator.notifications.channels.feishu import FeishuOptions
from remediator.notifications.outbox import next_delivery_time

OPTIONS = FeishuOptions.model_validate({"webhook": "http://f/"})
PER_SECOND, PER_MINUTE = OPTIONS.per_second, OPTIONS.per_minute


@given(st.lists(st.floats(0, 3), min_size=1, max_size=300))
def test_no_window_exceeds_its_limit(gaps: list[float]) -> None:
    """Send whenever the limits permit it, at a simulated clock."""
    now, sent = 0.0, list[float]()
    for gap in gaps:
        now += gap
        while (at := next_delivery_time([each for each in sent if each > now - 60], now, OPTIONS)) > now:
            now = at
        sent.append(now)
    for index, at in enumerate(sent):
        assert sum(1 for each in sent[: index + 1] if each > at - 1 + 1e-6) <= PER_SECOND
        assert sum(1 for each in sent[: index + 1] if each > at - 60 + 1e-6) <= PER_MINUTE


def test_a_burst_is_spread() -> None:
    assert next_delivery_time([], 5.0, OPTIONS) == 5.0
    assert next_delivery_time([4.5] * PER_SECOND, 5.0, OPTIONS) == 5.5
    assert next_delivery_time([float(n) / 2 for n in range(PER_MINUTE)], 50.0, OPTIONS) == 60.0
