"""The series of a probe as blackbox_exporter names them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from exporter.modules.prober import ModuleProbe
from exporter.results import ProbeDetails
from runtime.times import parse_http_date

_PHASES = ("resolve", "connect", "tls", "processing", "transfer")
_EXPIRY = "service_tls_certificate_expiry_timestamp_seconds"
_CHAIN_EXPIRY = "service_tls_chain_expiry_timestamp_seconds"
_VERSIONS = {"TLSv1": "TLS 1.0", "TLSv1.1": "TLS 1.1", "TLSv1.2": "TLS 1.2", "TLSv1.3": "TLS 1.3"}
_REDIRECTS, _WITHOUT_BODY = (301, 302, 303, 307, 308), (0, 204, 304)  # 0: no response
_BY_PATTERN = ("body", "header")  # reasons


def render(probe: ModuleProbe) -> bytes:
    """Return the series of a probe in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Series(probe))
    return generate_latest(registry)


class _Series(Collector):
    def __init__(self, probe: ModuleProbe) -> None:
        self._probe = probe

    def collect(self) -> Iterator[GaugeMetricFamily]:
        probe = self._probe
        details = probe.result.details
        yield _gauge("probe_success", "Whether the probe succeeded.", int(probe.result.success))
        yield _gauge("probe_duration_seconds", "Duration of the probe.", probe.result.duration)
        yield _gauge("probe_dns_lookup_time_seconds", "Duration of the lookup.", details.phases.get("resolve", 0.0))
        version = details.gauges.get("service_ip_protocol", 0)
        yield _gauge("probe_ip_protocol", "Version of IP that was used, 4 or 6.", version)
        if probe.prober in ("http", "tcp"):
            by_pattern = probe.result.reason in _BY_PATTERN or (
                probe.prober == "tcp" and probe.result.reason == "protocol"
            )
            yield _gauge("probe_failed_due_to_regex", "Whether a pattern was the cause.", int(by_pattern))
        yield from {"http": _http, "dns": _dns, "icmp": _icmp, "grpc": _grpc}.get(probe.prober, _nothing)(probe)
        yield from _tls(details)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _by_phase(name: str, values: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, "Duration of each phase of the probe.", labels=["phase"])
    for phase, seconds in values.items():
        family.add_metric([phase], seconds)
    return family


def _nothing(_probe: ModuleProbe) -> Iterator[GaugeMetricFamily]:
    return iter(())


def _http(probe: ModuleProbe) -> Iterator[GaugeMetricFamily]:
    details = probe.result.details
    gauges, headers = details.gauges, dict(details.evidence.get("headers", ()))
    phases = {phase: details.phases.get(phase, 0.0) for phase in _PHASES}
    yield _by_phase("probe_http_duration_seconds", phases)
    status = gauges.get("service_http_status_code", 0)
    yield _gauge("probe_http_status_code", "Status code of the response.", status)
    is_not_followed = status in _REDIRECTS and bool(headers.get("location"))
    redirects = gauges.get("service_http_redirects", int(is_not_followed))
    yield _gauge("probe_http_redirects", "Number of redirects.", redirects)
    over_tls = details.tls is not None and "service_http_status_code" in gauges
    yield _gauge("probe_http_ssl", "Whether the final response came over TLS.", int(over_tls))
    length = headers.get("content-length", "")
    unknown = 0 if status in _WITHOUT_BODY else -1
    number = float(length) if length.isdecimal() and len(length) < 20 else unknown  # noqa: PLR2004 - a length fits into 64 bits
    yield _gauge("probe_http_content_length", "Content-Length of the response; -1 if unknown.", number)
    size = gauges.get("service_http_body_bytes", 0)
    yield _gauge("probe_http_uncompressed_body_length", "Length of the body.", size)
    yield _gauge("probe_http_version", "Version of HTTP of the response.", gauges.get("service_http_version", 0))
    modified = parse_http_date(headers.get("last-modified", ""))
    if modified is not None:
        yield _gauge("probe_http_last_modified_timestamp_seconds", "Last-Modified of the response.", modified)


def _dns(probe: ModuleProbe) -> Iterator[GaugeMetricFamily]:
    details = probe.result.details
    phases = details.phases
    seconds = {"resolve": phases.get("resolve", 0.0), "connect": 0.0, "request": phases.get("processing", 0.0)}
    yield _by_phase("probe_dns_duration_seconds", seconds)
    answered = "answer" in details.evidence
    yield _gauge("probe_dns_query_succeeded", "Whether the server has answered.", int(answered))
    for section in ("answer", "authority", "additional"):
        count = details.evidence.get(f"{section} records", 0)
        yield _gauge(f"probe_dns_{section}_rrs", f"Number of records in the section {section}.", count)
    if "service_dns_soa_serial" in details.gauges:
        serial = details.gauges["service_dns_soa_serial"]
        yield _gauge("probe_dns_serial", "Serial number of the zone.", serial)


def _icmp(probe: ModuleProbe) -> Iterator[GaugeMetricFamily]:
    phases = probe.result.details.phases
    seconds = {"resolve": phases.get("resolve", 0.0), "setup": 0.0, "rtt": phases.get("processing", 0.0)}
    yield _by_phase("probe_icmp_duration_seconds", seconds)


def _grpc(probe: ModuleProbe) -> Iterator[GaugeMetricFamily]:
    details = probe.result.details
    phases = {phase: details.phases.get(phase, 0.0) for phase in ("resolve", "connect", "tls")}
    yield _by_phase("probe_grpc_duration_seconds", {**phases, "check": details.phases.get("processing", 0.0)})
    yield _gauge("probe_grpc_ssl", "Whether TLS was used.", int(details.tls is not None))


def _tls(details: ProbeDetails) -> Iterator[GaugeMetricFamily]:
    tls, gauges = details.tls, details.gauges
    if tls is None:
        return
    leaf, chain = gauges.get(_EXPIRY), gauges.get(_CHAIN_EXPIRY)
    if leaf is not None:
        earliest = min(leaf, chain) if chain is not None else leaf
        yield _gauge("probe_ssl_earliest_cert_expiry", "Earliest expiry of the chain.", earliest)
    if chain is not None:
        yield _gauge("probe_ssl_last_chain_expiry_timestamp_seconds", "Expiry of the verified chain.", chain)
    info = GaugeMetricFamily(
        "probe_ssl_last_chain_info",
        "The served certificate.",
        labels=["fingerprint_sha256", "subject", "issuer", "subjectalternative", "serialnumber"],
    )
    info.add_metric([tls.fingerprint, tls.subject, tls.issuer, tls.names, tls.serial], 1)
    yield info
    version = GaugeMetricFamily("probe_tls_version_info", "The version of TLS.", labels=["version"])
    version.add_metric([_VERSIONS.get(tls.version, tls.version)], 1)
    yield version
