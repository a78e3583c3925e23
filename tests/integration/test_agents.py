"""Agents that are alive and stuck: woken, then restarted, then reported to a person, in one incident."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from defib.demo.launcher import Launcher
from tests.integration.loop import Loop
from tests.support import NO_TLS, eventually

pytestmark = pytest.mark.needs("sshd")
STUCK = {"task": "T-1", "progress": 1, "rounds": 4, "pending": 2}


def agent(loop: Loop, wake: str = "", **more: Any) -> dict[str, Any]:
    """Return a service that is an agent; what wakes and restarts it appends to the log of restarts."""
    log = loop.folder / "restarts"
    limits = {"stuck_after": "2s", "confirm_after": "4s", "recover_within": "3s"}
    return {
        "host": "h",
        "probe": {"heartbeat": {"every": "60s"}},
        "agent": {**limits, "wake": ["sh", "-c", f"echo wake >> {log}; {wake}"]},
        "control": {"command": {"restart": ["sh", "-c", f"echo restart >> {log}"]}, "start_within": "1s"},
        "on_failure": "restart",
        **more,
    }


async def report(loop: Loop, **values: Any) -> None:
    """Send a ping of the agent."""
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
        url = f"http://127.0.0.1:{loop.stack.ports['pings']}/{loop.stack.ping_key}/writer"
        assert (await client.post(url, content=json.dumps(values))).text == "OK"


async def observe(loop: Loop) -> dict[str, Any]:
    return dict(await loop.stack.get("exporter", "/api/v1/services/writer") or {})


async def until_stuck(loop: Loop, status: str) -> None:
    async def reached() -> bool:
        return bool((await observe(loop))["agent"]["status"] == status)

    await eventually(reached)


async def start(loop: Loop, service: dict[str, Any], **more: Any) -> None:
    """Start the loop with an agent that has something to do."""
    heartbeat = loop.stack.start_program

    async def start_and_ping(program: str) -> None:
        await heartbeat(program)
        if program == "exporter":
            await report(loop, **STUCK)

    loop.stack.start_program = start_and_ping  # type: ignore[method-assign]
    await loop.start({"writer": service}, **more)


async def test_a_stuck_agent_is_up_and_is_woken(loop: Loop) -> None:
    url = f"http://127.0.0.1:{loop.stack.ports['pings']}/{loop.stack.ping_key}/writer"
    progress = json.dumps({**STUCK, "progress": 2})
    await start(loop, agent(loop, wake=f"curl -fsS --noproxy '*' -d '{progress}' {url}"))
    await until_stuck(loop, "suspected")
    seen = await observe(loop)
    assert (seen["up"], seen["last"]["success"]) == (True, True)
    assert seen["agent"]["stuck"] == "alive, but no progress for 2s"
    await loop.fire("writer", "AgentStuck")
    incident = await loop.until("open")
    assert incident["service"] == "writer"
    await loop.until_event("action_ended", state="succeeded")
    assert loop.restarts() == ["wake"]
    assert (await observe(loop))["agent"]["status"] in ("working", "suspected", "confirmed")
    page = (await loop.stack.client.get(f"{loop.stack.url('exporter')}/metrics")).text
    assert 'service_up{service="writer",host="h",provider="other",category="other"} 1' in page
    assert 'agent_rounds_used{service="writer"} 4' in page
    assert 'agent_rounds_limit{service="writer"} 30' in page
    await report(loop, task="T-1", progress=3)
    await loop.fire("writer", "AgentStuck", "resolved")
    await loop.until("recovered")
    await loop.until_cards(
        "Agent without progress: writer", "Progress again, being watched: writer", "Progress again: writer"
    )


async def test_an_agent_that_stays_stuck_is_restarted_and_then_reported_to_a_person(loop: Loop) -> None:
    await start(loop, agent(loop), attempts=2)
    await loop.fire("writer", "AgentStuck")
    await loop.until_decision("refuse", "attempts-used-up")
    assert loop.restarts() == ["wake", "restart", "restart"]
    assert (await observe(loop))["up"] is True
    incident = await loop.incident()
    assert (incident["state"], incident["service"]) == ("open", "writer")
    ended = [entry["detail"] for entry in incident["timeline"] if entry["event"] == "action_ended"]
    assert [each["state"] for each in ended] == ["failed"] * 3
    assert "not up within 3 s; stuck: alive, but no progress for 4s" in ended[1]["why"]
    await loop.until_card("A person is needed: writer is stuck, 2 restarts failed")


async def test_an_agent_is_not_restarted_before_it_is_confirmed_to_be_stuck(loop: Loop) -> None:
    service = agent(loop)
    service["agent"] |= {"confirm_after": "1h", "recover_within": "500ms"}
    await start(loop, service)
    await until_stuck(loop, "suspected")
    await loop.fire("writer", "AgentStuck")
    held = await loop.until_decision("wait", "unconfirmed")
    assert held["detail"]["detail"] == "it is restarted after 1h without progress"
    assert loop.restarts() == ["wake"]


async def test_an_agent_without_a_control_is_woken_only(loop: Loop) -> None:
    service = agent(loop)
    del service["control"]
    await start(loop, service)
    await until_stuck(loop, "confirmed")
    await loop.fire("writer", "AgentStuck")
    await loop.until_decision("refuse", "attempts-used-up")
    assert loop.restarts() == ["wake"]


async def test_a_silent_agent_is_woken_too(loop: Loop, launcher: Launcher) -> None:
    service = agent(loop, probe={"heartbeat": {"every": "1s", "grace": "0s"}})
    await start(loop, service)
    await loop.fire("writer")
    await loop.until_decision("refuse", "attempts-used-up")
    assert loop.restarts()[:2] == ["wake", "restart"]
    await loop.until_card("Still down: writer")


async def test_a_card_does_not_call_an_agent_that_was_woken_restarted(loop: Loop) -> None:
    url = f"http://127.0.0.1:{loop.stack.ports['pings']}/{loop.stack.ping_key}/writer"
    wake = f"curl -fsS --noproxy '*' -d '{json.dumps({**STUCK, 'progress': 2})}' {url}"
    every, long = {"heartbeat": {"every": "3s", "grace": "0s"}}, {"stuck_after": "1h", "confirm_after": "1h"}
    service = agent(loop, wake, probe=every)
    service["agent"] |= long
    await start(loop, service)
    await loop.fire("writer")
    await loop.until_card("Up again, being watched: writer")
    assert loop.restarts() == ["wake"]


async def test_the_client_for_agents(loop: Loop) -> None:
    """The example reports to a real exporter, and keeps its counts while that is away."""
    await start(loop, agent(loop))
    path = Path(__file__).parents[2] / "deploy" / "examples" / "agent_report.py"
    code = f"""
