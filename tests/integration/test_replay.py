"""`defib replay` on the history in a real Prometheus."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.demo.launcher import Launcher
from tests.integration.past_samples import start_prometheus

SCRAPE_INTERVAL = 5
SERVICE = {
    "host": "h", "probe": {"http": {"url": "http://h/"}}, "on_failure": "restart",
    "control": {"command": {"restart": ["true"]}, "start_within": "1m"},
}  # fmt: skip
pytestmark = [pytest.mark.needs("prometheus", "promtool"), pytest.mark.timeout(300)]


def samples(down_at: int, down_for: int) -> Iterator[str]:
    """Yield the samples of an exporter and of ServiceDown for two minutes around an outage, as OpenMetrics."""
    labels = 'job="defib-exporter",service="web"'
    times = range(down_at - 60, down_at + down_for + 60, SCRAPE_INTERVAL)
    down = range(down_at, down_at + down_for)
    for name in ("service_up", "service_probe_success"):
        yield f"# TYPE {name} gauge"
        yield from (f"{name}{{{labels}}} {int(at not in down)} {at}" for at in times)
    yield "# TYPE service_probe_failures counter"
    yield from (f'service_probe_failures_total{{{labels},reason="connect"}} {int(at >= down_at)} {at}' for at in times)
    yield "# TYPE ALERTS gauge"
    yield from (f'ALERTS{{alertname="ServiceDown",alertstate="firing",service="web"}} 1 {at}' for at in down)
    yield "# EOF"


async def run_replay(folder: Path, url: str, extra: Mapping[str, Any], *options: str, **environ: str) -> str:
    written = {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": SERVICE},
        "remediator": {"prometheus_url": url}, **extra,
    }  # fmt: skip
    (folder / "defib.yaml").write_text(yaml.safe_dump(written))
    argv = [sys.executable, "-m", "defib", "replay", "--since", "3d", "--config", str(folder), *options]
    completed = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, check=False, env={**os.environ, **environ}
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("offset", [0, 3])
async def test_an_outage_shorter_than_a_step_is_replayed(
    launcher: Launcher, tmp_path: Path, config: Path, offset: int
) -> None:
    down_at = (int(time.time()) - 86_400) // 60 * 60 + offset
    url = await start_prometheus(launcher, tmp_path, samples(down_at, SCRAPE_INTERVAL), "10s")
    (first, *_) = json.loads(await run_replay(config, url, {}, "--json"))
    seen_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(-(-down_at // 15) * 15))
    assert first == {"at": seen_at, "service": "web", "verb": "act", "reason": "restart", "detail": "attempt 1"}
    text = await run_replay(config, url, {})
    assert "every 15 s since" in text
    assert text.splitlines()[-1] == "1 actions: web 1"


async def test_a_maintenance_window_in_a_referenced_time_zone_holds_the_restart(
    launcher: Launcher, tmp_path: Path, config: Path
) -> None:
    down_at = (int(time.time()) - 86_400) // 86_400 * 86_400 + 16 * 3600  # midnight in Shanghai, 16:00 UTC
    if down_at > time.time() - 7200:
        down_at -= 86_400
    url = await start_prometheus(launcher, tmp_path, samples(down_at, 60), "10s")
    extra = {
        "notify": {"timezone": "${ZONE}"},
        "remediation": {"maintenance": [{"service": "web", "from": "23:59", "to": "00:30"}]},
    }
    text = await run_replay(config, url, extra, ZONE="Asia/Shanghai")
    assert "web  would wait: maintenance (service web, 23:59 to 00:30)" in text
    assert "would restart (attempt 1)" in await run_replay(config, url, extra, ZONE="UTC")
