import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as _parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as _parse_text

from exporter.exposition.label_values import escape_value, unescape_value
from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.sample_lines import parse_lines
from exporter.exposition.service_series import FAMILIES, ServiceSeries, render_host
from exporter.results import Component, ProbeDetails, ProbeResult, TlsInfo
from exporter.service_state import ServiceState
from fleet.inventory.model import Host, Service
from fleet.inventory.thresholds import HostThresholds
from runtime.terminal import UNSAFE
from tests.support import inventory_of

parse_openmetrics: Callable[[str], Iterable[Any]] = _parse_openmetrics
parse_text: Callable[[str], Iterable[Any]] = _parse_text


def text_of(page: MetricsPage, *, openmetrics: bool = False) -> str:
    return b"".join(page.chunks(openmetrics=openmetrics)).decode()


@pytest.fixture
def service(tmp_path: Path) -> Service:
    written = {"name": 'a "b"\\c\nd', "provider": "nginx", "probe": {"http": {"url": "http://h/"}}}
    return inventory_of(tmp_path, {"services": {"web": written}}).inventory.services["web"]


@pytest.fixture
def page(service: Service) -> MetricsPage:
    made = MetricsPage(FAMILIES)
    seen = ProbeDetails(
        phases={"connect": 0.25, "transfer": 0.5},
        gauges={"service_http_status_code": 503, "service_tls_certificate_expiry_timestamp_seconds": 2e9},
        tls=TlsInfo("TLSv1.3", 'CN="x"'),
        components={"a": Component(up=True, values={"cpu": 1}), "b\n": Component(up=False)},
    )
    result = ProbeResult(False, "status", "answered 503", 1000.0, 0.75, seen)
    state = ServiceState().after_result(result, fail_after=1, recover_after=1)
    made.put("web", ServiceSeries(service).render(state, result, {"status": 1}))
    thresholds = HostThresholds.model_validate({"load": {"warning": "off"}})
    made.put("host h", render_host(Host(address="10.0.0.1", labels={"rack": "a3"}, thresholds=thresholds)))
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(st.characters(codec=None)) | st.text("\\x1bu20e\x1b\r\u202e"), min_size=1, max_size=5, unique=True
    )
)
def test_values_that_servers_choose(service: Service, names: list[str]) -> None:
    """The page has no control characters, and components whose names differ have different series."""
    made = MetricsPage(FAMILIES)
    details = ProbeDetails(components={name: Component(up=True) for name in names}, tls=TlsInfo("TLSv1.3", names[0]))
    result = ProbeResult(True, None, "", 1000.0, 0.75, details)
    state = ServiceState().after_result(result, fail_after=1, recover_after=1)
    made.put("web", ServiceSeries(service).render(state, result, {}))
    text = text_of(made)
    assert UNSAFE.search(text) is None
    (components,) = [family for family in parse_text(text) if family.name == "service_component_up"]
    values = [sample.labels["component"] for sample in components.samples]
    assert len(set(values)) == len(names)
    lines = made.get("web")["service_component_up"]
    assert [sample.labels["component"] for sample in parse_lines(lines)] == names
    plain = [name for name in names if UNSAFE.search(name) is None and "\\" not in name]
    assert set(plain) <= set(values)


def test_values_are_escaped_in_linear_time() -> None:
    started = time.process_time()
    for value in ("\\" * 1_000_000, "\\x" * 500_000, "\x1b" * 1_000_000):
        assert unescape_value(escape_value(value)) == value
    assert time.process_time() - started < 10


def test_a_control_character_is_shown_as_elsewhere() -> None:
    assert escape_value("a\x1b]0;b\x07\u202e\r c\\d") == r"a\x1b]0;b\x07\u202e\x0d c\d"
    assert escape_value(r"C:\Users\run") == r"C:\Users\run"


def test_both_formats_have_the_same_samples(page: MetricsPage) -> None:
    text = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_text(text_of(page)) for s in f.samples}
    rendered = text_of(page, openmetrics=True) + "# EOF\n"
    other = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_openmetrics(rendered) for s in f.samples}
    assert text == other
    assert len(text) == 22


def test_labels_and_values(page: MetricsPage) -> None:
    found = {family.name: family for family in parse_text(text_of(page))}
    (info,) = found["service_info"].samples
    assert info.labels["name"] == 'a "b"\\c\nd'
    assert set(info.labels) == {
        "service", "host", "provider", "category", "name", "severity", "team", "on_failure", "probe",
    }  # fmt: skip
    (up,) = found["service_up"].samples
    assert (up.value, up.labels) == (0, {"service": "web", "host": "", "provider": "nginx", "category": "other"})
    assert {s.labels["phase"]: s.value for s in found["service_probe_phase_seconds"].samples} == {
        "connect": 0.25, "transfer": 0.5,
    }  # fmt: skip


def test_unmeasured_metrics_are_absent(service: Service) -> None:
    made = MetricsPage(FAMILIES)
    made.put("web", ServiceSeries(service).render(ServiceState(), None, {}))
    names = {sample.name for family in parse_text(text_of(made)) for sample in family.samples}
    assert "service_up" not in names
    assert "service_probe_success" not in names
    assert "service_last_success_timestamp_seconds" not in names
    assert {"service_probes_total", "service_info", "service_probe_interval_seconds"} <= names


def test_dropped_keys_have_no_lines(page: MetricsPage) -> None:
    page.drop("web")
    page.drop("host h")
    assert text_of(page) == ""


def test_lines_that_are_rendered_when_they_are_needed(page: MetricsPage) -> None:
    rendered = []

    def render(value: int) -> dict[str, str]:
        rendered.append(value)
        return {"service_up": f'service_up{{service="web"}} {value}\n', "unknown": "unknown 1\n"}

    for value in (1, 2):
        page.put_later("web", lambda value=value: render(value))  # type: ignore[misc]
    assert rendered == []
    assert 'service_up{service="web"} 2\n' in text_of(page)
    assert page.get("web") == {"service_up": 'service_up{service="web"} 2\n'}
    assert text_of(page).count("service_up{") == 1
    assert rendered == [2]
    page.put_later("web", lambda: render(3))
    assert page.get("web") == {"service_up": 'service_up{service="web"} 3\n'}
    page.put_later("web", lambda: render(4))
    page.drop("web")
    assert "service_up{" not in text_of(page)
    assert rendered == [2, 3]


def test_keys_that_change_while_the_page_is_read() -> None:
    page = MetricsPage(FAMILIES)
    for number in range(2000):
        page.put(f"{number}", {"service_up": f'service_up{{service="{number}"}} 1\n'})
    parts = []
    for chunk in page.chunks():
        parts.append(chunk)
        page.drop(f"{len(parts) * 400}")
        page.put(f"new {len(parts)}", {"service_up": f'service_up{{service="new {len(parts)}"}} 1\n'})
    lines = b"".join(parts).decode().splitlines()
    assert len(lines) == len(set(lines)) == 2002
    assert [line for line in lines if line.startswith("#")] == lines[:2]
