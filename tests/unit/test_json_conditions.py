"""Conditions on JSON values."""

import re
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from exporter.probes.json_conditions import JsonExpect, Visits, check_json, find_json_problem
from exporter.results import ProbeDetails, ProbeFailure

PAGE = {
    "status": "ok",
    "used": 40,
    "limit": 50,
    "errors": [],
    "replicas": {"ready": 3, "desired": 3},
    "workers": [{"state": "idle"}, {"state": "busy"}],
    "nothing": None,
    "huge": 10**400,
    "one": {"ok": 1},
    "yes": {"ok": True},
}
ADAPTER: TypeAdapter[dict[str, Any]] = TypeAdapter(JsonExpect)


def problem(path: str, expected: Any) -> str:
    return find_json_problem(path, ADAPTER.validate_python({path: expected})[path], PAGE, Visits(), ProbeDetails())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("$.status", {"not": "error"}),
        ("$.status", {"not": {"matches": "^err"}}),
        ("$.status", {"length": 2}),
        ("$.errors", {"length": 0}),
        ("$.workers", {"length": {"above": 1, "below": 3}}),
        ("$.replicas", {"length": 2}),
        ("$.error", {"absent": True}),
        ("$.nothing", {"absent": False}),
        ("$.workers[*].state", {"any": "idle"}),
        ("$.workers[*].state", {"any": {"matches": "^b"}}),
        ("$.workers[*].state", {"any": "idle", "not": "failed"}),
        ("$.used", {"below": "$.limit"}),
        ("$.limit", {"above": "$.used"}),
        ("$.replicas.ready", {"equal_to": "$.replicas.desired"}),
        ("$.workers[*].state", {"not": {"equal_to": "$.status"}}),
        ("$.nothing", None),
        ("$.nothing", {"not": {"length": 1}}),
    ],
)
def test_conditions_that_hold(path: str, expected: Any) -> None:
    assert problem(path, expected) == ""


@pytest.mark.parametrize(
    ("path", "expected", "message"),
    [
        ("$.status", {"not": "ok"}, '$.status is "ok", expected not "ok"'),
        ("$.error", {"not": "ok"}, "$.error selects nothing, expected a value that meets the condition"),
        ("$.status", {"length": 3}, '$.status is "ok", expected a length of 3'),
        ("$.workers", {"length": {"above": 2}}, "expected a length above 2"),
        ("$.workers", {"length": {"below": 2}}, "expected a length below 2"),
        ("$.used", {"length": 2}, "$.used is 40, expected a value with a length"),
        ("$.status", {"absent": True}, '$.status is "ok", expected nothing'),
        ("$.nothing", {"absent": True}, "$.nothing is null, expected nothing"),
        ("$.error", {"absent": False}, "$.error selects nothing, expected any value"),
        ("$.workers[*].state", {"any": "failed"}, '$.workers[*].state selects no value that is "failed"'),
        ("$.errors[*]", {"any": "failed"}, "$.errors[*] selects nothing"),
        ("$.workers[*].state", {"any": "idle", "not": "busy"}, '$.workers[*].state is "busy", expected not "busy"'),
        ("$.limit", {"below": "$.used"}, "$.limit is 50, expected below 40 ($.used)"),
        ("$.used", {"equal_to": "$.limit"}, "$.used is 40, expected 50 ($.limit)"),
        ("$.yes", {"equal_to": "$.one"}, '$.yes is {"ok": true}, expected {"ok": 1} ($.one)'),
        ("$.used", {"equal_to": "$.status"}, '$.used is 40, expected "ok" ($.status)'),
    ],
)
def test_conditions_that_do_not_hold(path: str, expected: Any, message: str) -> None:
    assert message in problem(path, expected)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"below": "$.status"}, "$.status is no number to compare with"),
        ({"above": "$.workers[*]"}, "$.workers[*] selects 2 values, expected one to compare with"),
        ({"equal_to": "$.error"}, "$.error selects no values, expected one to compare with"),
        ({"below": "$.huge"}, "$.huge is too large to compare with"),
    ],
)
def test_nothing_to_compare_with(expected: Any, message: str) -> None:
    with pytest.raises(ProbeFailure, match=re.escape(message)):
        problem("$.used", expected)


