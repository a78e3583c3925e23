"""A scrape of 10,000 services, against prometheus_client's own rendering of the same series in the same run."""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import uvloop
from aiohttp.test_utils import TestServer
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from defib.kinds import KINDS
from exporter.api import add_routes
from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.service_series import FAMILIES, ServiceSeries
from exporter.metrics import ExporterMetrics
from exporter.modules.prober import ModuleProber
from exporter.results import ProbeDetails, ProbeResult, TlsInfo
from exporter.scheduler.probe_scheduler import ProbeScheduler
from exporter.service_state import ServiceState
from fleet.inventory.model import Service, inventory_model
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl, WebUsers
from runtime.access.tokens import ConfiguredTokens
from runtime.redaction import Redactor
from runtime.web import create_application
from runtime.webconfig import WebConfigFile

SERVICES = 10_000
ROUNDS = 5
AT_LEAST = 30.0
LONGEST = 0.020  # seconds that a scrape may keep the event loop


class Same(Collector):
    """The series of a page, as prometheus_client holds them."""

    def __init__(self, text: str) -> None:
        self._families = list(text_string_to_metric_families(text))

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
            made = kind(family.name, family.documentation)
            made.samples = family.samples
            yield made


def run() -> bool:
    page = _page()
    text = b"".join(page.chunks())
    registry = CollectorRegistry()
    registry.register(Same(text.decode()))
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(_seconds(lambda: b"".join(page.chunks())))
        theirs.append(_seconds(lambda: generate_latest(registry)))
    equal = _samples(text) == _samples(generate_latest(registry))
    ratio = statistics.median(other / mine for mine, other in zip(ours, theirs, strict=True))
    longest = statistics.median(uvloop.run(_longest_hold(page)) for _ in range(ROUNDS))
    good = ratio >= AT_LEAST and equal and longest <= LONGEST
    print(
        f"scrape of {SERVICES} services, {len(text) / 1e6:.1f} MB, {text.count(10)} lines: {statistics.median(ours):.3f} s,"
        f" generate_latest {statistics.median(theirs):.3f} s; {ratio:.0f} times as fast, median of {ROUNDS}"
        f" (at least {AT_LEAST:g}); {'equal' if equal else 'NOT EQUAL'} once parsed; it keeps the event loop"
        f" {longest * 1000:.1f} ms (at most {LONGEST * 1000:g}): {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


def _page() -> MetricsPage:
    page = MetricsPage(FAMILIES)
    for number in range(SERVICES):
        service = _service(number)
        seen = ProbeDetails(
            phases={"resolve": 0.0012, "connect": 0.00123456, "tls": 0.01, "processing": 0.0234, "transfer": 1e-05}
        )
        seen.gauges = {
            "service_http_status_code": 200,
            "service_tls_certificate_expiry_timestamp_seconds": 1.8e9 + number,
            "service_tls_certificate_not_before_timestamp_seconds": 1.7e9,
        }
        seen.tls = TlsInfo("TLSv1.3", "CN=R3,O=Let's Encrypt", "CN=a.example", "a.example", "3f" * 16, "ab" * 32)
        result = ProbeResult(True, None, "", 1.79e9 + number / 7, 0.0365, seen)
        state = ServiceState().after_result(result, fail_after=1, recover_after=1)
        page.put(service.id, ServiceSeries(service).render(state, result, {"timeout": 1, "status": 2}))
    return page


def _service(number: int) -> Service:
    probe = {"every": "15s", "retry_every": "15s", "timeout": "5s", "fail_after": 2, "recover_after": 1}
    written = {"probe": {**probe, "http": {"url": "https://h/"}}, "provider": "vllm", "host": f"gpu-{number % 999}"}
    inventory = inventory_model(KINDS).model_validate({"services": {f"service-{number}": written}})
    return inventory.services[f"service-{number}"]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _samples(text: bytes) -> dict[object, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def _longest_hold(page: MetricsPage) -> float:
    """The longest time, in seconds, that scrapes over HTTP keep everything else from running."""
    metrics = ExporterMetrics()
    scheduler = ProbeScheduler(metrics, Redactor())
    scheduler.page = page
    web_config = WebConfigFile(None)
    access = AccessControl(WebUsers, ConfiguredTokens(lambda _: None), write_audit=write_to_log, now=time.perf_counter)
    app = create_application(access, web_config, ready=lambda: True)
    add_routes(app, scheduler, ModuleProber(Redactor()), metrics, scheduler.close)
    async with TestServer(app) as server:
        scraper = await _scraper(str(server.make_url("/metrics")))
        scrapes = asyncio.create_task(scraper.communicate(b"go\n"))
        longest, last = 0.0, time.perf_counter()
        while not scrapes.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        await scrapes
        assert scraper.returncode == 0
    return longest


async def _scraper(url: str) -> asyncio.subprocess.Process:
    """Another process, which scrapes plain and compressed once it is told to: to start it takes a while in itself."""
    code = (
        "import sys, urllib.request as u\n"
        "sys.stdin.readline()\n"
        "for coding in ('identity', 'gzip'):\n"
        "    u.urlopen(u.Request(sys.argv[1], headers={'Accept-Encoding': coding})).read()"
    )
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, url, stdin=asyncio.subprocess.PIPE)
