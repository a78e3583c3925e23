"""Random failures, alerts and kills with a real sshd that records every restart, and invariants that must hold afterwards.

`make chaos` runs 200 kills; `make chaos ARGS="500 7"` another number of kills with another seed.
"""

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from fleet.shells import KILL_DELAY
from remediator.incidents.alert_starts import normalize_starts_at
from remediator.policy.gates import BUDGET_WINDOW
from tests.support import WEBHOOK_TOKEN, eventually

SERVICES, HOSTS = 8, 4
KILLS, SEED = 200, 1
COMMAND_WITHIN = 2.0
HEADERS = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}

# Probes and restarts append to one log file, so that its order is the order of events.
_PROBE = """#!/bin/sh
[ -e {folder}/$1.alive ] && state=up || state=down
echo "$state $1 $(date +%s.%N)" >> {log}
[ $state = up ]
"""
_RESTART = """#!/bin/sh
echo "begin $1 $(date +%s.%N)" >> {log}
luck=$(od -An -N1 -tu1 /dev/urandom)
[ $luck -gt 20 ] || sleep 5
[ $luck -lt 200 ] && touch {folder}/$1.alive
echo "end $1 $(date +%s.%N)" >> {log}
[ $luck -lt 230 ]
"""
# The forced command of the key, which records every requested restart.
_FORCED = """#!/bin/sh
script=$(cat)
case $script in *{folder}/restart*) echo requested >> {folder}/requests ;; esac
printf '%s\\n' "$script" | exec sh -c "$SSH_ORIGINAL_COMMAND"
"""


@dataclass
class Report:
    """The result of a run."""

    kills: Counter[str] = field(default_factory=Counter)
    accepted: set[tuple[str, str]] = field(default_factory=set)  # (fingerprint, startsAt)
    restarts: int = 0
    violations: list[str] = field(default_factory=list)


