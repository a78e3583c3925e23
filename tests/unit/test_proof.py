"""Marks around a command's output, when a host sends something else in their place, piece by piece."""

from collections.abc import Iterator

import pytest

from fleet.host.sections import Section, SectionOutput, SectionParser
from fleet.shells import OUTPUT_LIMIT
from fleet.shells.proof import CommandMarkers, MarkedOutput

DOCKER = Section("docker", "")


def pieces(sent: bytes, size: int) -> Iterator[bytes]:
    return (sent[at : at + size] for at in range(0, len(sent), size))


def heard(marks: CommandMarkers, *sent: bytes) -> MarkedOutput:
    between = MarkedOutput(marks)
    for piece in sent:
        between.add(piece)
    return between


@pytest.mark.parametrize("status", [b"0", b"7", b"255"])
def test_a_status_comes_however_it_is_cut(status: bytes) -> None:
    marks = CommandMarkers()
    sent = b"hello\n" + marks.begin + b"output" + marks.end + status + b"\nbye"
    for size in (1, 7, len(sent)):
        between = heard(marks, *pieces(sent, size))
        assert (between.text, between.status) == ("output", int(status))


def test_a_false_end_mark_does_not_hide_the_true_one() -> None:
    marks = CommandMarkers()
    sent = marks.begin + b"a" + marks.end + b"oops\n" + marks.end + b"3\n"
    for size in (1, 7, len(sent)):
        assert heard(marks, *pieces(sent, size)).status == 3


@pytest.mark.parametrize("after", [b"x\n", b"\n", b"99999\n", b"x" * 100])
def test_an_end_mark_without_a_status_is_output(after: bytes) -> None:
    marks = CommandMarkers()
    between = heard(marks, marks.begin + b"a" + marks.end, after, b"more")
    assert between.status is None
    assert between.text.startswith("a@defib-")


def test_what_follows_an_end_mark_without_a_status_is_passed_on_as_it_comes() -> None:
    """Held back until a status came, it would be kept and searched without end."""
    marks, passed = CommandMarkers(), bytearray()
    between = MarkedOutput(marks, passed.extend)
    between.add(marks.begin + marks.end)
    for _ in range(1000):
        between.add(b"x" * 4096)
    assert len(passed) >= 999 * 4096
    assert len(between.text) <= 2 * OUTPUT_LIMIT


def test_a_mark_is_found_however_it_is_cut() -> None:
    told: list[tuple[str, SectionOutput]] = []
    sent = b"banner\n@defib-0 docker\n" + b"x\n" * 500 + b"y" * 500 + b"\n@defib-0 docker 0\n"
    for size in (1, 7, 300, len(sent)):
        listener = SectionParser("@defib-0", [DOCKER], lambda name, output: told.append((name, output)))
        for piece in pieces(sent, size):
            listener.feed(piece)
        assert told.pop() == ("docker", SectionOutput(0, "x\n" * 500 + "y" * 500))


@pytest.mark.parametrize("status", [b"1" * 5000, b"1000"])
def test_what_is_no_status_ends_no_section(status: bytes) -> None:
    told: list[str] = []
    listener = SectionParser("@defib-0", [DOCKER], lambda name, _output: told.append(name))
    listener.feed(b"@defib-0 docker\n@defib-0 docker " + status + b"\n@defib-0 docker 0\n")
    assert told == ["docker"]
