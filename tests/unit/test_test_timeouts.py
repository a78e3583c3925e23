"""A test that hangs fails at its timeout, whatever it waits for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = "import asyncio, subprocess, sys, time\n"
SLEEP = '[sys.executable, "-c", "import time; time.sleep(100)"]'


@pytest.mark.parametrize(
    "body",
    [
        "def test_it(): time.sleep(100)",
        "async def test_it(): time.sleep(100)",
        "async def test_it(): await asyncio.Event().wait()",
        f"async def test_it():\n process = await asyncio.create_subprocess_exec(*{SLEEP})\n await process.wait()",
        """
async def spin():
    while True:
        await asyncio.sleep(0)

async def test_it():
    task = asyncio.create_task(spin())
    await task
""",
    ],
    ids=["blocking", "blocking the event loop", "idle event loop", "child process", "busy event loop"],
)
def test_a_test_that_hangs_fails_at_its_timeout(tmp_path: Path, body: str) -> None:
    file = tmp_path / "test_hanging.py"
    file.write_text(f"{BEGIN}\n{body}\n")
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "tests.conftest", "--timeout", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stderr
    assert "Timeout" in done.stdout
    assert "1 failed" in done.stdout