def test_a_path_to_compare_with_is_looked_for_once() -> None:
    page = {"values": list(range(9000)), "deep": [{"x": [{}] * 9}] * 900, "limit": 9000}
    expected = ADAPTER.validate_python({"$.values[*]": {"below": "$..limit"}})["$.values[*]"]
    started = time.process_time()
    assert find_json_problem("$.values[*]", expected, page, Visits(), ProbeDetails()) == ""
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("path", "is_refused"),
    [
        ("$.items[5].x", False), ("$.items[*].x", False), ("$.items[*].x[*]", True), ("$..items[*].x", True),
        ("$.items[?@.x == 1]", False), ("$.items[?count($..limit) == 1]", True),
    ],
)  # fmt: skip
def test_paths_look_at_a_limited_number_of_values(path: str, is_refused: bool) -> None:
    page = {"items": [{"y": 1}] * 60_000, "limit": 1}
    visits, expected = Visits(), ADAPTER.validate_python({path: {"absent": True}})[path]
    if is_refused:
        with pytest.raises(ProbeFailure, match="look at more than 200000 values"):
            find_json_problem(path, expected, page, visits, ProbeDetails())
    else:
        assert find_json_problem(path, expected, page, visits, ProbeDetails()) == ""


@pytest.mark.parametrize("path", ["$..a..a..b", "$..a..a..a..b", "$..[?@..[?@..*]]"])
def test_nested_values_are_not_looked_at_again_and_again(path: str) -> None:
    page: dict[str, Any] = {}
    for _ in range(95):
        page = {"a": page}
    started = time.process_time()
    with pytest.raises(ProbeFailure, match="look at more than 200000 values"):
        check_json(ADAPTER.validate_python({path: {"absent": True}}), [page] * 5, ProbeDetails())
    assert time.process_time() - started < 10


@pytest.mark.parametrize("path", ["$.items[?@.y == $.limit]", "$['a:b*..?'].x", '$.items[?@["*"] == 1]'])
def test_paths_that_look_at_few_values(path: str) -> None:
    page = {"items": [{"y": 2}] * 60_000, "limit": 1}
    assert (
        find_json_problem(path, ADAPTER.validate_python({path: {"absent": True}})[path], page, Visits(), ProbeDetails())
        == ""
    )


@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        ("$.log[?search(@.msg, 'error.*timeout')]", True), ("$.log[?search(@.msg, 'timeout.*error')]", False),
        ("$.log[?match(@.msg, 'error .* timeout')]", True), ("$.log[?match(@.msg, 'error')]", False),
        ("$.log[?search(@.line, 'a.b')]", False), ("$.log[?search(@.line, 'a[.\\r]b')]", True),
        ("$.log[?search(@.msg, 7)]", False),
    ],
)  # fmt: skip
def test_patterns_in_paths(path: str, is_found: bool) -> None:
    page = {"log": [{"msg": "error " * 50_000 + "timeout", "line": "a\rb", "pattern": "("}]}
    started = time.process_time()
    expected = ADAPTER.validate_python({path: {"absent": not is_found}})[path]
    assert find_json_problem(path, expected, page, Visits(), ProbeDetails()) == ""
    assert time.process_time() - started < 5


@pytest.mark.parametrize("path", ["$.log[?search(@.msg, @.pattern)]", "$[?match(@.a, value(@.b))]"])
def test_patterns_of_a_response_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="must be written in the path"):
        ADAPTER.validate_python({path: 1})


def test_what_is_compared_is_formatted_once() -> None:
    page = {"items": [1] * 9000, "current": "x" * 900_000}
    expected = ADAPTER.validate_python({"$.items[*]": {"not": {"equal_to": "$.current"}}})["$.items[*]"]
    started = time.process_time()
    assert find_json_problem("$.items[*]", expected, page, Visits(), ProbeDetails()) == ""
    assert time.process_time() - started < 5


def test_all_paths_of_a_response_look_at_a_limited_number_of_values() -> None:
    page = {"items": [{"y": 1}] * 30_000, "up": True}
    one = {"$.items[*].x": {"absent": True}}
    check_json(ADAPTER.validate_python(one), page, ProbeDetails())
    more = {f"$.items[*].x{number}": {"absent": True} for number in range(4)} | {"$.up": True}
    with pytest.raises(ProbeFailure, match=re.escape("$.items[*].x3 and the paths before")):
        check_json(ADAPTER.validate_python(more), page, ProbeDetails())


@pytest.mark.parametrize(
    "expected",
    [
        {}, {"absent": True, "not": 1}, {"above": "used"}, {"length": -1}, {"length": {"over": 1}}, {"not": {}},
        {"not": {"any": 1}}, {"any": {"any": 1}}, {"not": {"absent": True}}, {"any": {"absent": False}}, {"length": {}}, {"any": {"matches": "("}}, {"equal_to": 3}, {"above": True}, {"unknown": 1},
    ],
)  # fmt: skip
def test_conditions_that_are_refused(expected: Any) -> None:
    with pytest.raises(ValidationError, match="must be a value, or a map of matches, above, below"):
        problem("$.used", expected)
