"""A Prometheus with made-up series for all queries of the dashboards, for a small fleet or a large one."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from defib.demo.stack import reserve_ports
from grafana.promql import JOBS
from tests.dashboard_queries import queries
from tests.metric_names import metrics_in
from tests.support import eventually

Labels = Mapping[str, str]
SAMPLES = (480, 240, 1)  # seconds ago: within Prometheus' lookback of 5 minutes
DAY = 86400
# Labels of a metric beside those of its service, host or GPU; the first pattern that matches counts.
EXTRAS: Mapping[str, Sequence[Labels]] = {
    "service_probe_failures_total": [{"reason": "timeout"}, {"reason": "status"}],
    "service_probes_total": [{"result": "success"}, {"result": "failure"}],
    "service_probe_phase_seconds": [{"phase": phase} for phase in ("resolve", "connect", "tls", "processing")],
    "service_component_up": [{"component": "a"}, {"component": "b"}],
    "service_value": [{"name": "queue"}],
    "service_info": [{"severity": "critical", "team": "ai", "probe": "http"}],
    "service_tls_info": [
        {
            "issuer": "CN=An issuer",
            "version": "TLSv1.3",
            "subject": "CN=a",
            "names": "a.example",
            "serial": "1f",
            "fingerprint": "ab",
        }
    ],
    "agent_llm_requests_total": [{"outcome": "ok"}, {"outcome": "429"}],
    "host_info|host_up|host:up:max": [{"group": "first"}],
    "host[_:]filesystem.*": [{"mountpoint": "/"}, {"mountpoint": "/data"}],
    "host_collect_.*": [{"collector": "system"}, {"collector": "docker"}],
    "host_container_info": [{"container": "a", "image": "i:1"}, {"container": "b", "image": "i:2"}],
    "host_container_.*": [{"container": "a"}, {"container": "b"}],
    "host_unit_active": [{"unit": "a.service"}, {"unit": "b.service"}],
    "host_program_running": [{"program": "a"}, {"program": "b"}],
    "host:log_matches:.*": [
        {"source": "a.service", "pattern": "error"},
        {"source": "/var/log/b.log", "pattern": "error"},
    ],
    "host:http_errors:ratio": [{"source": "/var/log/nginx/access.log"}],
    "gpu_info": [{"name": "NVIDIA A100", "driver_version": "550.54.15", "uuid": "GPU-1"}],
    "gpu_temperature_celsius": [{"sensor": "gpu"}, {"sensor": "memory"}],
    "gpu_clock_hertz": [{"clock": clock} for clock in ("sm", "memory", "graphics", "video")],
    "gpu_throttle_.*": [{"reason": "sw_power_cap"}, {"reason": "hw_slowdown"}],
    "gpu_ecc_errors_total": [{"kind": "corrected", "scope": "volatile"}, {"kind": "uncorrected", "scope": "volatile"}],
    "gpu_remapped_rows|gpu_retired_pages": [{"kind": "pending"}, {"kind": "correctable"}],
    "gpu_recovery_needed": [{"action": "None"}],
    "gpu_process_memory_bytes": [{"container": "a"}, {"container": "b"}],
    "gpu_xid_last_timestamp_seconds": [{"xid": "79"}],
    "gpu_mig_instance_info": [{"instance": "1", "profile": "1g.10gb"}],
    "node_(network|disk)_.*": [{"device": "eth0"}, {"device": "lo"}, {"device": "nvme0n1"}],
    "defib_build_info": [{"version": "0.2.0"}],
    "defib_exporter_ssh_connections": [{"state": "connected"}],
    "defib_remediator_alerts_received_total": [{"status": "firing"}],
    "defib_remediator_webhook_refusals_total": [{"code": "400"}],
    "defib_remediator_incidents": [{"state": "open"}, {"state": "recovered"}],
    "defib_remediator_budget_.*": [{"budget": "10m"}, {"budget": "in_flight"}],
    "defib_remediator_notices_total": [{"channel": "oncall", "outcome": "sent"}],
    "defib_remediator_actions_total": [{"kind": "restart", "outcome": "succeeded"}],
    "gateway_requests_total": [
        {"client": "c", "priority": "high", "outcome": outcome} for outcome in ("ok", "timeout")
    ],
    "gateway_queue_depth": [{"priority": "high"}, {"priority": "low"}],
    "gateway_queue_wait_seconds_count": [{"priority": "high"}],
    "gateway_queue_wait_seconds_bucket": [{"priority": "high", "le": le} for le in ("1", "+Inf")],
    "gateway_upstream_errors_total": [{"status": "429"}, {"status": "503"}],
    "gateway_tokens_total": [{"client": "c"}],
    "gateway_retreat_state": [{"state": "steady"}],
    "defib_remediator_recovery_seconds_bucket": [{"by": "defib", "le": "60"}, {"by": "defib", "le": "+Inf"}],
    ".*_bucket": [{"le": "1"}, {"le": "+Inf"}],
    "prometheus_rule_group_.*": [{"rule_group": "services"}, {"rule_group": "hosts"}],
    "alertmanager_alerts": [{"state": "active"}],
}
# What each process publishes about itself, or about services.
PROCESSES = ("defib-exporter", "defib-remediator", "defib-gateway", "prometheus", "alertmanager")
OF_SERVICES = {"defib_remediator_actions_total", "defib_remediator_breaker_open"}
# Only the dashboard of one service shows them.
OF_ONE_SERVICE = re.compile(
    "service_(probe_(failures|phase|duration|slow).*|probes_total|component_up|consecutive.*|http.*|llm.*|state_changes.*"
    "|last_success.*)"
)
VALUES: Mapping[str, float] = {
    "service:availability:.*": 0.9995,
    "service_probe_interval_seconds": 30,
    "service:error_budget:ratio": 0.005,
    "gpu_memory_total_bytes": 80e9,
    "gpu_memory_used_bytes": 1e9,
    "gpu_utilization_ratio": 0,
    "node_memory_SwapTotal_bytes": 2,
    ".*(usage|ratio).*": 0.5,
}


@dataclass(frozen=True)
class MadeUpFleet:
    """How many of each there are."""

    services: int = 12
    hosts: int = 3
    gpus: int = 2  # of each host
    alerts: int = 6

    def list_series(self, metric: str, now: float) -> Iterator[tuple[Labels, float]]:
        """Yield the series of a metric with their values."""
        extras: Sequence[Labels] = next((EXTRAS[each] for each in EXTRAS if re.fullmatch(each, metric)), [{}])
        value = next((VALUES[each] for each in VALUES if re.fullmatch(each, metric)), 1.0)
        for number, labels in enumerate(self._list_bearers(metric)):
            if metric == "service:up:max" and number == 1:
                continue  # nothing is known of it yet
            for extra in extras:
                yield {**labels, **extra}, self._vary(metric, number, value, now)

    @staticmethod
    def _vary(metric: str, number: int, value: float, now: float) -> float:
        if "timestamp" in metric:
            return now + (90 - number) * DAY if "expiry" in metric else now - 3600 - number
        if metric in ("service:up:max", "service_component_up"):
            return float(number != 0)
        return now - 600 - number if metric == "ALERTS_FOR_STATE" else value

    def _list_bearers(self, metric: str) -> Iterator[Labels]:
        """Yield the labels of the services, hosts, GPUs, alerts or processes that a metric is about."""
        if metric.startswith("ALERTS"):
            yield from self._list_alerts(metric)
        elif metric.startswith("gateway"):
            yield from ({"instance": "gateway:9190", "provider": provider} for provider in ("first", "second"))
        elif metric.startswith("provider"):
            pairs = {(labels["provider"], labels["category"]) for labels in self._list_services(self.services)}
            yield from ({"provider": provider, "category": category} for provider, category in sorted(pairs))
        elif metric.startswith(("service", "agent")) or metric in OF_SERVICES:
            yield from self._list_services(20 if OF_ONE_SERVICE.fullmatch(metric) else self.services)
        elif metric.startswith(("host", "node", "gpu_count")):
            yield from ({"host": f"h{host:03}"} for host in range(self.hosts))
        elif metric.startswith("gpu"):
            for host in range(self.hosts):
                yield from ({"host": f"h{host:03}", "gpu": str(gpu)} for gpu in range(self.gpus))
        else:
            own = [each for each in PROCESSES if metric.startswith(each.replace("-", "_"))]
            related = [each for each in PROCESSES if metric.startswith(each.partition("-")[0])]
            yield from ({"instance": f"{each}:1", "job": each} for each in own or related or PROCESSES)

    def _list_services(self, count: int) -> Iterator[Labels]:
        for number in range(min(count, self.services)):
            yield {
                "service": f"s{number:05}",
                "host": f"h{number % self.hosts:03}",
                "provider": f"p{number % 100:02}",
                "category": f"c{number % 5}",
            }

    def _list_alerts(self, metric: str) -> Iterator[Labels]:
        """Yield alerts that differ in a label that only their rule has, too."""
        firing = {"alertstate": "firing"} if metric == "ALERTS" else {}
        for number in range(self.alerts):
            severity = ("info", "critical", "warning")[number % 3]
            host = f"h{number % self.hosts:03}"
            labels = {"host": host, "container": "a" if number % 2 else "b", "odd": str(number)}
            yield {"alertname": "HostContainerDown", "severity": severity, **labels, **firing}


def _select_job(metric: str) -> Labels:
    """Return the label `job`, unless the series are recorded or have it already."""
    for names, matcher in JOBS.items():
        if re.fullmatch(names, metric) and (job := re.fullmatch(r'job="(.+)"', matcher)):
            return {"job": job[1]}
    return {}


def _render(fleet: MadeUpFleet, now: float) -> Iterator[str]:
    names = sorted({name for query in queries() for name in metrics_in(query.expression)})
    for metric in names:
        job = _select_job(metric)
        for labels, value in fleet.list_series(metric, now):
            shown = ",".join(f'{name}="{text}"' for name, text in {**labels, **job}.items())
            grows = metric.endswith(("_total", "_bucket", "_seconds_count", "_pswpin", "_pswpout"))
            for index, ago in enumerate(SAMPLES):
                yield f"{metric}{{{shown}}} {value + index if grows else value} {now - ago:.3f}\n"
    yield "# EOF\n"


@dataclass
class AskedPrometheus:
    """Answers queries at a time, or else now."""

    client: httpx.AsyncClient
    now: float | None = None

    async def ask(self, query: str) -> Any:
        """Return the data of an instant query."""
        return await self._ask("query", {"query": query} | ({} if self.now is None else {"time": f"{self.now}"}))

    async def ask_range(self, query: str) -> Any:
        """Return the data of a query over all that a made-up fleet has."""
        end = time.time() if self.now is None else self.now
        times = {"start": f"{end - SAMPLES[0]}", "end": f"{end}", "step": "60"}
        return await self._ask("query_range", {"query": query, **times})

    async def _ask(self, what: str, parameters: Mapping[str, str]) -> Any:
        answer = await self.client.post(f"/api/v1/{what}", data=parameters)
        assert answer.is_success, f"{parameters['query']}: {answer.text}"
        return answer.json()["data"]


@asynccontextmanager
async def prometheus_of(folder: Path, fleet: MadeUpFleet) -> AsyncIterator[AskedPrometheus]:
    """Run a Prometheus with the series of a fleet."""
    now = time.time()
    written = folder / "series.txt"
    with written.open("w") as file:
        file.writelines(_render(fleet, now))
    filling = await asyncio.create_subprocess_exec(
        "promtool", "tsdb", "create-blocks-from", "openmetrics", written, folder / "data",
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await filling.wait() == 0
    written.unlink()
    async with prometheus_in(folder, {}) as client:
        yield AskedPrometheus(client, now)


@asynccontextmanager
async def prometheus_in(folder: Path, configuration: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run a Prometheus whose data are in a folder."""
    (folder / "prometheus.yml").write_text(json.dumps(configuration))
    (port,) = reserve_ports(1)
    prometheus = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:

            async def ready() -> bool:
                try:
                    return (await client.get("/-/ready")).is_success
                except httpx.TransportError:
                    return False

            await eventually(ready, 120)
            yield client
    finally:
        prometheus.terminate()
        await prometheus.wait()
