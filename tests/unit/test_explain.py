"""The summary of `defib explain`."""

from datetime import UTC
from typing import Any

import pytest

from defib.explain import summarize


def explained(verb: str, reason: str | None = None, detail: str = "", **gates: Any) -> dict[str, Any]:
    """An answer of the API; `gates` are shut, with a detail, or a detail and a time."""
    names = ("notify-only", "blind", "already-up", "attempts-used-up", "maintenance", "approval")
    shut = {name.replace("_", "-"): held if isinstance(held, tuple) else (held, None) for name, held in gates.items()}
    return {
        "service": "web",
        "up": None if "blind" in shut else "already-up" in shut,
        "component": "",
        "firing": [] if verb == "nothing" else ["ServiceDown"],
        "decision": {"verb": verb, "reason": reason, "detail": detail},
        "next_step": None if "attempts-used-up" in shut else "restart",
        "gates": [
            {"gate": name, "open": name not in shut, "detail": shut.get(name, ("", None))[0], "until": shut.get(name, ("", None))[1]}
            for name in names
        ],
    }  # fmt: skip


UP, TIME = "web is up; nothing to do. If it went down now:", "2026-11-24 18:00:00"
UNTIL = ("host h, by ann: disks", "2026-11-24T18:00:00.000000Z")


@pytest.mark.parametrize(
    ("answer", "summary"),
    [
        (
            explained("nothing", already_up=""),
            f"{UP} restart after ServiceDown fires",
        ),
        (
            explained("nothing", already_up="", maintenance=UNTIL),
            f"{UP} restart after ServiceDown fires, but held back by maintenance (host h, by ann: disks) until {TIME}",
        ),
        (
            explained("nothing", already_up="", notify_only=""),
            f"{UP} no action: notify-only",
        ),
        (explained("nothing"), "web is down, but no alert fires yet; next: restart after ServiceDown fires"),
        (
            explained("nothing", blind="no answer"),
            "the status of web is unknown; nothing to do. If it went down now: restart after ServiceDown fires",
        ),
        (explained("act"), "web is down; now: restart"),
        (
            explained("wait", "maintenance", UNTIL[0], maintenance=UNTIL),
            f"web is down; waiting: maintenance (host h, by ann: disks) until {TIME}",
        ),
        (
            explained("refuse", "attempts-used-up", "restart: 3 of 3", attempts_used_up="restart: 3 of 3"),
            "web is down; no action: attempts-used-up (restart: 3 of 3)",
        ),
        (
            {**explained("wait", "backing-off", "after 1 try"), "firing": ["AgentStuck"]},
            "web is stuck; waiting: backing-off (after 1 try)",
        ),
        (
            {**explained("act"), "firing": ["AgentStuck", "ServiceDown"]},
            "web is down; now: restart",
        ),
        (
            explained("refuse", "already-up", already_up=""),
            "web is up; nothing to do, although ServiceDown still fires",
        ),
    ],
)
def test_the_summary(answer: dict[str, Any], summary: str) -> None:
    assert summarize(answer, "ServiceDown", UTC) == summary