import sys, runpy
client = runpy.run_path({str(path)!r})
client["ATTEMPTS"] = 1
away, report = client["AgentReport"]("http://127.0.0.1:1/ping"), client["AgentReport"]()
report.request(True, 1.5)
report.request(False)
away._requests = report._requests
assert not away.send(progress=1)
assert report.start()
assert report.send(task="T-2", progress=7, pending=3, rounds=5)
report.request(True)
assert report.send(task="T-2", progress=8)
"""
    url = f"{loop.stack.url('pings')}/{loop.stack.ping_key}/writer"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-c", code],
        env={"DEFIB_PING_URL": url},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    page = (await loop.stack.client.get(f"{loop.stack.url('exporter')}/metrics")).text
    assert 'agent_llm_requests_total{service="writer",outcome="ok"} 2' in page
    assert 'agent_llm_requests_total{service="writer",outcome="429"} 1' in page
    assert 'agent_response_seconds{service="writer"} 1.5' in page


async def test_an_idle_agent_is_left_alone(loop: Loop) -> None:
    await start(loop, agent(loop))
    await report(loop, pending=0)
    await until_stuck(loop, "idle")
    await loop.fire("writer", "AgentStuck")
    await loop.until_decision("refuse", "already-up")
    assert loop.restarts() == []