class Chaos:
    """Eight services on four hosts behind one sshd, and the random events that happen to them."""

    def __init__(self, launcher: Launcher, folder: Path, seed: int, attempts: int, budget: int) -> None:
        self.launcher, self.folder, self.attempts, self.budget = launcher, folder, attempts, budget
        self.random = random.Random(seed)
        self.stack = Stack(launcher, folder, webhook_token=WEBHOOK_TOKEN)
        self.names = [f"s{number}" for number in range(SERVICES)]
        self.firing: dict[str, int] = {}  # the number of its firing alert, by service
        self.alerts = Counter[str]()
        self.report = Report()
        self.log = folder / "events"

    async def start(self) -> None:
        self.log.touch()
        for name, text in (("probe", _PROBE), ("restart", _RESTART), ("forced", _FORCED)):
            path = self.folder / name
            path.write_text(text.format(folder=self.folder, log=self.log))
            path.chmod(0o755)
        for name in self.names:
            self._alive(name).touch()
        (port,) = reserve_ports(1)
        self.host = await sshd.start(self.launcher, self.folder / "sshd", port, {"PATH": "/usr/bin:/bin"})
        authorized = self.folder / "sshd" / "authorized"
        authorized.write_text(f'restrict,command="{self.folder}/forced" {authorized.read_text()}')
        self._configure()
        await self.stack.start_program("exporter")
        await self.stack.start_program("remediator")
        for name in self.names:
            await self._probe(name)

    def _alive(self, name: str) -> Path:
        return self.folder / f"{name}.alive"

    def _configure(self) -> None:
        keys = {"key_file": str(self.host.key_file), "known_hosts": str(self.host.known_hosts)}
        ssh = {"user": self.host.user, "port": self.host.port, **keys}
        hosts: dict[str, Any] = {f"h{n}": {"address": "127.0.0.1", "ssh": dict(ssh)} for n in range(HOSTS)}
        services = {
            name: {
                "host": host_of(name),
                "probe": {
                    # `_probe` reports failures to the exporter; all other probes are requested by the remediator.
                    "every": "1h", "retry_every": "1h", "timeout": "2s", "fail_after": 1,
                    "command": {"run": [f"{self.folder}/probe", name]},
                },
                "control": {
                    "command": {"restart": [f"{self.folder}/restart", name]},
                    "timeout": f"{COMMAND_WITHIN:g}s", "start_within": "1s",
                },
                "on_failure": "restart",
            }
            for name in self.names
        }  # fmt: skip
        self.stack.configuration(
            {
                "hosts": hosts,
                "services": services,
                "remediation": {
                    "attempts": self.attempts, "hold": "300ms", "backoff": {"first": "200ms", "factor": 1},
                    "actions_per_10m": self.budget, "storm": {"at_least": SERVICES + 1},
                },
            }
        )  # fmt: skip
        path = self.folder / "config" / "defib.yaml"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "alertmanager_url" not in line))

    async def run(self, kills: int) -> None:
        """Cause failures, alerts and kills until there were this many kills."""
        while self.report.kills.total() < kills:
            for _ in range(self.random.randint(1, 6)):
                await self._cause_event()
            await asyncio.sleep(self.random.uniform(0.0, 0.8))
            await self._kill()

    async def _cause_event(self) -> None:
        name = self.random.choice(self.names)
        what = self.random.random()
        if what < 0.4:
            self._alive(name).unlink(missing_ok=True)
            await self._probe(name)
            await self._fire(name)
        elif what < 0.6:
            await self._fire(name)  # it may be up
        elif what < 0.8:
            await self._resolve(name)
        else:
            await asyncio.gather(*(self._fire(name) for _ in range(5)))

    async def _fire(self, name: str) -> None:
        if name not in self.firing:
            self.alerts[name] += 1
            self.firing[name] = self.alerts[name]
        key = await self._deliver(name, self.firing[name], "firing")
        if key is not None:
            self.report.accepted.add(key)

    async def _probe(self, name: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await self.stack.client.post(f"{self.stack.url('exporter')}/api/v1/services/{name}/probe", timeout=10)

    async def _resolve(self, name: str) -> None:
        if name in self.firing and await self._deliver(name, self.firing[name], "resolved") is not None:
            del self.firing[name]

    async def _deliver(self, name: str, number: int, status: str) -> tuple[str, str] | None:
        """Send a webhook; returns the alert's key if it was accepted."""
        starts = f"2026-11-24T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z"
        alert = {
            "status": status, "labels": {"alertname": "ServiceDown", "service": name}, "annotations": {},
            "startsAt": starts, "endsAt": "", "fingerprint": name,
        }  # fmt: skip
        url = f"{self.stack.url('remediator')}/webhook/alertmanager"
        try:
            response = await self.stack.client.post(url, json={"version": "4", "alerts": [alert]}, headers=HEADERS)
        except httpx.HTTPError:
            return None  # not accepted; Alertmanager would send it again
        return (name, normalize_starts_at(starts)) if response.status_code == 200 else None

    async def _kill(self) -> None:
        what = self.random.choices(["remediator", "sshd", "frozen sshd"], [8, 1, 1])[0]
        self.report.kills[what] += 1
        assert self.host.pid is not None
        if what == "remediator":
            await self.launcher.kill(self.stack.pids["remediator"], signal.SIGKILL)
            await self.stack.start_program("remediator")
        elif what == "frozen sshd":
            await self.launcher.kill(self.host.pid, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            await self.launcher.kill(self.host.pid, signal.SIGCONT)
        else:
            await self.launcher.kill(self.host.pid, signal.SIGKILL)
            self.host = await sshd.restart(self.launcher, self.folder / "sshd", self.host)

    async def settle(self) -> None:
        """Let all services recover and resolve all alerts, and wait until all incidents are closed."""
        for name in self.names:
            self._alive(name).touch()

        async def all_closed() -> bool:
            for name in self.names:
                await self._probe(name)
            for name in list(self.firing):
                await self._resolve(name)
            listed = await self.stack.get("remediator", "/api/v1/incidents")
            return not self.firing and bool(listed) and all(each["state"] != "open" for each in listed["incidents"])

        await eventually(all_closed, 600)

    def verify(self) -> Report:
        """Check the log and the record for violations of the invariants."""
        report = self.report
        events = [(kind, name, float(at)) for kind, name, at in map(str.split, self.log.read_text().splitlines())]
        report.restarts = sum(kind == "begin" for kind, _, _ in events)
        report.violations += find_violations(events, self.attempts, self.budget)
        with sqlite3.connect(f"file:{self.folder}/remediator.db?mode=ro", uri=True) as record:
            # An alert may have several starts.
            rows = record.execute("SELECT fingerprint, starts_at, starts FROM alerts").fetchall()
            stored = {
                (name, normalize_starts_at(at))
                for name, first, starts in rows
                for at in (first, *json.loads(starts or "{}"))
            }
            report.violations += [f"the alert {key} was accepted but not stored" for key in report.accepted - stored]
            unfinished = record.execute(
                "SELECT service, kind FROM actions WHERE state IN ('running', 'queued')"
            ).fetchall()
            report.violations += [f"{service} is still locked by a {kind}" for service, kind in unfinished]
            unnotified = record.execute(
                "SELECT DISTINCT incident_id FROM timeline AS refused WHERE event = 'decision'"
                " AND json_extract(detail, '$.reason') = 'attempts-used-up' AND NOT EXISTS (SELECT 1 FROM timeline"
                " WHERE incident_id = refused.incident_id AND event = 'person_needed' AND id <= refused.id + 1)"
            ).fetchall()
            report.violations += [f"incident {one}: attempts used up without person_needed" for (one,) in unnotified]
        requested = (self.folder / "requests").read_text().count("\n") if (self.folder / "requests").exists() else 0
        if requested < report.restarts:
            report.violations.append(f"{report.restarts} restarts began, but sshd received {requested}")
        return report


def host_of(name: str) -> str:
    """Return the host of the service `s0`, `s1`, …"""
    return f"h{int(name[1:]) % HOSTS}"


def find_violations(events: Sequence[tuple[str, str, float]], attempts: int, budget: int) -> list[str]:
    """Find violations in a log of probes (`up`, `down`) and restarts (`begin`, `end`), as (kind, service, time).

    A restart is over when it has ended, or when its deadline has passed.
    """
    violations: list[str] = []
    over_at: dict[str, float] = {}  # by service: when its last restart was over
    seen_down: dict[str, float] = {}  # by service: when a probe last failed
    restarts: dict[str, list[float]] = {}
    for kind, name, at in events:
        if kind == "down":
            seen_down[name] = at
        elif kind == "end":
            over_at[name] = min(at, over_at[name])
        elif kind == "begin":
            before = over_at.get(name)
            running = [
                other
                for other, over in over_at.items()
                if other != name and host_of(other) == host_of(name) and at < over
            ]
            if running:
                violations.append(f"{name} was restarted at {at} while {running[0]} was being restarted")
            if before is not None and at < before:
                violations.append(f"{name} was restarted at {at} while it was being restarted")
            if name not in seen_down or (before is not None and seen_down[name] < before):
                violations.append(f"{name} was restarted at {at} without a failed probe newer than its last restart")
            restarts.setdefault(name, []).append(at)
            over_at[name] = at + COMMAND_WITHIN + KILL_DELAY
    violations += [
        f"{name} was restarted {len(times)} times" for name, times in restarts.items() if len(times) > attempts
    ]
    every = sorted(at for times in restarts.values() for at in times)
    if any(late - early < BUDGET_WINDOW for early, late in zip(every, every[budget:], strict=False)):
        violations.append(f"more than {budget} restarts in ten minutes")
    return violations


async def run_chaos(launcher: Launcher, folder: Path, kills: int, seed: int) -> Report:
    """Cause failures, let everything settle, and verify; the limits are so low that they are reached."""
    chaos = Chaos(launcher, folder, seed, attempts=max(3, kills // 8), budget=max(10, kills // 2))
    await chaos.start()
    try:
        await chaos.run(kills)
        await chaos.settle()
    finally:
        await chaos.stack.client.aclose()
    return chaos.verify()


async def main(kills: int, seed: int) -> int:
    launcher = await Launcher.begin()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = await run_chaos(launcher, Path(folder), kills, seed)
    finally:
        await launcher.end()
    kills_by_kind = ", ".join(f"{count} of {what}" for what, count in report.kills.items())
    print(
        f"{report.kills.total()} kills ({kills_by_kind}), seed {seed}, {len(report.accepted)} alerts accepted,"
        f" {report.restarts} restarts in {time.monotonic() - began:.0f} s: {len(report.violations)} violations"
    )
    for violation in report.violations:
        print(f"  {violation}")
    return 1 if report.violations else 0


if __name__ == "__main__":
    kills, seed = ([int(argument) for argument in sys.argv[1:3]] + [KILLS, SEED][len(sys.argv) - 1 :])[:2]
    sys.exit(uvloop.run(main(kills, seed)))
