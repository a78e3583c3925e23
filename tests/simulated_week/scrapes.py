"""When Prometheus scrapes and evaluates, and when the exporter runs."""

from collections.abc import Iterator, Sequence
from functools import cached_property

from tests.simulated_week.events import MINUTE, MINUTES, START, WEEK, Week

EXPORTER_LABELS = {"job": "defib-exporter", "instance": "exporter:9999"}


class Scrapes:
    """One scrape a minute. Minutes are counted from the beginning of the week."""

    def __init__(self, week: Week) -> None:
        self._week = week
        self.count = MINUTES

    @cached_property
    def times(self) -> list[int]:
        """Unix seconds."""
        return [START + minute * 60 for minute in range(MINUTES)]

    @cached_property
    def is_running(self) -> list[bool]:
        """Whether Prometheus runs: it scrapes, evaluates, and writes staleness markers."""
        return [minute * MINUTE not in self._week.pause for minute in range(MINUTES)]

    @cached_property
    def is_exporter_scraped(self) -> list[bool]:
        week = self._week
        return [
            running
            and minute not in week.lost_scrapes
            and not any(minute * MINUTE in gap for gap in week.exporter_gaps)
            for minute, running in enumerate(self.is_running)
        ]

    @cached_property
    def exporter_runs(self) -> Sequence[tuple[float, float]]:
        gaps = self._week.exporter_gaps
        begins = [0.0, *(gap.end for gap in gaps)]
        ends = [*(gap.begin for gap in gaps), WEEK]
        return list(zip(begins, ends, strict=True))

    def minutes_between(self, begin: float, end: float) -> Iterator[int]:
        """Yield the minutes in which the exporter is scraped."""
        for minute in range(MINUTES):
            if begin <= minute * MINUTE < end and self.is_exporter_scraped[minute]:
                yield minute
