"""Twenty kills in a storm; `make chaos` makes more."""

from pathlib import Path

import pytest

from defib.demo.keeper import Keeper
from tests.chaos import storm


@pytest.mark.needs("sshd")
@pytest.mark.timeout(300)
async def test_twenty_kills(keeper: Keeper, tmp_path: Path) -> None:
    report = await storm(keeper, tmp_path, kills=20, seed=20, attempts=6)
    assert report.wrong == []
    assert report.kills.total() == 20
    assert report.restarts > 5
    assert len(report.accepted) > 10
