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
    ("down", "s0", 1.0),
    ("begin", "s0", 2.0),
    ("end", "s0", 3.0),
    ("down", "s0", 4.0),
    ("begin", "s0", 5.0),
    ("end", "s0", 6.0),
]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (VALID, ""),
        ([("begin", "s0", 2.0)], "without a failed probe"),
        ([("down", "s1", 1.0), ("begin", "s0", 2.0)], "without a failed probe"),
        ([*VALID[:3], ("up", "s0", 4.0), ("begin", "s0", 5.0)], "without a failed probe"),
        ([*VALID[:2], ("down", "s0", 2.5), ("end", "s0", 3.0), ("begin", "s0", 5.0)], "without a failed probe"),
        ([*VALID[:2], ("down", "s0", 2.5), ("begin", "s0", 2.6)], "while it was being restarted"),
        ([*VALID[:2], ("down", "s4", 2.0), ("begin", "s4", 2.6)], "while s0 was being restarted"),
        ([*VALID, ("down", "s0", 7.0), ("begin", "s0", 8.0)], "was restarted 3 times"),
        ([*VALID[:2], ("down", "s1", 2.0), ("begin", "s1", 2.0), ("down", "s2", 2.0), ("begin", "s2", 2.0), ("down", "s3", 2.0), ("begin", "s3", 2.0)], "in ten minutes"),
    ],
)  # fmt: skip
def test_violations_are_found(events: list[tuple[str, str, float]], message: str) -> None:
    violations = find_violations(events, attempts=2, budget=3)
    assert any(message in each for each in violations) if message else violations == [], violations
