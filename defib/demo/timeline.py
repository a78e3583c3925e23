"""Timeline: the events of the demo's first incident, in seconds since the service was killed."""

import asyncio
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TextIO

from defib.demo.feishu import FeishuSimulator
from defib.demo.stack import Stack
from defib.output import print_text

POLL_EVERY = 0.1  # seconds


class Timeline:
    """Collects the events as each program records them, and prints them."""

    def __init__(self, stack: Stack, feishu: FeishuSimulator, service: str, out: TextIO) -> None:
        self._stack, self._feishu, self._service, self._out = stack, feishu, service, out
        self._killed_at = time.time()
        self._seen: set[tuple[str, Any]] = set()
        self.events: list[dict[str, Any]] = []
        self._add("killed", self._killed_at, service)

    async def follow(self, within: float) -> bool:
        """Collect events until the incident is closed; return whether the remediator restarted the service."""
        try:
            async with asyncio.timeout(within):
                while True:
                    await self._poll()
                    outcome = await self._outcome()
                    if outcome is not None:
                        return outcome
                    await asyncio.sleep(POLL_EVERY)
        except TimeoutError:
            print_text(f"the service did not recover within {within:g} s", sys.stderr)
            return False
        finally:
            self.events.sort(key=lambda event: float(event["t"]))

    async def _outcome(self) -> bool | None:
        """Return whether the service recovered by a restart; None until the last card is sent."""
        answer = await self._stack.get("remediator", "/api/v1/incidents")
        incidents = answer["incidents"] if answer else []
        if not incidents or incidents[0]["state"] == "open":
            return None
        if not any("Recovered" in card.title or "Removed" in card.title for card in self._feishu.received):
            return None
        await self._poll()
        return bool(incidents[0]["state"] == "recovered" and incidents[0]["recovered_by"] == "defib")

    async def _poll(self) -> None:
        status = await self._stack.get("exporter", f"/api/v1/services/{self._service}")
        if status and status["up"] is False:
            self._add("down", unix_time(status["since"]), status["last"]["message"])
        alerts = await self._stack.get("prometheus", "/api/v1/alerts")
        for alert in alerts["data"]["alerts"] if alerts else []:
            if alert["labels"]["alertname"] == "ServiceDown" and alert["state"] == "firing":
                self._add("firing", unix_time(alert["activeAt"]), "ServiceDown")
        incident = await self._stack.get("remediator", "/api/v1/incidents/1")
        if incident:
            self._add_incident(incident)
        for number, card in enumerate(self._feishu.received):
            self._add("notification", card.at, card.title, key=number)

    def _add_incident(self, incident: Mapping[str, Any]) -> None:
        for action in incident["actions"]:
            self._add("action", unix_time(action["claimed_at"]), f"{action['kind']} over SSH", key=action["id"])
            if action["up_at"]:
                self._add("recovered", unix_time(action["up_at"]), "the first successful probe", key=action["id"])
        for entry in incident["timeline"]:
            if entry["event"] == "alert_resolved":
                self._add("resolved", unix_time(entry["at"]), f"by {entry['detail']['by']}", key=entry["id"])

    def _add(self, event: str, at: float, what: str, key: Any = None) -> None:
        if (event, key) in self._seen:
            return
        self._seen.add((event, key))
        seconds = round(at - self._killed_at, 3)
        self.events.append({"t": seconds, "event": event, "what": what})
        print_text(f"{seconds:+8.2f} s  {event:<13} {what}", self._out)


def unix_time(text: str) -> float:
    """Parse a time in RFC 3339; the nanoseconds of Prometheus are cut off."""
    return datetime.fromisoformat(text).timestamp()
