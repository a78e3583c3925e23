"""The collector `logs`: its options, and what hosts print."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.collectors.base import CollectorFailure
from exporter.collectors.logs import LogsCollector, LogsCollectorOptions
from exporter.exposition.collector_samples import CollectorSamples
from fleet.host import logs
from fleet.host.logs import SourceOutput, finish_container, parse_sources
from fleet.host.sections import Section, SectionOutput
from fleet.wrapper import render_allow_list
from tests.support import inventory_of, load_problems

SECOND = 10**9
ACCESS_LINE = '10.0.0.1 - - [30/Nov/2026:22:00:00 +0000] "{request}" {status} 12 "-" "curl"'


def options(**written: Any) -> LogsCollectorOptions:
    return LogsCollectorOptions.model_validate(written)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "needs `units`, `containers`, `files` or `access`"),
        ("30s", "needs `units`, `containers`, `files` or `access`"),
        ({"files": ["/var/log/a"]}, "needs `patterns`, such as {error: 'ERROR|exception'}"),
        ({"access": ["/var/log/a"], "patterns": {"error": "x"}}, "has `patterns`, but no `units`, `containers` or `files`"),
        ({"files": ["/a"], "patterns": {"error": "("}}, r"'\(' is not an RE2 regular expression: missing \)"),
        ({"files": ["/a"], "patterns": {"error": r"(\w)\1"}}, "is not an RE2 regular expression: invalid escape sequence"),
        ({"files": ["/a"], "patterns": {"Not a name": "x"}}, "String should match pattern"),
        ({"files": ["a.log"], "patterns": {"error": "x"}}, "'a.log' is not the absolute path of a log file"),
        ({"files": ["/a/../b"], "patterns": {"error": "x"}}, "'/a/../b' is not the absolute path of a log file"),
        ({"files": ["/a b"], "patterns": {"error": "x"}}, "'/a b' is not the absolute path of a log file"),
        ({"files": ["/a,b"], "patterns": {"error": "x"}}, "'/a,b' is not the absolute path of a log file"),
        ({"files": ["/a", "/a"], "patterns": {"error": "x"}}, "/a is listed twice"),
        ({"units": ["a", "a.service"], "patterns": {"error": "x"}}, "a.service is listed twice"),
        ({"containers": ["-x"], "patterns": {"error": "x"}}, "String should match pattern"),
        ({"files": [f"/{n}" for n in range(21)], "patterns": {"error": "x"}}, "at most 20 items"),
    ],
)  # fmt: skip
def test_invalid_options(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogsCollectorOptions.model_validate(written)


def test_an_error_names_the_place(tmp_path: Path) -> None:
    collect = "collect: {logs: {files: [/var/log/app.log], patterns: {error: 'a)'}}}"
    (tmp_path / "defib.yaml").write_text(f"hosts:\n  h:\n    address: h\n    shell: local\n    {collect}\n")
    (problem,) = load_problems(tmp_path)
    expected = "hosts.h.collect.logs.patterns.error: 'a)' is not an RE2 regular expression: unexpected ): a)"
    assert problem == f"defib.yaml:5: {expected}"


def test_names_that_the_wrapper_does_not_accept(tmp_path: Path) -> None:
    ssh = {"user": "defib", "key_file": "key", "wrapper": True}
    collect = {"logs": {"files": ["/var/log/a+b.log"], "access": ["/var/log/a.log"], "patterns": {"error": "x"}}}
    (tmp_path / "defib.yaml").write_text(
        yaml.safe_dump({"hosts": {"h": {"address": "h", "ssh": ssh, "collect": collect}}})
    )
    (problem,) = load_problems(tmp_path)
    assert "files: '/var/log/a+b.log' has characters that the host's wrapper does not accept" in problem


def test_the_interval_has_a_default() -> None:
    assert options(access=["/var/log/nginx/access.log"]).every == 60


def test_the_configuration_of_groups_is_merged(tmp_path: Path) -> None:
    written = {
        "defaults": {"groups": {"web": {"collect": {"logs": {"every": "30s", "access": ["/var/log/nginx/access.log"]}}}}},
        "hosts": {
            "h": {"address": "h", "group": "web", "shell": "local"},
            "own": {"address": "h", "group": "web", "shell": "local", "collect": {
                "logs": {"units": ["app"], "patterns": {"error": "ERROR"}},
            }},
        },
    }  # fmt: skip
    hosts = inventory_of(tmp_path, written).inventory.hosts
    of_group, own = (getattr(hosts[name].collect, "logs") for name in ("h", "own"))  # noqa: B009 - of the kinds' model
    assert (of_group.every, of_group.access, of_group.units) == (30, ["/var/log/nginx/access.log"], [])
    assert (own.every, own.access, own.units) == (30, ["/var/log/nginx/access.log"], ["app.service"])


def test_the_allow_list_has_sources_without_positions() -> None:
    collector = LogsCollector(options(units=["a"], files=["/var/log/a.log"], patterns={"error": "x"}), "h")
    assert render_allow_list(collector.sections()) == "log-files /var/log/a.log\nlog-units a.service\n"


@given(st.text(max_size=300), st.sampled_from([("a",), ("a", "b"), ()]))
def test_any_output_can_be_parsed(text: str, sources: tuple[str, ...]) -> None:
    assert parse_sources(text, sources).keys() <= set(sources)


@given(st.lists(st.text(st.characters(blacklist_characters="\n\r")), max_size=20))
def test_no_line_of_a_log_is_taken_for_another(lines: list[str]) -> None:
    text = (
        "!source a\n!position 1.2.3\n" + "".join(f"+{line}\n" for line in lines) + "!source b\n+x\n!skipped 3 lines\n"
    )
    found = parse_sources(text, ["a", "b"])
    assert found == {
        "a": SourceOutput("1.2.3", lines),
        "b": SourceOutput("", ["x"], skipped=["3 lines"]),
    }


@pytest.mark.parametrize(
    "line", ["!position a;b", "!position ", "!code 600 1", "!code 200 x", "!skipped x lines", "!now x", "!x"]
)
def test_what_no_host_prints_is_ignored(line: str) -> None:
    assert parse_sources(f"!source a\n{line}\n", ["a"]) == {"a": SourceOutput()}


def stamp(at: int) -> str:
    """Return a time within 1,000 seconds as docker prints it."""
    seconds, fraction = divmod(at, SECOND)
    return f"1970-01-01T00:{seconds // 60:02}:{seconds % 60:02}.{fraction:09}Z"


@given(st.lists(st.integers(0, 999 * SECOND), unique=True), st.lists(st.integers(1, 999), max_size=5))
def test_each_line_of_a_container_is_counted_once(times: list[int], readings: list[int]) -> None:
    """Docker prints the lines at `--since` and later; each reading ends at some second."""
    position, known = "0.000000000", sorted(times)
    seen: list[int] = []
    for end in [*sorted(readings), 1000]:
        since = int(position.replace(".", ""))
        printed = [f"{stamp(at)} {at}" for at in known if since <= at < end * SECOND]
        output = SourceOutput(lines=printed, now=1000)
        finish_container(output, position)
        position = output.position
        seen += map(int, output.lines)
    assert seen == known


def test_the_first_reading_of_a_container_finds_its_end() -> None:
    output = SourceOutput(lines=[f"{stamp(5)} ERROR"], now=100)
    finish_container(output, logs.NEW)
    assert (output.position, output.lines, output.error) == ("0.000000006", [], "")
    empty = SourceOutput(now=100)
    finish_container(empty, logs.NEW)
    assert (empty.position, empty.error) == ("0.000000000", "")


@pytest.mark.parametrize(
    ("message", "before", "position"),
    [
        ("Error response from daemon: No such container: x", logs.NEW, "0.000000000"),  # all of a new one is read
        ("Error response from daemon: No such container: x", "7.000000001", "7.000000001"),
        ("permission denied while trying to connect to the Docker daemon socket", logs.NEW, ""),
    ],
)
def test_a_container_that_cannot_be_read(message: str, before: str, position: str) -> None:
    output = SourceOutput(lines=[message, "", "!failed"], now=100)
    finish_container(output, before)
    assert (output.position, output.lines, output.error) == (position, [], message)


def test_a_clock_that_was_set_back_is_followed() -> None:
    output = SourceOutput(now=100)
    finish_container(output, "500.000000000")
    assert (output.position, output.skipped) == ("100.000000000", ["lines while the clock was set back"])


def test_timestamps_with_an_offset_and_less_precision() -> None:
    lines = ["1970-01-01T01:00:00.5+01:00 a", "1970-01-01T00:00:02Z b"]
    output = SourceOutput(lines=lines, now=100)
    finish_container(output, "0.000000000")
    assert (output.position, output.lines) == ("2.000000001", ["a", "b"])


def read(section: str, *names: str) -> dict[str, SourceOutput]:
    argv = ["sh", "-c", logs.SCRIPTS[section], "sh", *names]
    done = subprocess.run(argv, capture_output=True, check=True)
    return parse_sources(done.stdout.decode("utf-8", "replace"), map(logs.source_of, names))


LINES = st.lists(st.sampled_from(["", "ERROR", "ok", "+", "!rest 5", "\0", "ERROR" * 900]), max_size=4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "part", "rotate", "copy"]), LINES), max_size=5))
def test_no_line_of_a_file_is_lost_or_read_twice(steps: list[tuple[str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "app.log"
        path.write_text("before\n")
        position, seen, written = logs.NEW, [], [""]

        def write(text: str) -> None:
            written[0] += text
            with path.open("a") as file:
                file.write(text)

        for number, (step, lines) in enumerate([("append", []), *steps, ("append", [])]):
            write("\n" if written[0] and not written[0].endswith("\n") else "")
            text = "".join(f"{number} {line}\n" for line in lines)
            write(text + "no end" if step == "part" else text)
            if step in ("rotate", "copy"):
                old = path.with_name("app.log.1")
                path.rename(old) if step == "rotate" else old.write_bytes(path.read_bytes())
                path.write_text("")
                write(f"{number} after it\n")
            (found,) = read(logs.FILES, f"{position}/{path}").values()
            position = found.position
            seen += found.lines
        assert [line[:10] for line in seen] == [line[:10].replace("\0", " ") for line in written[0].splitlines()]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (ACCESS_LINE.format(request="GET / HTTP/1.1", status=502), "502"),
        (ACCESS_LINE.format(request="", status=400), "400"),
        (ACCESS_LINE.format(request="-", status=408), "408"),
        (ACCESS_LINE.format(request=r"GET /\x22 500 HTTP/1.1", status=404), "404"),
        (ACCESS_LINE.format(request=r"GET /\" 500 HTTP/1.1", status=404), "404"),
        ('example.org 10.0.0.1 "GET / HTTP/2.0" 304', "304"),
        (ACCESS_LINE.format(request="GET / HTTP/1.1", status="000"), "other"),
        (ACCESS_LINE.format(request="GET / HTTP/1.1", status=600), "other"),
        (ACCESS_LINE.format(request="GET / HTTP/1.1", status=2000), "other"),
        ("no access log", "other"),
    ],
)
def test_the_code_of_a_request(tmp_path: Path, line: str, code: str) -> None:
    path = tmp_path / "access.log"
    path.write_text(f"{line}\n\n")
    (found,) = read(logs.ACCESS, f"none/{path}").values()
    assert found.codes == {code: 1}
    assert found.lines == ([line] if code.startswith("5") else [])


def answering(outputs: Mapping[str, SectionOutput]) -> Any:
    async def read_sections(_sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
        return outputs

    return read_sections


async def test_what_was_cut_off_is_not_counted_and_read_again() -> None:
    collector = LogsCollector(options(files=["/a", "/b"], patterns={"error": "ERROR"}), "h")
    text = "!source /a\n!position 1.2.3\n+ERROR\n!source /b\n+ERROR\n"
    samples = CollectorSamples("h")
    with pytest.raises(CollectorFailure, match="log-files did not answer in time") as raised:
        await collector.collect(answering({"log-files": SectionOutput(124, text)}), samples)
    assert raised.value.late
    assert [(value, labels["source"]) for _, value, labels in samples.added] == [(1, "/a"), (0, "/b")]
    (section,) = collector.sections()
    assert section.names == ("1.2.3//a", "new//b")


async def test_the_counters_of_a_host_that_does_not_answer_stay() -> None:
    collector = LogsCollector(options(files=["/a"], patterns={"error": "ERROR"}), "h")

    async def fails(_sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
        raise OSError

    samples = CollectorSamples("h")
    with pytest.raises(OSError):  # noqa: PT011 - the error above
        await collector.collect(fails, samples)
    assert [(metric, value) for metric, value, _ in samples.added] == [("host_log_matches_total", 0)]
