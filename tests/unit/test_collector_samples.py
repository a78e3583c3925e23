"""Limits on the samples of a collector."""

import math

import pytest

from exporter.exposition.collector_samples import LABEL_LIMIT, SERIES_LIMIT, SIZE_LIMIT, CollectorSamples


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_left_out(value: float) -> None:
    samples = CollectorSamples("h")
    samples.add("a", value)
    samples.add("b", 1)
    assert (samples.lines, samples.fault) == ({"b": 'b{host="h"} 1\n'}, "the value of a is not a finite number")


def test_too_long_labels_are_left_out() -> None:
    samples = CollectorSamples("h")
    samples.add("a", 1, name="x" * LABEL_LIMIT)
    samples.add("a", 1, name="y" * (LABEL_LIMIT + 1))
    assert (samples.lines["a"].count("\n"), samples.fault) == (1, "a label of a is longer than 1000 characters")


def test_series_limit() -> None:
    samples = CollectorSamples("h")
    for number in range(SERIES_LIMIT + 10):
        samples.add("a", number, name=f"{number}")
    assert (samples.lines["a"].count("\n"), samples.fault) == (SERIES_LIMIT, "there are more than 5000 series")


def test_size_limit() -> None:
    samples = CollectorSamples("h")
    for number in range(SERIES_LIMIT):
        samples.add("a", 1, name=f"{number:04}" + "x" * (LABEL_LIMIT - 4))
    assert sum(map(len, samples.lines.values())) <= SIZE_LIMIT
    assert samples.fault == f"the samples exceed {SIZE_LIMIT} characters"
