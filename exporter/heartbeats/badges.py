"""Badges of heartbeats, as healthchecks has them: an image (SVG), JSON, and the JSON that shields.io reads."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

from exporter.heartbeats.state import HeartbeatState, Timing
from runtime.terminal import escape_controls

BadgeStatus = Literal["up", "late", "down", "unknown"]
COLORS: Mapping[BadgeStatus, str] = {"up": "#3c8c1e", "late": "#b8590a", "down": "#c9342b", "unknown": "#6b6b6b"}
SHIELDS: Mapping[BadgeStatus, str] = {
    "up": "success", "late": "important", "down": "critical", "unknown": "inactive",
}  # fmt: skip
LABEL_LIMIT = 100  # characters
_NOT_XML = re.compile("[\ufffe\uffff]")
_HEIGHT, _PADDING = 20, 6
# Widths of characters in Verdana with 11 px, by what they look like.
_NARROW, _WIDE, _OTHER, _FULL = "fijlrtI|!.,:;'()[]{} -/\\", "mwMW%@", 7.0, 11.0


@dataclass(frozen=True, slots=True)
class BadgeState:
    """How many heartbeats there are, and how many of them are overdue but not late yet, down, and not known."""

    total: int
    grace: int
    down: int
    waiting: int

    @classmethod
    def of(cls, heartbeats: Iterable[tuple[HeartbeatState, Timing]], now: float) -> "BadgeState":
        total = grace = down = waiting = 0
        for state, timing in heartbeats:
            status, _ = state.status(timing, now)
            total += 1
            grace += state.is_overdue(timing, now)
            down += status in ("late", "failed")
            waiting += status == "waiting"
        return cls(total, grace, down, waiting)

    @property
    def status(self) -> BadgeStatus:
        """The worst of all; `late` as healthchecks uses it, for a ping that is due and may still arrive in time."""
        if self.down:
            return "down"
        if self.grace:
            return "late"
        return "unknown" if self.waiting == self.total else "up"


def render_json(state: BadgeState) -> dict[str, Any]:
    return {"status": state.status, "total": state.total, "grace": state.grace, "down": state.down}


def render_shields(label: str, state: BadgeState) -> dict[str, Any]:
    """Return what shields.io's endpoint badge reads (https://shields.io/badges/endpoint-badge)."""
    return {"schemaVersion": 1, "label": _shorten(label), "message": state.status, "color": SHIELDS[state.status]}


def render_svg(label: str, state: BadgeState) -> str:
    """Return an image with the label and the status. The text has the given width in every font."""
    label, message = _shorten(label), state.status
    left, right = (_measure(text) + 2 * _PADDING for text in (label, message))
    width, name = left + right, f"{label}: {message}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" role="img"'
        f" aria-label={quoteattr(name)}><title>{escape(name)}</title>"
        f'<clipPath id="edge"><rect width="{width}" height="{_HEIGHT}" rx="3"/></clipPath>'
        f'<g clip-path="url(#edge)"><rect width="{left}" height="{_HEIGHT}" fill="#4a4a4a"/>'
        f'<rect x="{left}" width="{right}" height="{_HEIGHT}" fill="{COLORS[message]}"/></g>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f"{_render_text(label, _PADDING)}{_render_text(message, left + _PADDING)}</g></svg>"
    )


def _render_text(text: str, x: int) -> str:
    return f'<text x="{x}" y="14" textLength="{_measure(text)}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'


def _measure(text: str) -> int:
    """Return the approximate width of a text in pixels."""
    return max(1, round(sum(map(_measure_character, text))))


def _measure_character(character: str) -> float:
    if unicodedata.east_asian_width(character) in "FW":
        return _FULL
    if unicodedata.combining(character):
        return 0.0
    if character in _NARROW:
        return 4.3
    return 10.5 if character in _WIDE else _OTHER


def _shorten(label: str) -> str:
    """Return a label without characters that cannot be shown."""
    shown = _NOT_XML.sub("?", escape_controls(" ".join(label.split())))
    return shown if len(shown) <= LABEL_LIMIT else f"{shown[: LABEL_LIMIT - 1]}…"
