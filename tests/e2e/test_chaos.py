"""Kills in a storm; `make chaos` makes as many as you say. And whether what judges it would see what must not be."""

from pathlib import Path

import pytest

from defib.demo.launcher import Launcher
from tests.chaos import judged, storm


@pytest.mark.needs("sshd")
@pytest.mark.parametrize(
    ("kills", "restarts"),
    [
        pytest.param(20, 5, marks=pytest.mark.timeout(600)),
        pytest.param(200, 50, marks=[pytest.mark.long, pytest.mark.timeout(3000)]),
    ],
)
async def test_kills_in_a_storm(launcher: Launcher, tmp_path: Path, kills: int, restarts: int) -> None:
    report = await storm(launcher, tmp_path, kills=kills, seed=20)
    assert report.wrong == []
    assert report.kills.total() == kills
    assert report.restarts >= restarts
    assert len(report.accepted) > 10


FINE = [
    ("down", "a", 1.0),
    ("begin", "a", 2.0),
    ("end", "a", 3.0),
    ("down", "a", 4.0),
    ("begin", "a", 5.0),
    ("end", "a", 6.0),
]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (FINE, ""),
        ([("begin", "a", 2.0)], "without a failed probe"),
        ([("down", "b", 1.0), ("begin", "a", 2.0)], "without a failed probe"),
        ([*FINE[:3], ("up", "a", 4.0), ("begin", "a", 5.0)], "without a failed probe"),
        ([*FINE[:2], ("down", "a", 2.5), ("end", "a", 3.0), ("begin", "a", 5.0)], "without a failed probe"),
        ([*FINE[:2], ("down", "a", 2.5), ("begin", "a", 2.6)], "while it was being restarted"),
        ([*FINE, ("down", "a", 7.0), ("begin", "a", 8.0)], "was restarted 3 times"),
        ([*FINE[:2], ("down", "b", 2.0), ("begin", "b", 2.0), ("down", "c", 2.0), ("begin", "c", 2.0), ("down", "d", 2.0), ("begin", "d", 2.0)], "in ten minutes"),
    ],
)  # fmt: skip
def test_what_judges_sees_what_must_not_be(events: list[tuple[str, str, float]], said: str) -> None:
    wrong = judged(events, attempts=2, budget=3)
    assert any(said in each for each in wrong) if said else wrong == [], wrong
