"""The gateway: what it adds to a request, against litellm's proxy on the same stand-in, and its memory under load."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvloop
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.bench import peers
from tests.bench.load import send_steadily

RATE, SECONDS, ROUNDS = 100, 15.0, 3  # requests a second; of each round
CONNECTIONS = 32
OVERHEAD, SHARE = 0.0012, 0.25  # seconds at p50; of litellm's p99 overhead and CPU time
STREAMS, STREAMS_MEMORY = 500, 150.0  # megabytes of the process
WAITERS, WAITERS_MEMORY = 10_000, 100.0  # megabytes beside those of the idle process
LITELLM = "litellm[proxy]==1.106.12"  # later ones need a package `litellm-proxy`, which not every mirror has
KEY = "sk-of-the-bench"
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "' + b"Say something of the weather. " * 30 + b'"}]}'
ANSWER = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1760000000,"model":"m","choices":[{"index":0,"message":'
    '{"role":"assistant","content":"' + "It rains. " * 100 + '"},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":210,"completion_tokens":300,"total_tokens":510}}'
)


@dataclass
class Measured:
    """What a proxy, or the stand-in itself, took: seconds of each request, and CPU seconds of its processes."""

    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def quantile(self, share: float) -> float:
        return sorted(self.latencies)[int(share * (len(self.latencies) - 1))]

    @property
    def cpu_each(self) -> float:
        return self.cpu / len(self.latencies)


def run() -> bool:
    return all([uvloop.run(_compare()), uvloop.run(_streams()), uvloop.run(_waiters())])


async def _compare() -> bool:
    """Send the same requests to the stand-in, the gateway and litellm in turn."""
    async with peers.workplace() as (launcher, folder):
        api, own, other = reserve_ports(3)
        await _start_stand_in(launcher, folder, api)
        pids = {"direct": [], "gateway": [await _start_gateway(launcher, folder, own, api)]}
        ports = {"direct": api, "gateway": own}
        program = _install_litellm()
        if program is not None:
            pids["litellm"] = _descendants(await _start_litellm(launcher, folder, program, other, api))
            ports["litellm"] = other
        for each in pids.values():
            _pin(each, 0)
        _pin([os.getpid()], -1)
        measured = {name: Measured() for name in ports}
        await asyncio.gather(*(send_steadily(port, _request(port), RATE, 2.0) for port in ports.values()))
        for _ in range(ROUNDS):
            for name, port in ports.items():
                before = sum(map(peers.cpu, pids[name]))
                measured[name].latencies += await send_steadily(port, _request(port), RATE, SECONDS)
                measured[name].cpu += sum(map(peers.cpu, pids[name])) - before
    return _judge(measured)


def _judge(measured: Mapping[str, Measured]) -> bool:
    direct, own = measured["direct"], measured["gateway"]

    def overhead(of: Measured, share: float) -> float:
        return of.quantile(share) - direct.quantile(share)

    for name, each in measured.items():
        print(
            f"{name} at {RATE} requests/s: p50 {each.quantile(0.5) * 1000:.2f}, p99 {each.quantile(0.99) * 1000:.2f} ms"
            + (f", CPU {each.cpu_each * 1000:.2f} ms each" if each.cpu else "")
        )
    good = overhead(own, 0.5) <= OVERHEAD
    print(
        f"the gateway adds {overhead(own, 0.5) * 1000:.2f} ms at p50 (at most {OVERHEAD * 1000:g}): {_say(good=good)}"
    )
    if "litellm" not in measured:
        print("litellm cannot be installed here: nothing to compare with")
        return good
    other = measured["litellm"]
    ratios = {"p99 of what is added": overhead(own, 0.99) / overhead(other, 0.99), "CPU": own.cpu / other.cpu}
    for what, ratio in ratios.items():
        good = good and ratio <= SHARE
        print(f"{what} against litellm: {ratio:.2f} times (at most {SHARE:g}): {_say(good=ratio <= SHARE)}")
    return good


def _say(*, good: bool) -> str:
    return "good" if good else "TOO MUCH"


async def _start_stand_in(launcher: Launcher, folder: Path, port: int) -> None:
    """Start a web server that answers every request with a completion."""
    (folder / "nginx").mkdir()
    (folder / "nginx" / "answer.json").write_text(ANSWER)
    config = folder / "nginx" / "nginx.conf"
    places = "".join(
        f"{kind}_temp_path {folder}/nginx;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx/pid; error_log stderr warn; events {{ }}"
        f"http {{ access_log off; keepalive_requests 1000000; {places} server {{ listen 127.0.0.1:{port};"
        f" location / {{ default_type application/json; return 200 '{ANSWER}'; }} }} }}"
    )
    await launcher.start(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)], folder / "nginx.log")


async def _start_gateway(launcher: Launcher, folder: Path, port: int, api: int, **more: object) -> int:
    upstream = {"url": f"http://127.0.0.1:{api}/v1", "api_key": "sk-of-the-stand-in", "rate": "1000000/min", **more}
    settings = {
        "state_file": str(folder / "state"), "default": "api", "upstreams": {"api": upstream},
        "queue": {"size": 2 * WAITERS, "max_wait": "10m"}, "clients": {"bench": {"token": KEY}},
    }  # fmt: skip
    (folder / "gateway").mkdir()
    (folder / "gateway" / "defib.yaml").write_text(yaml.safe_dump({"gateway": settings}))
    argv = [sys.executable, "-m", "defib", "gateway", "--config", str(folder / "gateway")]
    pid = await launcher.start([*argv, "--listen", f"127.0.0.1:{port}"], folder / "gateway.log")
    async with httpx.AsyncClient(trust_env=False) as client:
        await peers.answers(client, f"http://127.0.0.1:{port}/-/healthy")
    return pid


def _install_litellm() -> Path | None:
    """Return litellm's program, which is installed at the first time; None if it cannot be."""
    place = Path(".parts") / "litellm"
    if not (place / "installed").exists():
        print(f"installing {LITELLM} into {place} …", flush=True)
        for argv in (
            [sys.executable, "-m", "venv", str(place)],
            [str(place / "bin" / "pip"), "install", "-qq", "--disable-pip-version-check", LITELLM],
        ):
            if subprocess.run(argv, check=False).returncode != 0:
                return None
        (place / "installed").touch()
    return (place / "bin" / "litellm").absolute()


