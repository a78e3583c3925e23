"""A live report: what happens to the demo's service, printed line by line while people try things."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from defib.demo.feishu import FeishuSimulator
from defib.demo.stack import Stack
from defib.output import print_text

POLL_EVERY = 0.3  # seconds


class LiveReport:
    """Polls all programs, and prints each change with the time of day."""

    def __init__(self, stack: Stack, feishu: FeishuSimulator, service: str, out: TextIO) -> None:
        self._stack, self._feishu, self._service, self._out = stack, feishu, service, out
        self._values: dict[str, Any] = {}
        self._printed: set[tuple[str, Any]] = set()
        self._silent = True  # during the first poll, which only records what is there

    async def follow(self) -> None:
        """Print changes until cancelled."""
        while True:
            await self._poll()
            self._silent = False
            await asyncio.sleep(POLL_EVERY)

    async def _poll(self) -> None:
        await self._report_status()
        await self._report_alert()
        await self._report_maintenance()
        await self._report_incidents()
        for number, card in enumerate(self._feishu.received):
            self._print_once("card", number, f"Feishu card: {card.title}")

    async def _report_status(self) -> None:
        status = await self._stack.get("exporter", f"/api/v1/services/{self._service}")
        if status and status["up"] is not None:
            message = "up" if status["up"] else f"down: {status['last']['message']}"
            self._print_change("status", status["up"], f"{self._service} is {message}")

    async def _report_alert(self) -> None:
        answer = await self._stack.get("prometheus", "/api/v1/alerts")
        if answer:
            firing = any(
                alert["labels"]["alertname"] == "ServiceDown" and alert["state"] == "firing"
                for alert in answer["data"]["alerts"]
            )
            self._print_change("alert", firing, f"ServiceDown {'fires' if firing else 'is resolved'}")

    async def _report_maintenance(self) -> None:
        answer = await self._stack.get("remediator", "/api/v1/maintenance")
        if answer:
            ids = [each["id"] for each in answer["maintenance"]]
            message = f"maintenance {', '.join(map(str, ids))} begins" if ids else "maintenance ends"
            self._print_change("maintenance", ids, message)

    async def _report_incidents(self) -> None:
        answer = await self._stack.get("remediator", "/api/v1/incidents")
        for row in reversed(answer["incidents"][:3] if answer else []):
            incident = await self._stack.get("remediator", f"/api/v1/incidents/{row['id']}")
            if not incident:
                continue
            for entry in incident["timeline"]:
                self._print_once("timeline", entry["id"], f"incident {incident['id']}: {_format_entry(entry)}")
            state = f"incident {incident['id']} is {incident['state']}"
            self._print_change(f"incident {incident['id']}", incident["state"], state)

    def _print_change(self, name: str, value: Any, text: str) -> None:
        """Print a text if a value has changed."""
        if self._values.get(name) != value:
            self._values[name] = value
            self._print(text)

    def _print_once(self, kind: str, key: Any, text: str) -> None:
        """Print a text if nothing with this kind and key was printed before."""
        if (kind, key) not in self._printed:
            self._printed.add((kind, key))
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._silent:
            # In the time zone that the demo configures, as the output of commands.
            print_text(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}  {text}", self._out)


def _format_entry(entry: Mapping[str, Any]) -> str:
    detail = ", ".join(f"{name} {value}" for name, value in entry["detail"].items() if value not in (None, ""))
    return f"{entry['event']}{f' ({detail})' if detail else ''}"
