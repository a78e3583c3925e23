"""Reports what an AI agent does to Defib. Copy this file into the agent: it needs Python 3.8 and no packages.

    from agent_report import AgentReport

    report = AgentReport()           # the URL is in $DEFIB_PING_URL: defib heartbeat url SERVICE
    report.request(ok=True)          # after each request to the model; ok=False after an answer with the status 429
    report.send(task="T-17", progress=4, pending=2, rounds=12)

A report that cannot be sent does not stop the agent: `send` returns False, and the next one has the requests of both.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

TIMEOUT = 10.0  # seconds
ATTEMPTS = 3
TRY_LATER = (429, 500, 502, 503, 504)


class AgentReport:
    """Sends pings. `url` is a secret; without one, it is read from the environment."""

    def __init__(self, url: str | None = None) -> None:
        self._url = url or os.environ["DEFIB_PING_URL"]
        self._requests = {"ok": 0, "429": 0}
        self._seconds: float | None = None

    def request(self, ok: bool, seconds: float | None = None) -> None:
        """Count a request to the model: whether it was answered, or refused with 429, and how long it took."""
        self._requests["ok" if ok else "429"] += 1
        if seconds is not None:
            self._seconds = seconds

    def start(self) -> bool:
        """Report that a run has started. It must end within `start_grace`."""
        return self._post("/start", {})

    def fail(self, **values: Any) -> bool:
        """Report that a run has failed."""
        return self._report("/fail", values)

    def send(self, **values: Any) -> bool:
        """Report a success. `values` are `task`, `progress`, `pending`, `rounds`, `rounds_limit` and `waiting_for`."""
        return self._report("", values)

    def _report(self, path: str, values: dict[str, Any]) -> bool:
        sent = dict(self._requests)
        report = dict(values, llm_requests=sent)
        if self._seconds is not None:
            report["response_seconds"] = self._seconds
        done = self._post(path, report)
        if done:
            self._requests = {name: count - sent[name] for name, count in self._requests.items()}
        return done

    def _post(self, path: str, report: dict[str, Any]) -> bool:
        request = urllib.request.Request(self._url + path, json.dumps(report).encode())
        request.add_header("Content-Type", "application/json")
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT):
                    return True
            except urllib.error.HTTPError as error:
                if error.code not in TRY_LATER:
                    return False
            except OSError:
                pass
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
        return False