async def _start_litellm(launcher: Launcher, folder: Path, program: Path, port: int, api: int) -> int:
    model = {"model": "openai/m", "api_base": f"http://127.0.0.1:{api}/v1", "api_key": KEY}
    config = folder / "litellm.yaml"
    config.write_text(yaml.safe_dump({"model_list": [{"model_name": "m", "litellm_params": model}]}))
    environment = {
        "HOME": str(folder), "PATH": os.environ["PATH"], "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY,
    }  # fmt: skip
    argv = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    pid = await launcher.start(
        ["env", "-i", *(f"{k}={v}" for k, v in environment.items()), *argv], folder / "litellm.log"
    )
    async with httpx.AsyncClient(trust_env=False) as client:
        await peers.answers(client, f"http://127.0.0.1:{port}/health/liveliness", seconds=120)
    return pid


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in _descendants(int(child)))]


def _pin(pids: list[int], which: int) -> None:
    """Let processes run on one CPU, so that proxies and what measures them do not wait for each other."""
    chosen = sorted(os.sched_getaffinity(0))
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), [chosen[which]])


def _request(port: int, body: bytes = BODY) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def _streams() -> bool:
    """Hold many streams open, of which each gets an event in every second."""
    writers: list[asyncio.StreamWriter] = []

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(BODY)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        writers.append(writer)

    async with peers.workplace() as (launcher, folder):
        api, port = reserve_ports(2)
        server = await asyncio.start_server(stream, "127.0.0.1", api)
        pid = await _start_gateway(launcher, folder, port, api)
        transports = await _open(port, STREAMS)
        for _ in range(10):
            await asyncio.sleep(1.0)
            for each in writers:
                each.write(b'data: {"choices":[{"index":0,"delta":{"content":"It rains. "}}]}\n\n')
        async with httpx.AsyncClient(trust_env=False) as client:
            page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        assert f'gateway_in_flight{{provider="api"}} {STREAMS}.0' in page, page
        used = peers.resident(pid, "VmRSS")
        _close(transports, server)
        for writer in writers:
            writer.close()
    good = used < STREAMS_MEMORY
    print(f"{STREAMS} open streams: {used:.0f} MB (at most {STREAMS_MEMORY:g}): {_say(good=good)}")
    return good


async def _open(port: int, count: int) -> list[asyncio.Transport]:
    loop, request = asyncio.get_running_loop(), _request(port)
    transports: list[asyncio.Transport] = []
    for number in range(count):
        source = ("127.0.0." + str(2 + number // 200), 0)  # of many machines: connections of each are limited
        transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port, local_addr=source)
        transport.write(request)
        transports.append(transport)
        if number % 50 == 0:
            await asyncio.sleep(0.02)
    return transports


def _close(transports: list[asyncio.Transport], server: asyncio.Server) -> None:
    for each in transports:
        each.close()
    server.close()


async def _waiters() -> bool:
    """Let many requests wait for an upstream that is busy with one."""

    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with peers.workplace() as (launcher, folder):
        api, port = reserve_ports(2)
        server = await asyncio.start_server(hang, "127.0.0.1", api)
        pid = await _start_gateway(launcher, folder, port, api, concurrency=1)
        before = peers.resident(pid, "VmRSS")
        transports = await _open(port, WAITERS + 1)
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(120):
            wanted = f'gateway_queue_depth{{priority="normal",provider="api"}} {WAITERS}.0'
            while wanted not in (await client.get(f"http://127.0.0.1:{port}/metrics")).text:
                await asyncio.sleep(0.5)
        used = peers.resident(pid, "VmRSS")
        _close(transports, server)
    good = used - before < WAITERS_MEMORY
    print(
        f"{WAITERS} requests that wait: {used - before:.0f} MB more than the {before:.0f} MB of the idle process"
        f" (at most {WAITERS_MEMORY:g}): {_say(good=good)}"
    )
    return good
