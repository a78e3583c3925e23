"""Charts as SVG, without styles of their own: classes name what is drawn, and the style sheet has the colours."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

SLOTS = 50  # of a strip
SLOT, BAR, HEIGHT = 4, 3, 18  # width of a slot and of its bar, and the height of a strip
# What a character of `recent` in the exporter's answer stands for. Failures are also lower, so that a strip can be read
# without colours.
_BARS = {"+": ("ok", 4, 14), "-": ("bad", 0, 18), "?": ("unknown", 9, 9)}

TABLE_ROWS = 24
LATE = 0.05  # the part of a chart without values at its start that readers are told about

Point = tuple[float, float]
Lines = Sequence[tuple[str, Sequence[Point]]]  # by name


@dataclass(frozen=True)
class Chart:
    """Lines with one scale: `name` is the key of its title, and `of` what it is about, if there are several.

    `unit` is `seconds`, `per_minute`, or `ratio`, whose scale ends at 1.
    """

    name: str
    unit: str
    lines: Lines
    of: str = ""

    @property
    def top(self) -> float:
        """The value at the upper edge."""
        if self.unit == "ratio":
            return 1.0
        return nice_top(max((value for _, points in self.lines for _, value in points), default=0.0))


def draw_strip(recent: str, label: str) -> Markup:
    """Return the last checks as bars, the newest on the right; slots without a check are dots."""
    padded = recent[-SLOTS:].rjust(SLOTS)
    paths: dict[str, list[str]] = {}
    for start, run in _runs(padded):
        kind, top, height = _BARS.get(padded[start], ("none", 8, 2))
        bars = "".join(f"M{(start + n) * SLOT} {top}h{BAR}v{height}h-{BAR}z" for n in range(run))
        paths.setdefault(kind, []).append(bars)
    drawn = Markup("").join(Markup('<path class="{}" d="{}"/>').format(kind, "".join(d)) for kind, d in paths.items())
    return Markup(
        '<svg class="strip" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(SLOTS * SLOT - 1, HEIGHT, label, drawn)


def _runs(text: str) -> list[tuple[int, int]]:
    """Return where runs of one character start, and their lengths."""
    runs, at = [], 0
    for _, group in groupby(text):
        length = len(list(group))
        runs.append((at, length))
        at += length
    return runs


def draw_sparkline(points: Sequence[Point], start: float, end: float, label: str, width: int = 96) -> Markup:
    """Return a line of (Unix time, value) from `start` to `end`; it is broken where values are missing."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return Markup("")
    path = _line(points, start, end, max(values) or 1.0, width, HEIGHT, gap=(end - start) / 24)
    return Markup('<svg class="spark" viewBox="0 0 {} {}" role="img" aria-label="{}"><path d="{}"/></svg>').format(
        width, HEIGHT, label, path
    )


def _line(points: Sequence[Point], start: float, end: float, top: float, width: int, height: int, *, gap: float) -> str:
    """Return the path of a line; a time without points that is longer than `gap` seconds breaks it."""
    parts: list[str] = []
    last = -math.inf
    for at, value in points:
        if not math.isfinite(value):
            continue
        x = (at - start) / (end - start) * width
        y = height - 1 - value / top * (height - 2)
        # A line of no length is a dot, which shows a value without neighbours.
        parts.append(f"M{x:.1f} {y:.1f}h0" if at - last > gap else f"L{x:.1f} {y:.1f}")
        last = at
    return "".join(parts)


def draw_chart(chart: Chart, start: float, end: float, label: str, names: Mapping[str, str]) -> Markup:
    """Return lines with a grid between two Unix times. Scripts show the values that it has as data, under `names`."""
    width, height, top, gap = 600, 120, chart.top, (end - start) / 60
    grid = "".join(f"M0 {height * n / 4:.0f}h{width}" for n in range(5))
    lines = Markup("").join(
        Markup('<path class="line s{}" d="{}"/>').format(n, _line(points, start, end, top, width, height, gap=gap))
        for n, (_, points) in enumerate(chart.lines)
    )
    values = [
        {"name": names.get(name, name), "points": [(round(at), float(f"{value:.4g}")) for at, value in points]}
        for name, points in chart.lines
    ]
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}" data-start="{}"'
        ' data-end="{}" data-unit="{}" data-lines="{}"><path class="grid" d="{}"/>{}<path class="cursor"/></svg>'
    ).format(width, height, label, f"{start:.0f}", f"{end:.0f}", chart.unit, json.dumps(values), grid, lines)


def find_late_start(times: Iterable[float], start: float, end: float) -> float | None:
    """Return the first time of the values of a chart if that is clearly later than its start."""
    first = min(times, default=start)
    return first if first - start > LATE * (end - start) else None


def tabulate(lines: Lines, start: float, end: float) -> list[tuple[float, list[float | None]]]:
    """Return the highest value of each line in each of some equal intervals, the newest first, with its end."""
    length = (end - start) / TABLE_ROWS
    rows = []
    for row in range(TABLE_ROWS, 0, -1):
        until = start + row * length
        values = [[value for at, value in points if until - length < at <= until] for _, points in lines]
        rows.append((until, [max(each) if each else None for each in values]))
    return rows


def draw_states(states: Sequence[tuple[float, float, str]], start: float, end: float, label: str) -> Markup:
    """Return a band of (from, to, state), as times between `start` and `end` in Unix time."""
    width, height = 600, 16
    bars = Markup("").join(
        Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
            state, f"{(begin - start) / (end - start) * width:.1f}", 0 if state == "bad" else 4,
            f"{max(0.5, (until - begin) / (end - start) * width):.1f}", height if state == "bad" else height - 4,
        )
        for begin, until, state in states
    )  # fmt: skip
    return Markup(
        '<svg class="states" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, label, bars)


def nice_top(highest: float) -> float:
    """Return a round number at or above the highest value, for the scale of a chart."""
    if highest <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(highest))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= highest))
