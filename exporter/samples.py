"""What a collector measured, as lines of the page."""

from functools import lru_cache

from exporter.page import labels


@lru_cache(maxsize=100_000)
def _series(metric: str, host: str, *more: tuple[str, str]) -> str:
    """A line up to its value, which is the same at every run."""
    return f"{metric}{{{labels({'host': host, **dict(more)})}}} "


class Samples:
    """Lines by metric, all of one host; what has no value has no line."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.lines: dict[str, str] = {}

    def add(self, metric: str, value: float | None, **more: str) -> None:
        if value is not None:
            series = _series(metric, self._host, *more.items())
            self.lines[metric] = f"{self.lines.get(metric, '')}{series}{value}\n"
