"""The *GPUs* dashboard: by host, GPU and container."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import BLUE, GREEN, ORANGE, RED, ZERO_IS_GOOD, bar_gauge, graph, range_query, stat_panel
from grafana.promql import highest
from grafana.tables import TIME, Value, table_panel

GPU = 'host=~"$host", gpu=~"$gpu"'
NAME = "{{host}} {{gpu}}"
TEMPERATURE_THRESHOLDS = ((None, GREEN), (80, ORANGE), (88, RED))
MEMORY_THRESHOLDS = ((None, GREEN), (0.9, ORANGE), (0.98, RED))
HEALTH = panels.value_mappings({"1": ("healthy", GREEN), "0": ("unhealthy", RED)})
USED = f"gpu_memory_used_bytes{{{GPU}}} / gpu_memory_total_bytes{{{GPU}}}"
# The driver itself uses some memory. A process that only holds memory keeps a card from others.
FREE = f"({USED} < 0.05) and on (host, gpu) gpu_utilization_ratio{{{GPU}}} < 0.05"
TOP = "The 20 highest at the end of the displayed time range."


def build() -> Dashboard:
    board = panels.dashboard(
        "gpus",
        "GPUs",
        "GPUs by host, and the memory that each container uses",
        [
            panels.variable("group", "Group", "label_values(host_info, group)"),
            panels.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)', only_offered=True),
            panels.variable("gpu", "GPU", 'label_values(gpu_info{host=~"$host"}, gpu)'),
        ],
    )
    board = _overview(board)
    board = _utilization(board.with_row(Row("Utilization")))
    board = _power(board.with_row(Row("Power, temperature and clocks")))
    board = _containers(board.with_row(Row("Memory by container, free cards, MIG")))
    return _faults(board.with_row(Row("Faults")))


def _by_gpu(name: str) -> str:
    return f"max by (host, gpu) ({name}{{{GPU}}})"


def _graph_by_gpu(title: str, unit: str, expression: str, *more: str, maximum: float | None = None) -> timeseries.Panel:
    """Return a graph of the GPUs with the highest values; `more` are labels that the expression has, too."""
    by = ", ".join(("host", "gpu", *more))
    legend = " ".join((NAME, *(f"{{{{{label}}}}}" for label in more)))
    query = range_query(highest(f"max by ({by}) ({expression})", by), legend)
    return graph(title, unit, query, maximum=maximum, width=8, description=TOP, decimals=1)


def _overview(board: Dashboard) -> Dashboard:
    power = f"sum({_by_gpu('gpu_power_watts')})"
    for title, unit, expression, steps in (
        ("GPUs that respond", "none", 'sum(max by (host) (gpu_count{host=~"$host"}))', ((None, BLUE),)),
        (
            "Unhealthy",
            "none",
            f"count({_by_gpu('gpu_healthy')} == 0) or 0 * count({_by_gpu('gpu_healthy')})",
            ZERO_IS_GOOD,
        ),
        ("Free cards", "none", f"count({FREE}) or 0 * count({_by_gpu('gpu_info')})", ((None, ORANGE), (1, GREEN))),
        ("Average utilization", "percentunit", f"avg({_by_gpu('gpu_utilization_ratio')})", ((None, BLUE),)),
        (
            "GPU memory in use",
            "percentunit",
            f"sum({_by_gpu('gpu_memory_used_bytes')}) / sum({_by_gpu('gpu_memory_total_bytes')})",
            ((None, BLUE),),
        ),
        ("Total power", "watt", power, ((None, BLUE),)),
    ):
        decimals = 1 if unit == "percentunit" else None
        board = panels.add_panels(board, stat_panel(title, unit, expression, steps, decimals=decimals))
    heat = "gpu_temperature_celsius{{" + GPU + ', sensor="{sensor}"}}'
    return panels.add_panels(
        board,
        table_panel(
            "GPUs",
            {"host": "Host", "gpu": "GPU", "name": "Name", "driver_version": "Driver"},
            {
                "Health": Value(_by_gpu("gpu_healthy"), mappings=HEALTH),
                "": Value(f"gpu_info{{{GPU}}}"),
                "Utilization": Value(_by_gpu("gpu_utilization_ratio"), "percentunit", 0),
                "GPU memory": Value(USED, "percentunit", 1, MEMORY_THRESHOLDS),
                "Temperature": Value(heat.format(sensor="gpu"), "celsius", 0, TEMPERATURE_THRESHOLDS),
                "Memory temperature": Value(heat.format(sensor="memory"), "celsius", 0, ((None, GREEN), (98, RED))),
                "Power": Value(_by_gpu("gpu_power_watts"), "watt", 0),
                "Power limit": Value(_by_gpu("gpu_power_limit_watts"), "watt", 0),
                "Fan": Value(_by_gpu("gpu_fan_speed_ratio"), "percentunit", 0),
                "P-state": Value(_by_gpu("gpu_performance_state"), "none", 0),
            },
            key="host, gpu",
            lowest=True,
            sort=("Health", "Host", "GPU"),
            description="A P-state of 0 is the highest performance. Cards without fans have no fan speed.",
        ),
    )


def _utilization(board: Dashboard) -> Dashboard:
    for title, name in (("Utilization", "gpu_utilization_ratio"), ("Memory bandwidth", "gpu_memory_utilization_ratio")):
        board = panels.add_panels(board, _graph_by_gpu(title, "percentunit", _by_gpu(name), maximum=1))
    total = "sum(max by (host, gpu) (gpu_memory_{kind}_bytes{{" + GPU + "}}))"
    return panels.add_panels(
        board,
        _graph_by_gpu("GPU memory used", "bytes", _by_gpu("gpu_memory_used_bytes")),
        graph(
            "Memory of all cards",
            "bytes",
            *(
                range_query(total.format(kind=kind), kind, ref)
                for kind, ref in (("used", "A"), ("reserved", "B"), ("free", "C"))
            ),
            stacked=True,
            width=24,
            description="Reserved: by driver and firmware.",
        ),
    )


def _power(board: Dashboard) -> Dashboard:
    heat = f"max by (host, gpu, sensor) (gpu_temperature_celsius{{{GPU}}})"
    board = panels.add_panels(
        board,
        graph(
            "Total power",
            "watt",
            range_query(f"sum({_by_gpu('gpu_power_watts')})", "power"),
            range_query(f"sum({_by_gpu('gpu_power_limit_watts')})", "limit", "B"),
            width=8,
        ),
        _graph_by_gpu("Power", "watt", _by_gpu("gpu_power_watts")),
        graph(
            "Power left below the limit",
            "watt",
            range_query(
                highest(f"{_by_gpu('gpu_power_limit_watts')} - {_by_gpu('gpu_power_watts')}", "host, gpu", lowest=True),
                NAME,
            ),
            width=8,
            description="The 20 lowest at the end of the displayed time range.",
        ),
        _graph_by_gpu("Temperature", "celsius", heat, "sensor"),
    )
    for title, clock in (("Clock of the processors", 'clock="sm"'), ("Other clocks", 'clock!="sm"')):
        expression = f"max by (host, gpu, clock) (gpu_clock_hertz{{{GPU}, {clock}}})"
        board = panels.add_panels(board, _graph_by_gpu(title, "hertz", expression, "clock"))
    return panels.add_panels(
        board,
        _graph_by_gpu("Fan speed", "percentunit", _by_gpu("gpu_fan_speed_ratio"), maximum=1),
        _graph_by_gpu("P-state", "none", _by_gpu("gpu_performance_state")),
    )


def _containers(board: Dashboard) -> Dashboard:
    held = f"max by (host, gpu, container) (gpu_process_memory_bytes{{{GPU}}})"
    by = "host, gpu, container"
    return panels.add_panels(
        board,
        graph(
            "Memory by container",
            "bytes",
            range_query(highest(held, by), f"{NAME} {{{{container}}}}"),
            stacked=True,
            description=TOP,
        ),
        table_panel(
            "Current memory by container",
            {"host": "Host", "gpu": "GPU", "container": "Container"},
            {"GPU memory": Value(held, "bytes")},
            width=12,
            height=8,
            sort=("-GPU memory",),
        ),
        table_panel(
            "Free cards",
            {"host": "Host", "gpu": "GPU", "name": "Name"},
            {
                "GPU memory": Value(f"gpu_memory_total_bytes{{{GPU}}} and on (host, gpu) ({FREE})", "bytes"),
                "": Value(f"gpu_info{{{GPU}}} and on (host, gpu) ({FREE})"),
            },
            key="host, gpu",
            width=12,
            height=8,
            sort=("Host", "GPU"),
            description="Less than 5 % of the memory is used, and of the time.",
        ),
        table_panel(
            "MIG instances",
            {"host": "Host", "gpu": "GPU", "instance": "Instance", "profile": "Profile"},
            {"": Value(f"gpu_mig_instance_info{{{GPU}}}")},
            width=12,
            height=8,
            sort=("Host", "GPU"),
        ),
    )


def _faults(board: Dashboard) -> Dashboard:
    throttled = (
        f'max by (host, gpu, reason) (gpu_throttle_active{{{GPU}, reason!~"gpu_idle|applications_clocks_setting"}})'
    )
    seconds = f"max by (host, gpu, reason) (rate(gpu_throttle_seconds_total{{{GPU}}}[$__rate_interval]))"
    counts = highest('max by (host) (gpu_count{host=~"$host"})', "host", lowest=True)
    board = panels.add_panels(
        board,
        _graph_by_gpu("Reasons for reduced clocks", "none", throttled, "reason", maximum=1),
        _graph_by_gpu("Share of time with reduced clocks", "percentunit", seconds, "reason"),
        graph(
            "GPUs that respond, by host",
            "none",
            range_query(counts, "{{host}}"),
            width=8,
            description="The 20 hosts with the fewest.",
        ),
    )
    for title, metric, labels, colour in (
        ("Memory errors", "gpu_ecc_errors_total", ("kind", "scope"), RED),
        ("Remapped memory rows", "gpu_remapped_rows", ("kind",), ORANGE),
        ("Retired memory pages", "gpu_retired_pages", ("kind",), ORANGE),
    ):
        legend = " ".join((NAME, *(f"{{{{{label}}}}}" for label in labels)))
        expression = f"topk(20, max by (host, gpu, {', '.join(labels)}) ({metric}{{{GPU}}}))"
        board = panels.add_panels(
            board,
            bar_gauge(title, "none", expression, legend, ((None, GREEN), (1, colour)), width=8, description=TOP),
        )
    needed = panels.value_mappings({"1": ("needed", RED), "0": ("no", GREEN)})
    return panels.add_panels(
        board,
        table_panel(
            "XIDs in the kernel log",
            {"host": "Host", "gpu": "GPU", "xid": "XID"},
            {"Last seen": Value(f"1000 * gpu_xid_last_timestamp_seconds{{{GPU}}}", TIME)},
            width=12,
            height=8,
            sort=("-Last seen",),
        ),
        table_panel(
            "Recovery that the driver asks for",
            {"host": "Host", "gpu": "GPU", "action": "Action"},
            {"State": Value(f"gpu_recovery_needed{{{GPU}}}", mappings=needed)},
            width=12,
            height=8,
            sort=("-State", "Host", "GPU"),
        ),
    )
