"""A storm of alerts, deaths and kills over a real sshd that records every restart, and what must be true afterwards.

`make chaos` makes 200 kills; `make chaos ARGS="500 7"` another number of them, by another seed.
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
from defib.demo.stack import WEBHOOK_TOKEN, Stack, reserve_ports
from fleet.shells import KILL_DELAY
from remediator.incidents.alert_starts import normalize
from remediator.policy.gates import BUDGET_WINDOW
from tests.support import eventually

SERVICES, HOSTS = 8, 4
KILLS, SEED = 200, 1
COMMAND_WITHIN = 2.0
HEADERS = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}

# A probe and a restart as they begin and end, in one file that is appended to: its order is the order of events.
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
# The forced command of the key: it records what it is asked to do, whatever comes of that.
_FORCED = """#!/bin/sh
script=$(cat)
case $script in *{folder}/restart*) echo asked >> {folder}/asked ;; esac
printf '%s\\n' "$script" | exec sh -c "$SSH_ORIGINAL_COMMAND"
"""


@dataclass
class Report:
    """What came of a storm."""

    kills: Counter[str] = field(default_factory=Counter)
    accepted: set[tuple[str, str]] = field(default_factory=set)  # (fingerprint, startsAt)
    restarts: int = 0
    wrong: list[str] = field(default_factory=list)


class Storm:
    """Eight services on four hosts behind one sshd, and everything that happens to them."""

    def __init__(self, launcher: Launcher, folder: Path, seed: int, attempts: int, budget: int) -> None:
        self.launcher, self.folder, self.attempts, self.budget = launcher, folder, attempts, budget
        self.random = random.Random(seed)
        self.stack = Stack(launcher, folder)
        self.names = [f"s{number}" for number in range(SERVICES)]
        self.firing: dict[str, int] = {}  # by service: which of its alerts it is
        self.alerts = Counter[str]()
        self.report = Report()
        self.log = folder / "events"

    async def begin(self) -> None:
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
                "host": f"h{number % HOSTS}",
                "probe": {
                    # Deaths are told to the exporter, so that every other probe is one that the remediator asked for.
                    "every": "1h", "retry_every": "1h", "timeout": "2s", "fail_after": 1,
                    "command": {"run": [f"{self.folder}/probe", name]},
                },
                "control": {
                    "command": {"restart": [f"{self.folder}/restart", name]},
                    "timeout": f"{COMMAND_WITHIN:g}s", "start_within": "1s",
                },
                "on_failure": "restart",
            }
            for number, name in enumerate(self.names)
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

    async def rage(self, kills: int) -> None:
        """Deaths, alerts and kills until there were as many as that."""
        while self.report.kills.total() < kills:
            for _ in range(self.random.randint(1, 6)):
                await self._something()
            await asyncio.sleep(self.random.uniform(0.0, 0.8))
            await self._kill()

    async def _something(self) -> None:
        name = self.random.choice(self.names)
        what = self.random.random()
        if what < 0.4:
            self._alive(name).unlink(missing_ok=True)
            await self._probe(name)
            await self._fire(name)
        elif what < 0.6:
            await self._fire(name)  # whether or not anything is wrong with it
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
        """The alert's key where the delivery was accepted."""
        starts = f"2026-11-24T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z"
        alert = {
            "status": status, "labels": {"alertname": "ServiceDown", "service": name}, "annotations": {},
            "startsAt": starts, "endsAt": "", "fingerprint": name,
        }  # fmt: skip
        url = f"{self.stack.url('remediator')}/webhook/alertmanager"
        try:
            answer = await self.stack.client.post(url, json={"version": "4", "alerts": [alert]}, headers=HEADERS)
        except httpx.HTTPError:
            return None  # Alertmanager would send it again; nobody has said that it was taken
        return (name, normalize(starts)) if answer.status_code == 200 else None

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

    async def calm_down(self) -> None:
        """Everything comes back, and all alerts are over."""
        for name in self.names:
            self._alive(name).touch()

        async def over() -> bool:
            for name in self.names:
                await self._probe(name)
            for name in list(self.firing):
                await self._resolve(name)
            listed = await self.stack.get("remediator", "/api/v1/incidents")
            return not self.firing and bool(listed) and all(each["state"] != "open" for each in listed["incidents"])

        await eventually(over, 600)

    def judge(self) -> Report:
        """Hold the log and the record against what must be true."""
        report = self.report
        events = [(kind, name, float(at)) for kind, name, at in map(str.split, self.log.read_text().splitlines())]
        report.restarts = sum(kind == "begin" for kind, _, _ in events)
        report.wrong += judged(events, self.attempts, self.budget)
        with sqlite3.connect(f"file:{self.folder}/remediator.db?mode=ro", uri=True) as record:
            # An alert of several starts is one; each start is kept with it.
            rows = record.execute("SELECT fingerprint, starts_at, starts FROM alerts").fetchall()
            kept = {
                (name, normalize(at)) for name, first, starts in rows for at in (first, *json.loads(starts or "{}"))
            }
            report.wrong += [f"the alert {key} was accepted and is not kept" for key in report.accepted - kept]
            left = record.execute("SELECT service, kind FROM actions WHERE state IN ('running', 'queued')").fetchall()
            report.wrong += [f"{service} is still locked by a {kind}" for service, kind in left]
            overlapping = record.execute(
                "SELECT a.id, b.id FROM actions a JOIN actions b ON a.host = b.host AND a.id < b.id"
                " WHERE b.claimed_at < a.ended_at"
            ).fetchall()
            report.wrong += [f"actions {one} and {other} were on one host at once" for one, other in overlapping]
            unsaid = record.execute(
                "SELECT DISTINCT incident_id FROM timeline AS refused WHERE event = 'refuse'"
                " AND json_extract(detail, '$.reason') = 'attempts-used-up' AND NOT EXISTS (SELECT 1 FROM timeline"
                " WHERE incident_id = refused.incident_id AND event = 'person-needed' AND id <= refused.id + 1)"
            ).fetchall()
            report.wrong += [f"incident {one} ended without saying that a person is needed" for (one,) in unsaid]
        asked = (self.folder / "asked").read_text().count("\n") if (self.folder / "asked").exists() else 0
        if asked < report.restarts:
            report.wrong.append(f"{report.restarts} restarts began, and sshd was asked for {asked}")
        return report


