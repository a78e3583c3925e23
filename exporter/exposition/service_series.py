"""The `service_*` series, `host_info` and `host_threshold`: their metric families, and how they are rendered."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from exporter.exposition.metrics_page import MetricFamily, format_labels
from exporter.results import FailureReason, ProbeResult, TlsInfo
from exporter.service_state import ServiceState
from fleet.inventory.model import Host, Service
from fleet.inventory.thresholds import ThresholdTable

# Measured by some probe kinds; absent if the last probe did not measure it.
_MEASURED = {
    "service_http_status_code": "HTTP status code of the last response.",
    "service_http_body_bytes": "Length of the last response's body as it was received.",
    "service_http_version": "HTTP version of the last response.",
    "service_ip_protocol": "IP version of the address of the last probe, 4 or 6.",
    "service_dns_soa_serial": "Serial number of the zone in the last answer with a SOA record.",
    "service_http_redirects": "Number of redirects that the last probe followed.",
    "service_tls_certificate_expiry_timestamp_seconds": "Expiry of the last served certificate.",
    "service_tls_certificate_not_before_timestamp_seconds": "Start of validity of the last served certificate.",
    "service_tls_chain_expiry_timestamp_seconds": "Earliest expiry in the last chain that verifies or was served.",
    "service_file_modified_timestamp_seconds": "Time of the last change of the file, by the host's clock.",
    "service_file_size_bytes": "Size of the file.",
    "service_llm_first_token_seconds": "Time from the request to the first token of the last completion.",
    "service_llm_tokens_per_second": "Output tokens per second of the last completion.",
}
FAMILIES = (
    MetricFamily("service_up", "gauge", "Whether the service is up (debounced); absent until first determined."),
    MetricFamily("service_probe_success", "gauge", "Whether the last probe succeeded."),
    MetricFamily("service_probe_duration_seconds", "gauge", "Duration of the last probe."),
    MetricFamily("service_probe_phase_seconds", "gauge", "Duration of each phase of the last probe."),
    MetricFamily("service_probes_total", "counter", "Number of probes by result."),
    MetricFamily("service_probe_failures_total", "counter", "Number of failed probes by reason."),
    MetricFamily("service_consecutive_failures", "gauge", "Number of failed probes since the last success."),
    MetricFamily("service_state_changes_total", "counter", "Number of changes of service_up."),
    MetricFamily("service_last_probe_timestamp_seconds", "gauge", "Unix time at which the last probe ended."),
    MetricFamily(
        "service_last_success_timestamp_seconds", "gauge", "Unix time at which the last successful probe ended."
    ),
    MetricFamily(
        "service_last_change_timestamp_seconds",
        "gauge",
        "Unix time at which service_up was first determined or last changed.",
    ),
    MetricFamily("service_probe_interval_seconds", "gauge", "Configured interval between probes."),
    MetricFamily("service_probe_timeout_seconds", "gauge", "Configured timeout of a probe."),
    MetricFamily("service_probe_slow_seconds", "gauge", "Configured duration above which a probe counts as slow."),
    MetricFamily(
        "service_objective_ratio", "gauge", "Configured objective: the ratio of time in which the service should be up."
    ),
    MetricFamily("service_threshold", "gauge", "Configured thresholds of alerts that differ from the built-in ones."),
    *(MetricFamily(name, "gauge", help_text) for name, help_text in _MEASURED.items()),
    MetricFamily("service_tls_info", "gauge", "The last served certificate, and the TLS version; always 1."),
    MetricFamily("service_component_up", "gauge", "Whether each component on the last status page is up."),
    MetricFamily("service_value", "gauge", "Values that the last probe read, as configured."),
    MetricFamily("service_probing_paused", "gauge", "1 while the service is not probed on schedule; absent otherwise."),
    MetricFamily("service_info", "gauge", "Inventory data of the service; always 1."),
    MetricFamily("host_info", "gauge", "Inventory data of the host; always 1."),
    MetricFamily("host_threshold", "gauge", "Configured thresholds of alerts that differ from the built-in ones."),
)


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 9)


def format_service_labels(service: Service) -> str:
    """Return the labels that the series of a service have."""
    return format_labels(
        {"service": service.id, "host": service.host, "provider": service.provider, "category": service.category}
    )


@lru_cache(maxsize=10_000)
def _format_tls_labels(tls: TlsInfo) -> str:
    """Return the labels of a certificate, which a service serves for months."""
    return format_labels(asdict(tls))


class ServiceSeries:
    """Renders the lines of one service; its labels are rendered only once."""

    def __init__(self, service: Service) -> None:
        info = {
            "name": service.title,
            "severity": service.severity,
            "team": service.team,
            "on_failure": service.on_failure,
            "probe": service.probe.kind,
        }
        self._labels = format_service_labels(service)
        # A service that reports itself is not probed at an interval: without these, no rule expects that.
        self._is_reported = service.probe.is_reported
        probe = service.probe
        every, timeout, slow_after = (
            (None, None, None) if self._is_reported else (probe.every, probe.timeout, probe.slow_after)
        )
        self._constant = {
            "service_probe_interval_seconds": self._line("service_probe_interval_seconds", every),
            "service_probe_timeout_seconds": self._line("service_probe_timeout_seconds", timeout),
            "service_probe_slow_seconds": self._line("service_probe_slow_seconds", slow_after),
            "service_objective_ratio": self._line("service_objective_ratio", _ratio(service.objective)),
            "service_threshold": _threshold_lines("service_threshold", self._labels, service.thresholds),
            "service_info": f"service_info{{{self._labels},{format_labels(info)}}} 1\n",
        }

    def _line(self, name: str, value: float | None) -> str:
        return "" if value is None else f"{name}{{{self._labels}}} {value}\n"

    def _lines(self, name: str, label: str, values: Mapping[Any, float]) -> str:
        return "".join(f'{name}{{{self._labels},{label}="{key}"}} {value}\n' for key, value in values.items())

    def render(
        self,
        state: ServiceState,
        last: ProbeResult | None,
        failures: Mapping[FailureReason, int],
        *,
        is_paused: bool = False,
    ) -> dict[str, str]:
        """Return the lines by metric name."""
        line = self._line
        lines = {
            **self._constant,
            "service_probes_total": self._lines(
                "service_probes_total", "result", {"success": state.successes, "failure": state.failures}
            ),
            "service_probe_failures_total": self._lines("service_probe_failures_total", "reason", failures),
            "service_consecutive_failures": line("service_consecutive_failures", state.failures_in_a_row),
            "service_state_changes_total": line("service_state_changes_total", state.changes),
            "service_up": line("service_up", None if state.up is None else int(state.up)),
            "service_last_success_timestamp_seconds": line(
                "service_last_success_timestamp_seconds", state.last_success
            ),
            "service_last_change_timestamp_seconds": line("service_last_change_timestamp_seconds", state.last_change),
            "service_probing_paused": line("service_probing_paused", 1 if is_paused else None),
        }
        if last is not None:
            details = last.details
            lines |= {
                "service_probe_success": line("service_probe_success", int(last.success)),
                "service_probe_duration_seconds": line(
                    "service_probe_duration_seconds", None if self._is_reported else last.duration
                ),
                "service_probe_phase_seconds": self._lines("service_probe_phase_seconds", "phase", details.phases),
                "service_last_probe_timestamp_seconds": line(
                    "service_last_probe_timestamp_seconds", last.started_at + last.duration
                ),
            }
            if details.values:
                lines["service_value"] = self._lines("service_value", "name", details.values)
            for name, value in details.gauges.items():
                lines[name] = line(name, value)
            if details.tls is not None:
                labels = _format_tls_labels(details.tls)
                lines["service_tls_info"] = f"service_tls_info{{{self._labels},{labels}}} 1\n"
            if details.components:
                lines["service_component_up"] = "".join(
                    f"service_component_up{{{self._labels},{format_labels({'component': name})}}} {int(each.up)}\n"
                    for name, each in details.components.items()
                )
        return lines


def render_host(host: Host) -> dict[str, str]:
    """Return the lines of a host that its configuration determines, by metric name."""
    labels = {**host.labels, "host": host.name, "group": host.group, "address": host.address}
    return {
        "host_info": f"host_info{{{format_labels(labels)}}} 1\n",
        "host_threshold": _threshold_lines("host_threshold", format_labels({"host": host.name}), host.thresholds),
    }


def _threshold_lines(name: str, labels: str, thresholds: ThresholdTable) -> str:
    """Return the lines of thresholds that differ from the built-in ones, which the rules have.

    One that is off is infinite: without its line, the rules would use the built-in one.
    """
    lines = []
    for each in thresholds.list_changed():
        own = format_labels({"resource": each.resource, "severity": each.severity})
        value = f"{each.value}" if math.isfinite(each.value) else f"{each.value:+}".title()  # +Inf, -Inf
        lines.append(f"{name}{{{labels},{own}}} {value}\n")
    return "".join(lines)
