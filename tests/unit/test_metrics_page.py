from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as _parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as _parse_text

from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.service_series import FAMILIES, ServiceSeries, render_host_info
from exporter.results import Component, ProbeDetails, ProbeResult
from exporter.service_state import ServiceState
from fleet.inventory.model import Host, Service
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
        tls=('CN="x"', "TLSv1.3"),
        components={"a": Component(up=True, values={"cpu": 1}), "b\n": Component(up=False)},
    )
    result = ProbeResult(False, "status", "answered 503", 1000.0, 0.75, seen)
    state = ServiceState().after_result(result, fail_after=1, recover_after=1)
    made.put("web", ServiceSeries(service).render(state, result, {"status": 1}))
    made.put("host h", render_host_info(Host(address="10.0.0.1", labels={"rack": "a3"})))
    return made


def test_both_formats_have_the_same_samples(page: MetricsPage) -> None:
    text = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_text(text_of(page)) for s in f.samples}
    rendered = text_of(page, openmetrics=True) + "# EOF\n"
    other = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_openmetrics(rendered) for s in f.samples}
    assert text == other
    assert len(text) == 20


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