def judged(events: Sequence[tuple[str, str, float]], attempts: int, budget: int) -> list[str]:
    """What of a log of probes (`up`, `down`) and restarts (`begin`, `end`) must not be, with when each was written.

    A restart is over when it has ended, or when its deadline has passed.
    """
    wrong: list[str] = []
    over_at: dict[str, float] = {}  # by service: when its last restart was over
    seen_down: dict[str, float] = {}  # by service: when it was last seen down
    begun: dict[str, list[float]] = {}
    for kind, name, at in events:
        if kind == "down":
            seen_down[name] = at
        elif kind == "end":
            over_at[name] = min(at, over_at[name])
        elif kind == "begin":
            before = over_at.get(name)
            if before is not None and at < before:
                wrong.append(f"{name} was restarted at {at} while it was being restarted")
            if name not in seen_down or (before is not None and seen_down[name] < before):
                wrong.append(f"{name} was restarted at {at} without a failed probe newer than its last restart")
            begun.setdefault(name, []).append(at)
            over_at[name] = at + COMMAND_WITHIN + KILL_DELAY
    wrong += [f"{name} was restarted {len(times)} times" for name, times in begun.items() if len(times) > attempts]
    every = sorted(at for times in begun.values() for at in times)
    if any(late - early < BUDGET_WINDOW for early, late in zip(every, every[budget:], strict=False)):
        wrong.append(f"more than {budget} restarts in ten minutes")
    return wrong


async def storm(launcher: Launcher, folder: Path, kills: int, seed: int) -> Report:
    """Make a storm, let it calm down, and judge; the budgets are such that they are used up."""
    made = Storm(launcher, folder, seed, attempts=max(3, kills // 8), budget=max(10, kills // 2))
    await made.begin()
    try:
        await made.rage(kills)
        await made.calm_down()
    finally:
        await made.stack.client.aclose()
    return made.judge()


async def main(kills: int, seed: int) -> int:
    launcher = await Launcher.begin()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = await storm(launcher, Path(folder), kills, seed)
    finally:
        await launcher.end()
    told = ", ".join(f"{count} of {what}" for what, count in report.kills.items())
    print(
        f"{report.kills.total()} kills ({told}), seed {seed}, {len(report.accepted)} alerts accepted,"
        f" {report.restarts} restarts in {time.monotonic() - began:.0f} s: {len(report.wrong)} wrong"
    )
    for wrong in report.wrong:
        print(f"  {wrong}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    kills, seed = ([int(argument) for argument in sys.argv[1:3]] + [KILLS, SEED][len(sys.argv) - 1 :])[:2]
    sys.exit(uvloop.run(main(kills, seed)))
