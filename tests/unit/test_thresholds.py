"""Thresholds of hosts and services: what is read, what is published, and that the rules have the same defaults."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from exporter.exposition.service_series import ServiceSeries, render_host
from exporter.service_state import ServiceState
from fleet.inventory.thresholds import HostThresholds, ServiceThresholds, ThresholdTable
from fleet.inventory.units import format_ratio, parse_ratio
from tests.metric_names import rules
from tests.support import inventory_of

TABLES: dict[str, type[ThresholdTable]] = {"host": HostThresholds, "service": ServiceThresholds}
PROBE = {"tcp": {"address": "h:1"}}


def defaults_of(table: type[ThresholdTable]) -> dict[tuple[str, str], float]:
    return {(resource, severity): value for resource, thresholds in table() for severity, value in thresholds}


def test_the_built_in_thresholds_are_the_operations_standard() -> None:
    built_in = defaults_of(HostThresholds)
    for resource, warning, critical in (
        ("filesystem", 0.8, 0.9), ("inodes", 0.8, 0.9), ("memory", 0.85, 0.95), ("load", 4, 8),
    ):  # fmt: skip
        assert (built_in[resource, "warning"], built_in[resource, "critical"]) == (warning, critical)


def test_the_rules_fall_back_to_the_built_in_thresholds_of_hosts() -> None:
    recorded = [rule for rule in rules() if rule.get("record") == "host:threshold:max"]
    found = {}
    for rule in recorded:
        (number,) = re.findall(r"or group by \(host\) .* \* ([0-9.]+)$", rule["expr"].strip(), re.MULTILINE)
        resource, severity = rule["labels"]["resource"], rule["labels"]["severity"]
        assert f'resource="{resource}", severity="{severity}"' in rule["expr"]
        found[resource, severity] = float(number)
    assert found == defaults_of(HostThresholds)
    assert len(found) == len(recorded)


def test_the_rules_fall_back_to_the_built_in_thresholds_of_services() -> None:
    use = r'service:threshold:max\{resource="(\w+)", severity="(\w+)"\}'
    share = r"\s*(?:or on \(service\) 0\.\d \* min by \(service\) \(service:certificate_lifetime_seconds:min\) < \d+ \* 86400\n)?"
    fallback = share + r"\s*or on \(service\) group by \(service\) \(.*\) \* ([0-9.]+)( \* 86400)?\n"
    uses = [each for rule in rules() for each in re.findall(use + fallback, rule["expr"])]
    for resource, severity, number, days in uses:
        expected = defaults_of(ServiceThresholds)[resource, severity]
        assert float(number) * (86400 if days else 1) == expected, (resource, severity)
    assert {(resource, severity) for resource, severity, _, _ in uses} == defaults_of(ServiceThresholds).keys()
    assert len(uses) == sum(rule["expr"].count("service:threshold:max{") for rule in rules())


@pytest.mark.parametrize("scope", TABLES)
def test_each_threshold_is_compared_with_by_an_alert_of_its_severity(scope: str) -> None:
    pattern = rf'{scope}:threshold:max\{{resource="(\w+)", severity="(\w+)"\}}'
    alerts = [rule for rule in rules() if "alert" in rule]
    used = {(use, rule["labels"]["severity"]) for rule in alerts for use in re.findall(pattern, rule["expr"])}
    assert all(severity == of_alert for (_, severity), of_alert in used)
    assert {use for use, _ in used} == defaults_of(TABLES[scope]).keys()


@pytest.mark.parametrize(
    ("written", "resource", "expected"),
    [
        ({"filesystem": {"warning": "70%"}}, "filesystem", {"warning": 0.7, "critical": 0.9}),
        ({"filesystem": {"warning": 0.7, "critical": "82.5%"}}, "filesystem", {"warning": 0.7, "critical": 0.825}),
        ({"filesystem": {"warning": "99.9%", "critical": False}}, "filesystem", {"warning": 0.999, "critical": math.inf}),
        ({"filesystem": False}, "filesystem", {"warning": math.inf, "critical": math.inf}),
        ({"filesystem": "off"}, "filesystem", {"warning": math.inf, "critical": math.inf}),
        ({"filesystem": None, "load": {"warning": None}}, "filesystem", {"warning": 0.8, "critical": 0.9}),
        ({"load": {"warning": "off", "critical": 2}}, "load", {"warning": math.inf, "critical": 2}),
        ({"load": {"warning": "6.5"}}, "load", {"warning": 6.5, "critical": 8}),  # as from a reference
        ({"clock_offset": {"warning": "500ms"}}, "clock_offset", {"warning": 0.5}),
        ({"filesystem_available": {"warning": "2TiB"}}, "filesystem_available", {"warning": 2.0**41, "critical": 100 * 2.0**30}),
        ({"filesystem_available": "off"}, "filesystem_available", {"warning": math.inf, "critical": math.inf}),
        ({"network_errors": {"warning": "0.1%"}}, "network_errors", {"warning": 0.001}),
        ({"restarts": {"warning": 20}}, "restarts", {"warning": 20}),
        ({"gpu_temperature": {"warning": 83}}, "gpu_temperature", {"warning": 83}),
    ],
)  # fmt: skip
def test_values(written: dict[str, Any], resource: str, expected: dict[str, float]) -> None:
    thresholds = HostThresholds.model_validate(written)
    assert dict(getattr(thresholds, resource)) == expected
    assert HostThresholds.model_validate(thresholds.model_dump(mode="json")) == thresholds


@pytest.mark.parametrize("value", [0, 1, 80, "0%", "100%", "-1%", "80 %", "", True, None, [], "nan", "1e-1"])
def test_what_is_no_ratio(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be more than 0% and less than 100%, such as 80% or 0\.8, not "):
        parse_ratio(value)


@given(st.integers(1, 9999))
def test_a_ratio_reads_back_as_it_was_written(hundredths: int) -> None:
    assert parse_ratio(format_ratio(hundredths / 10000)) == hundredths / 10000


@given(st.integers(1, 99), st.integers(1, 99))
def test_warnings_come_first(warning: int, critical: int) -> None:
    written = {"warning": f"{warning}%", "critical": f"{critical}%"}
    if warning < critical:
        HostThresholds.model_validate({"memory": written})
    else:
        with pytest.raises(
            ValidationError, match=rf"warning \({warning}%\) must be less than critical \({critical}%\)"
        ):
            HostThresholds.model_validate({"memory": written})


def test_only_thresholds_that_differ_are_published(tmp_path: Path) -> None:
    loaded = inventory_of(tmp_path, {
        "hosts": {
            "plain": {"address": "a", "thresholds": {"memory": {"warning": "85%"}}},
            "own": {"address": "b", "thresholds": {
                "filesystem": {"warning": "70%"}, "filesystem_available": {"warning": "off"}, "load": {"critical": False},
            }},
        },
        "services": {
            "plain": {"probe": PROBE},
            "own": {"probe": PROBE, "thresholds": {"certificate": {"warning": "14d", "critical": "off"}, "slowdown": "off"}},
        },
    })  # fmt: skip
    inventory = loaded.inventory
    lines = {name: render_host(host)["host_threshold"].splitlines() for name, host in inventory.hosts.items()}
    assert lines == {
        "plain": [],
        "own": [
            'host_threshold{host="own",resource="filesystem",severity="warning"} 0.7',
            'host_threshold{host="own",resource="filesystem_available",severity="warning"} +Inf',
            'host_threshold{host="own",resource="load",severity="critical"} +Inf',
        ],
    }
    series = {
        name: ServiceSeries(service).render(ServiceState(), None, {})["service_threshold"]
        for name, service in inventory.services.items()
    }
    labels = 'service="own",host="",provider="other",category="other"'
    assert series["plain"] == ""
    assert series["own"].splitlines() == [
        f'service_threshold{{{labels},resource="certificate",severity="warning"}} 1209600.0',
        f'service_threshold{{{labels},resource="certificate",severity="critical"}} -Inf',
        f'service_threshold{{{labels},resource="slowdown",severity="warning"}} +Inf',
    ]


def test_thresholds_are_inherited_from_the_group_the_fleet_and_the_template(tmp_path: Path) -> None:
    loaded = inventory_of(tmp_path, {
        "defaults": {
            "host": {"thresholds": {"filesystem": {"warning": "70%", "critical": "80%"}, "memory": False}},
            "groups": {"gpu": {"thresholds": {"filesystem": {"critical": "85%"}, "load": {"critical": 64}}}},
            "thresholds": {"certificate": {"warning": "28d"}, "slowdown": {"warning": 5}},
        },
        "hosts": {
            "one": {"address": "a", "group": "gpu", "labels": {"days": "3d"}},
            "two": {"address": "b", "group": "gpu", "thresholds": {"filesystem": {"warning": "75%"}, "memory": {"critical": "99%"}}},
            "three": {"address": "c", "thresholds": {"filesystem": None}},
        },
        "templates": {
            "t": {"for_hosts": {"group": "gpu"}, "parameters": {"days": "2d"},
                  "service": {"probe": PROBE, "thresholds": {"certificate": {"critical": "{days}"}}}},
        },
        "services": {
            "plain": {"probe": PROBE}, "own": {"probe": PROBE, "thresholds": {"certificate": {"warning": "10d"}}},
        },
    })  # fmt: skip
    inventory = loaded.inventory
    one, two, three = (inventory.hosts[name].thresholds for name in ("one", "two", "three"))
    assert (one.filesystem.warning, one.filesystem.critical, one.load.critical) == (0.7, 0.85, 64)
    assert (two.filesystem.warning, two.filesystem.critical) == (0.75, 0.85)
    assert (one.memory.warning, two.memory.warning, two.memory.critical) == (math.inf, 0.85, 0.99)
    assert (three.filesystem.warning, three.filesystem.critical, three.memory.critical) == (0.8, 0.9, math.inf)
    services = {name: service.thresholds for name, service in inventory.services.items()}
    days = {
        name: (each.certificate.warning / 86400, each.certificate.critical / 86400) for name, each in services.items()
    }
    assert days == {"plain": (28, 7), "own": (10, 7), "t-one": (28, 2), "t-two": (28, 2)}
    assert {each.slowdown.warning for each in services.values()} == {5}
