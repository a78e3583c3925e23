"""A gateway before a stand-in for a model API, and clients, one of which uses up the rate."""

import asyncio
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.stack import Stack
from tests.integration.model_api import ModelApi, Received, completion, whole
from tests.support import NO_TLS

PROVIDER_ALLOWS = 52  # requests a minute: less than the base rate
LIMITS = {"rate": "60/min", "tokens": "200000/min", "concurrency": 12}
LOCAL = {"rate": "600/min", "concurrency": 16, "match": ["local/*"]}
QUEUE = {"size": 40, "when_full": "drop-lowest", "max_wait": "45s"}


@dataclass(frozen=True)
class PreparedClient:
    """A client: how many requests it sends at the same time, and the seconds between them."""

    workers: int
    pause: float
    settings: Mapping[str, Any]
    model: str = "nvidia/nemotron"


CLIENTS: Mapping[str, PreparedClient] = {
    "batch-import": PreparedClient(24, 0.2, {"priority": "normal"}),
    "coder": PreparedClient(3, 4.0, {"priority": "high", "share": 2, "budget": {"requests": 2000, "tokens": 500_000}}),
    "helpdesk": PreparedClient(1, 6.0, {"priority": "urgent"}),
    "translator": PreparedClient(2, 3.0, {"priority": "normal"}, "local/qwen"),
    "nightly-report": PreparedClient(2, 1.0, {"priority": "low", "budget": {"requests": 200}}),
}


class PreparedGateway:
    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self._api = ModelApi()
        self._api.rate = PROVIDER_ALLOWS
        self._api.respond = _respond_slowly
        self._local = ModelApi()
        self._local.respond = _respond_slowly
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def configuration(self) -> dict[str, Any]:
        return {
            "url": self._stack.url("gateway"),
            "state_file": str(self._folder / "gateway-state"),
            "default": "nvidia",
            "upstreams": {
                "nvidia": {"url": self._api.url, "api_key": "nvapi-prepared", **LIMITS},
                "local": {"url": self._local.url, **LOCAL},
            },
            "queue": QUEUE,
            "clients": {name: {"token": f"token-of-{name}", **each.settings} for name, each in CLIENTS.items()},
        }

    def _add_job(self) -> None:
        """Have Prometheus read the gateway's metrics."""
        path = self._folder / "prometheus.yml"
        written = yaml.safe_load(path.read_text())
        job = next((each for each in written["scrape_configs"] if each["job_name"] == "defib-gateway"), None)
        if job is None:
            job = {**written["scrape_configs"][0], "job_name": "defib-gateway"}
            written["scrape_configs"].append(job)
        job["static_configs"] = [{"targets": [self._stack.url("gateway").removeprefix("http://")]}]
        path.write_text(yaml.safe_dump(written, sort_keys=False))
        os.kill(self._stack.pids["prometheus"], signal.SIGHUP)

    async def start(self) -> None:
        await self._api.start()
        await self._local.start()
        await self._stack.start_program("gateway")
        self._add_job()
        self._tasks = [
            asyncio.create_task(self._send(name, each)) for name, each in CLIENTS.items() for _ in range(each.workers)
        ]

    async def _send(self, name: str, client: PreparedClient) -> None:
        base, headers = self._stack.url("gateway"), {"Authorization": f"Bearer token-of-{name}"}
        body = {"model": client.model, "messages": [{"role": "user", "content": "x" * random.randint(100, 4000)}]}
        async with httpx.AsyncClient(verify=NO_TLS, base_url=base, trust_env=False, timeout=120) as sender:
            while True:
                try:
                    await sender.post("/v1/chat/completions", json=body, headers=headers)
                except httpx.HTTPError:  # the gateway is being restarted
                    await asyncio.sleep(1)
                await asyncio.sleep(client.pause * random.uniform(0.5, 1.5))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            await self._api.stop()
            await self._local.stop()


async def _respond_slowly(request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(min(20.0, random.lognormvariate(0.5, 0.6)))
    prompt = len(request.body) // 4
    await whole(completion(prompt=prompt, completion=random.randint(50, 900)))(request, writer)
