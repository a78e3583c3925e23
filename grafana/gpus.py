"""*GPUs*: by host, by card, by the container that holds their memory."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import GREEN, ORANGE, RED, gauges, lines, query, rows

CARD = 'host=~"$host", gpu=~"$gpu"'
NAME = "{{host}} {{gpu}}"
HEAT = ((None, GREEN), (80, ORANGE), (88, RED))
HEALTH = parts.words({"1": ("healthy", GREEN), "0": ("unhealthy", RED)})


def build() -> Dashboard:
    made = parts.dashboard(
        "gpus", "GPUs", "GPUs by host and card, and which containers hold their memory",
        [
            parts.variable("group", "Group", "label_values(host_info, group)"),
            parts.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)', offered=True),
            parts.variable("gpu", "GPU", 'label_values(gpu_info{host=~"$host"}, gpu)'),
        ],
    )  # fmt: skip
    made = _cards(made)
    made = _work(made.with_row(Row("Work")))
    made = _containers(made.with_row(Row("Who holds their memory")))
    return _faults(made.with_row(Row("Faults")))


def _best(name: str) -> str:
    return f"max by (host, gpu) ({name}{{{CARD}}})"


def _cards(made: Dashboard) -> Dashboard:
    values = {
        "Health": _best("gpu_healthy"),
        "": f"max by (host, gpu, name, driver_version) (gpu_info{{{CARD}}})",
        "Used": _best("gpu_utilization_ratio"),
        "Memory": f"{_best('gpu_memory_used_bytes')} / {_best('gpu_memory_total_bytes')}",
        "Heat": f'max by (host, gpu) (gpu_temperature_celsius{{{CARD}, sensor="gpu"}})',
        "Power": _best("gpu_power_watts"),
    }
    return parts.add(
        made,
        rows(
            "Cards", values, {"host": "Host", "gpu": "GPU", "name": "Name", "driver_version": "Driver"}, sort="Health",
            units={"Used": "percentunit", "Memory": "percentunit", "Heat": "celsius", "Power": "watt"},
            steps={"Heat": HEAT, "Memory": ((None, GREEN), (0.9, ORANGE), (0.98, RED))}, meaning={"Health": HEALTH},
            links={"Host": "/d/defib-hosts?var-host=${__data.fields.Host}"},
        )
    )  # fmt: skip


def _work(made: Dashboard) -> Dashboard:
    for title, unit, name in (
        ("Used", "percentunit", "gpu_utilization_ratio"),
        ("Memory used", "bytes", "gpu_memory_used_bytes"),
        ("Power", "watt", "gpu_power_watts"),
    ):
        made = parts.add(made, lines(title, unit, query(_best(name), NAME), top=1 if unit == "percentunit" else None))
    heat = f"max by (host, gpu, sensor) (gpu_temperature_celsius{{{CARD}}})"
    clocks = f'max by (host, gpu, clock) (gpu_clock_hertz{{{CARD}, clock=~"sm|memory"}})'
    made = parts.add(made, lines("Heat", "celsius", query(heat, f"{NAME} {{{{sensor}}}}"), steps=HEAT))
    made = parts.add(made, lines("Clocks", "hertz", query(clocks, f"{NAME} {{{{clock}}}}")))
    spare = f"{_best('gpu_power_limit_watts')} - {_best('gpu_power_watts')}"
    return made.with_panel(lines("Power below the limit", "watt", query(spare, NAME)))


def _containers(made: Dashboard) -> Dashboard:
    held = f"max by (host, gpu, container) (gpu_process_memory_bytes{{{CARD}}})"
    return parts.add(
        made,
        lines("Memory by container", "bytes", query(held, f"{NAME} {{{{container}}}}"), stacked=True),
        rows("Held now", {"Memory": held}, {"host": "Host", "gpu": "GPU", "container": "Container"}, width=12, height=8,
             units={"Memory": "bytes"}, sort="Memory", down=True)
    )  # fmt: skip


def _faults(made: Dashboard) -> Dashboard:
    throttled = (
        f'max by (host, gpu, reason) (gpu_throttle_active{{{CARD}, reason!~"gpu_idle|applications_clocks_setting"}})'
    )
    seconds = f"max by (host, gpu, reason) (rate(gpu_throttle_seconds_total{{{CARD}}}[$__rate_interval]))"
    made = parts.add(
        made,
        lines("Slowed for", "none", query(throttled, f"{NAME} {{{{reason}}}}"), top=1, width=8),
        lines("Share of the time slowed", "percentunit", query(seconds, f"{NAME} {{{{reason}}}}"), width=8),
        lines("Cards that answer", "none", query('max by (host) (gpu_count{host=~"$host"})', "{{host}}"), width=8)
    )  # fmt: skip
    ecc = f"max by (host, gpu, kind, scope) (gpu_ecc_errors_total{{{CARD}}})"
    mapped = f"max by (host, gpu, kind) (gpu_remapped_rows{{{CARD}}})"
    xids = f"time() - max by (host, gpu, xid) (gpu_xid_last_timestamp_seconds{{{CARD}}})"
    return parts.add(
        made,
        gauges("Memory errors", "none", ecc, f"{NAME} {{{{kind}}}} {{{{scope}}}}", ((None, GREEN), (1, RED)), width=8),
        gauges("Rows of memory that were remapped", "none", mapped, f"{NAME} {{{{kind}}}}", ((None, GREEN), (1, ORANGE)),
               width=8),
        rows("XIDs of the kernel's log", {"Ago": xids}, {"host": "Host", "gpu": "GPU", "xid": "XID"}, width=8, height=8,
             units={"Ago": "s"}, sort="Ago")
    )  # fmt: skip
