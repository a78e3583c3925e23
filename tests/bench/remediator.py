"""The remediator: deliveries stored while actions run, a great delivery, a great record, and how soon it acts.

On one core, with a real exporter and a real sshd beside it on the others.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import uvloop
from sqlalchemy import insert

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from remediator.incidents import lifecycle
from remediator.policy.decisions import decide
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.record import queries, situations
from remediator.record.database import Database
from remediator.record.schema import actions as action_rows
from remediator.record.schema import incidents as incident_rows
from remediator.record.transaction import Transaction
from tests.support import WEBHOOK_TOKEN, eventually, inventory_of

HEADERS = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}
CONNECTIONS, SECONDS, ROUNDS = 6, 5.0, 5
PER_SECOND, PER_SECOND_ACTING, P99, GREAT, DECISION, PAGE, TO_COMMAND = 400.0, 300.0, 0.100, 1.0, 0.005, 0.100, 0.100
INCIDENTS = 100_000
RESTARTED, TOLD = 40, 1000  # services that are down all the time, and those that alerts are about


def run() -> bool:
    return all(
        [
            uvloop.run(_deliveries(0)),
            uvloop.run(_deliveries(RESTARTED)),
            uvloop.run(_record()),
            uvloop.run(_to_command()),
        ]
    )


def _service(host: str, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    probe = {"every": "5s", "retry_every": "1s", "fail_after": 1, "port": {"listening": 1}}
    restart = [f"{folder}/restart", name]
    control = {"command": {"restart": restart}, "timeout": "5s", "start_within": "1s"}
    return {"host": host, "probe": probe, "control": control, "on_failure": "restart", **more}


async def _started(launcher: Launcher, folder: Path, services: Callable[[str], dict[str, Any]]) -> Stack:
    """A stack whose remediator is alone on one core, once its services have been seen down."""
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, folder / "sshd", port, {"PATH": "/usr/bin:/bin"})
    (folder / "restart").write_text(f"#!/bin/sh\necho $1 $(date +%s.%N) >> {folder}/restarts\nsleep 0.2\n")
    (folder / "restart").chmod(0o755)
    (folder / "restarts").touch()
    keys = {"key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    ssh: dict[str, Any] = {"user": host.user, "port": host.port, **keys}
    hosts: dict[str, Any] = {f"h{n}": {"address": "127.0.0.1", "ssh": dict(ssh)} for n in range(RESTARTED)}
    stack = Stack(launcher, folder, webhook_token=WEBHOOK_TOKEN)
    remediation = {
        "attempts": 10_000, "hold": "100ms", "backoff": {"first": "1s", "factor": 1}, "actions_per_10m": 100_000,
        "storm": {"at_least": 100_000},
    }  # fmt: skip
    stack.configuration({"hosts": hosts, "services": services("h"), "remediation": remediation})
    path = folder / "config" / "defib.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "alertmanager_url" not in line))
    await stack.start_program("exporter")
    await stack.start_program("remediator")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(stack.pids["remediator"], cores[-1:])
    return stack


def _alert(service: str, number: int) -> dict[str, Any]:
    return {
        "status": "firing", "labels": {"alertname": "ServiceDown", "service": service, "severity": "critical"},
        "annotations": {"summary": "down"}, "startsAt": f"2026-11-24T00:00:00.{number:09}Z", "endsAt": "",
        "fingerprint": f"{service}-{number}",
    }  # fmt: skip


async def _post(stack: Stack, client: httpx.AsyncClient, *alerts: dict[str, Any]) -> float:
    began = time.perf_counter()
    url = f"{stack.url('remediator')}/webhook/alertmanager"
    answer = await client.post(url, json={"version": "4", "alerts": list(alerts)}, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - began


async def _deliveries(restarted: int) -> bool:
    """Deliver alerts while this many services are restarted over and over."""
    launcher = await Launcher.begin()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # on a disk, not in memory
            folder = Path(name)

            def services(host: str) -> dict[str, Any]:
                down = {f"down-{n}": _service(f"{host}{n}", folder, f"down-{n}") for n in range(restarted)}
                told = {f"told-{n}": _service("", folder, "x", on_failure="notify") for n in range(TOLD)}
                for each in told.values():
                    each |= {
                        "host": "",
                        "control": None,
                        "probe": {"every": "1h", "http": {"url": "http://127.0.0.1:1/"}},
                    }
                return down | told

            return await _measure_deliveries(await _started(launcher, folder, services), folder, restarted)
    finally:
        await launcher.end()


async def _measure_deliveries(stack: Stack, folder: Path, restarted: int) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        for n in range(restarted):
            await _post(stack, client, _alert(f"down-{n}", 0))
        await eventually(lambda: _lines(folder, min(restarted, 5)), 60)
        rates, p99s, acted, number = [], [], [], 0
        for _ in range(ROUNDS):
            took: list[float] = []
            ends = time.monotonic() + SECONDS

            async def deliver(ends: float = ends, took: list[float] = took) -> None:
                nonlocal number
                while time.monotonic() < ends:
                    number += 1
                    took.append(await _post(stack, client, _alert(f"told-{number % TOLD}", number)))

            before = len((folder / "restarts").read_text().splitlines())
            await asyncio.gather(*(deliver() for _ in range(CONNECTIONS)))
            acted.append((len((folder / "restarts").read_text().splitlines()) - before) / SECONDS)
            rates.append(len(took) / SECONDS)
            p99s.append(statistics.quantiles(took, n=100)[98])
        great = [
            await _post(stack, client, *(_alert(f"told-{n}", 10**6 + round_ * TOLD + n) for n in range(1000)))
            for round_ in range(ROUNDS)
        ]
    rate, p99, most = statistics.median(rates), statistics.median(p99s), statistics.median(great)
    least = PER_SECOND_ACTING if restarted else PER_SECOND
    good = rate >= least and p99 <= P99 and most <= GREAT and statistics.median(acted) >= min(restarted, 0.1)
    print(
        f"webhook on one core: {rate:.0f} single-alert deliveries/s (at least {least:g}), p99 {p99 * 1000:.0f} ms (at most"
        f" {P99 * 1000:g}), medians of {ROUNDS}, while {statistics.median(acted):.1f} restarts/s ran; 1,000 alerts in one: {most:.2f} s"
        f" (at most {GREAT:g}): {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


async def _lines(folder: Path, count: int) -> bool:
    return len((folder / "restarts").read_text().splitlines()) >= count


async def _record() -> bool:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        inventory = inventory_of(folder / "config", {
            "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {f"s{n}": _service("h", folder, "x") for n in range(1000)},
        }).inventory  # fmt: skip
        database = await asyncio.to_thread(Database, f"sqlite:///{folder}/record.db", inventory)
        await database.write(_fill)
        decisions = [await _timed(database, _decide, n) for n in range(200)]
        shown = [await _timed(database, queries.page_of_incidents, None, 100) for _ in range(50)]
        shown += [await _timed(database, queries.page_of_actions, INCIDENTS // 2, 100) for _ in range(50)]
        shown += [await _timed(database, queries.read_incident, INCIDENTS - n) for n in range(50)]
        await asyncio.to_thread(database.close)
    decision, page = statistics.median(decisions), statistics.quantiles(shown, n=100)[98]
    good = decision <= DECISION and page <= PAGE
    print(
        f"{INCIDENTS} incidents on record: a decision {decision * 1000:.2f} ms (at most {DECISION * 1000:g}), median of"
        f" {len(decisions)}; a page {page * 1000:.2f} ms (at most {PAGE * 1000:g}), p99 of {len(shown)}:"
        f" {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


def _fill(tx: Transaction) -> None:
    rows = [
        {"id": n, "service": f"s{n % 1000}", "state": "open" if n > INCIDENTS - 500 else "recovered", "opened_at": float(n),
         "closed_at": None if n > INCIDENTS - 500 else n + 0.5, "labels": {"service": f"s{n % 1000}"}}
        for n in range(1, INCIDENTS + 1)
    ]  # fmt: skip
    tx.execute(insert(incident_rows), rows)
    acted = [
        {"id": n, "incident_id": n, "service": f"s{n % 1000}", "host": "h", "kind": "restart", "requested_by": "alert",
         "asked_by": "ServiceDown", "overruled": [], "state": "succeeded", "counts": 1, "claimed_at": float(n),
         "command": "succeeded", "ended_at": n + 0.4, "output": "x" * 200}
        for n in range(1, INCIDENTS + 1)
    ]  # fmt: skip
    tx.execute(insert(action_rows), acted)


def _decide(tx: Transaction, number: int) -> None:
    service = tx.inventory.services[f"s{number}"]
    blank = Situation(
        2.0 * INCIDENTS, frozenset(), ActionHistory(), ActionsInProgress(), Observation(False, False, "connect")
    )
    incident = lifecycle.find_open(tx, service.id) or 0
    situation = situations.add_recorded_facts(tx, incident, service.id, blank)
    decide(service, tx.inventory.remediation, situation)
    situations.services_without_attempts(tx)


async def _timed(database: Database, work: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    await database.write(work, *args)
    return time.perf_counter() - began


async def _to_command() -> bool:
    launcher = await Launcher.begin()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            folder = Path(name)

            def services(host: str) -> dict[str, Any]:
                return {f"down-{n}": _service(f"{host}{n}", folder, f"down-{n}") for n in range(RESTARTED)}

            stack = await _started(launcher, folder, services)
            took = [await _one(stack, folder, number) for number in range(RESTARTED // 2)]
    finally:
        await launcher.end()
    median = statistics.median(took)
    good = median <= TO_COMMAND
    print(
        f"from the webhook to the restart's beginning on the host, over SSH: median {median * 1000:.0f} ms of {len(took)} (at"
        f" most {TO_COMMAND * 1000:g}; {min(took) * 1000:.0f} to {max(took) * 1000:.0f}): {'good' if good else 'TOO SLOW'}"
    )
    return good


async def _one(stack: Stack, folder: Path, number: int) -> float:
    """Seconds from posting an alert to its restart's first line; the connection is there already."""
    service = f"down-{number}"
    async with httpx.AsyncClient(trust_env=False, timeout=30, auth=stack.credential) as client:
        await client.get(f"{stack.url('remediator')}/api/v1/services/{service}/status")
        await client.post(f"{stack.url('remediator')}/api/v1/services/{service}/restart", json={})

        async def idle() -> bool:
            told = (await client.get(f"{stack.url('remediator')}/api/v1/actions")).json()["actions"]
            return all(each["state"] != "running" for each in told)

        await eventually(idle, 30)
        before = len((folder / "restarts").read_text().splitlines())
        posted = time.time()
        await _post(stack, client, _alert(service, 1))
        await eventually(lambda: _lines(folder, before + 1), 30)
        line = next(
            each for each in reversed((folder / "restarts").read_text().splitlines()) if each.startswith(f"{service} ")
        )
        # Then it fires on, and would be restarted again.
        over = {**_alert(service, 1), "status": "resolved"}
        await _post(stack, client, over)
        await eventually(idle, 30)
        return float(line.split()[1]) - posted
