"""The `service_*` and `host_*` series: which there are and how a service's state is told in them."""

from collections.abc import Mapping
from typing import Any

from exporter.exposition.metrics_page import MetricFamily, labels
from exporter.results import FailureReason, ProbeResult
from exporter.service_state import ServiceState
from fleet.inventory.model import Host, Service

# What only some kinds of probes measure; absent where the last probe did not.
_MEASURED = {
    "service_http_status_code": "Status of the last HTTP answer.",
    "service_http_redirects": "Redirects that the last probe followed.",
    "service_tls_certificate_expiry_timestamp_seconds": "When the certificate that was served last expires.",
    "service_tls_certificate_not_before_timestamp_seconds": "From when the certificate that was served last is valid.",
    "service_tls_chain_expiry_timestamp_seconds": "When the first certificate of the chain served last expires.",
    "service_llm_first_token_seconds": "From the request to the first token of the last completion.",
    "service_llm_tokens_per_second": "Tokens per second of the last completion.",
}
FAMILIES = (
    MetricFamily("service_up", "gauge", "Whether the service is up, debounced; absent until first decided."),
    MetricFamily("service_probe_success", "gauge", "Whether the last probe succeeded."),
    MetricFamily("service_probe_duration_seconds", "gauge", "Duration of the last probe."),
    MetricFamily("service_probe_phase_seconds", "gauge", "Duration of each phase of the last probe."),
    MetricFamily("service_probes_total", "counter", "Probes by result."),
    MetricFamily("service_probe_failures_total", "counter", "Failed probes by reason."),
    MetricFamily("service_consecutive_failures", "gauge", "Failed probes since the last success."),
    MetricFamily("service_state_changes_total", "counter", "Changes of service_up."),
    MetricFamily("service_last_probe_timestamp_seconds", "gauge", "When the last probe ended."),
    MetricFamily("service_last_success_timestamp_seconds", "gauge", "When the last successful probe ended."),
    MetricFamily("service_last_change_timestamp_seconds", "gauge", "When service_up was decided or changed."),
    MetricFamily("service_probe_interval_seconds", "gauge", "The configured interval between probes."),
    MetricFamily(
        "service_probe_slow_seconds", "gauge", "The duration from which the service counts as slow, where one is set."
    ),
    MetricFamily("service_objective_ratio", "gauge", "The share of its time that it should be up, where one is set."),
    *(MetricFamily(name, "gauge", help_) for name, help_ in _MEASURED.items()),
    MetricFamily(
        "service_tls_info", "gauge", "Issuer of the certificate served last, and the protocol's version; always 1."
    ),
    MetricFamily("service_component_up", "gauge", "Whether each part that the last status page told of is up."),
    MetricFamily("service_info", "gauge", "What the inventory says of the service; always 1."),
    MetricFamily("host_info", "gauge", "What the inventory says of the host; always 1."),
)


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 9)


class ServiceSeries:
    """Renders one service's lines; its labels are rendered once."""

    def __init__(self, service: Service) -> None:
        own = {"service": service.id, "host": service.host, "provider": service.provider, "category": service.category}
        info = {
            "name": service.title,
            "severity": service.severity,
            "team": service.team,
            "on_failure": service.on_failure,
            "probe": service.probe.kind,
        }
        self._own = labels(own)
        self._fixed = {
            "service_probe_interval_seconds": self._line("service_probe_interval_seconds", service.probe.every),
            "service_probe_slow_seconds": self._line("service_probe_slow_seconds", service.probe.slow_after),
            "service_objective_ratio": self._line("service_objective_ratio", _ratio(service.objective)),
            "service_info": f"service_info{{{self._own},{labels(info)}}} 1\n",
        }

    def _line(self, name: str, value: float | None) -> str:
        return "" if value is None else f"{name}{{{self._own}}} {value}\n"

    def _lines(self, name: str, label: str, values: Mapping[Any, float]) -> str:
        return "".join(f'{name}{{{self._own},{label}="{key}"}} {value}\n' for key, value in values.items())

    def render(
        self, state: ServiceState, last: ProbeResult | None, failures: Mapping[FailureReason, int]
    ) -> dict[str, str]:
        line = self._line
        lines = {
            **self._fixed,
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
        }
        if last is not None:
            details = last.details
            lines |= {
                "service_probe_success": line("service_probe_success", int(last.success)),
                "service_probe_duration_seconds": line("service_probe_duration_seconds", last.duration),
                "service_probe_phase_seconds": self._lines("service_probe_phase_seconds", "phase", details.phases),
                "service_last_probe_timestamp_seconds": line(
                    "service_last_probe_timestamp_seconds", last.started_at + last.duration
                ),
            }
            for name, value in details.gauges.items():
                lines[name] = line(name, value)
            if details.tls is not None:
                issuer, version = details.tls
                lines["service_tls_info"] = (
                    f"service_tls_info{{{self._own},{labels({'issuer': issuer, 'version': version})}}} 1\n"
                )
            if details.components:
                lines["service_component_up"] = "".join(
                    f"service_component_up{{{self._own},{labels({'component': name})}}} {int(up)}\n"
                    for name, up in details.components.items()
                )
        return lines


def render_host_info(host: Host) -> dict[str, str]:
    pairs = {**host.labels, "host": host.name, "group": host.group, "address": host.address}
    return {"host_info": f"host_info{{{labels(pairs)}}} 1\n"}
