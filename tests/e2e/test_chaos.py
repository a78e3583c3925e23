"""Random failures and kills (see tests/chaos.py), and whether the checks find violations of the invariants."""

from pathlib import Path

import pytest

from defib.demo.launcher import Launcher
from tests.chaos import find_violations, run_chaos


@pytest.mark.needs("sshd")
@pytest.mark.parametrize(
    ("kills", "restarts"),
    [
        pytest.param(20, 5, marks=pytest.mark.timeout(600)),
        pytest.param(200, 50, marks=[pytest.mark.long, pytest.mark.timeout(3000)]),
    ],
)
async def test_invariants_hold_after_random_kills(
    launcher: Launcher, tmp_path: Path, kills: int, restarts: int
) -> None:
    report = await run_chaos(launcher, tmp_path, kills=kills, seed=20)
    assert report.violations == []
    assert report.kills.total() == kills
    assert report.restarts >= restarts
    assert len(report.accepted) > 10


VALID = [
    ("down", "a", 1.0),
    ("begin", "a", 2.0),
    ("end", "a", 3.0),
    ("down", "a", 4.0),
    ("begin", "a", 5.0),
    ("end", "a", 6.0),
]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (VALID, ""),
        ([("begin", "a", 2.0)], "without a failed probe"),
        ([("down", "b", 1.0), ("begin", "a", 2.0)], "without a failed probe"),
        ([*VALID[:3], ("up", "a", 4.0), ("begin", "a", 5.0)], "without a failed probe"),
        ([*VALID[:2], ("down", "a", 2.5), ("end", "a", 3.0), ("begin", "a", 5.0)], "without a failed probe"),
        ([*VALID[:2], ("down", "a", 2.5), ("begin", "a", 2.6)], "while it was being restarted"),
        ([*VALID, ("down", "a", 7.0), ("begin", "a", 8.0)], "was restarted 3 times"),
        ([*VALID[:2], ("down", "b", 2.0), ("begin", "b", 2.0), ("down", "c", 2.0), ("begin", "c", 2.0), ("down", "d", 2.0), ("begin", "d", 2.0)], "in ten minutes"),
    ],
)  # fmt: skip
def test_violations_are_found(events: list[tuple[str, str, float]], message: str) -> None:
    violations = find_violations(events, attempts=2, budget=3)
    assert any(message in each for each in violations) if message else violations == [], violations
