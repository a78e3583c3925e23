"""The *Gateway* dashboard: requests to model APIs, who uses their rate, how long requests wait, and how upstreams answer."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery

from grafana import panels
from grafana.panels import BLUE, GREEN, ORANGE, RED, ZERO_IS_GOOD, graph, range_query, stat_panel, state_timeline
from grafana.promql import highest

SELECTED = 'provider=~"$provider"'
INTERVAL = "[$__rate_interval]"
RATE, BASE = f"gateway_rate_limit_per_minute{{{SELECTED}}}", f"gateway_base_rate_per_minute{{{SELECTED}}}"
SENT = f"rate(gateway_queue_wait_seconds_count{{{SELECTED}}}{INTERVAL})"
# As in gateway.metrics.STATES: all but one of the series of a provider are 0.
STATES = panels.value_mappings(
    {"0": ("steady", GREEN), "1": ("recovering", BLUE), "2": ("retreating", ORANGE), "3": ("floor", RED)}
)
STATE = " or ".join(
    f'{number} * (max by (instance, provider) (gateway_retreat_state{{state="{state}", {SELECTED}}}) == 1)'
    for number, state in ((3, "floor"), (2, "retreating"), (1, "recovering"), (0, "steady"))
)
SECOND = [(None, GREEN), (60, ORANGE), (120, RED)]


def build() -> Dashboard:
    board = panels.dashboard(
        "gateway",
        "Gateway",
        "Requests to model APIs, and who uses their rate",
        [panels.variable("provider", "Provider", "label_values(gateway_base_rate_per_minute, provider)")],
        rows=False,
    )
    board = _requests(_current(board))
    board = _queue(board.with_row(Row("Queue")))
    return _upstreams(board.with_row(Row("Upstreams")))


def _current(board: Dashboard) -> Dashboard:
    refused = 'outcome=~"timeout|queue_full|dropped|paused|unavailable|shutting_down"'
    for title, unit, expression, steps in (
        ("Requests per minute", "none", f"sum(rate(gateway_requests_total{{{SELECTED}}}[5m])) * 60", [(None, GREEN)]),
        ("Effective rate", "percentunit", f"sum({RATE}) / sum({BASE})", [(None, RED), (0.5, ORANGE), (1, GREEN)]),
        ("Waiting", "none", f"sum(gateway_queue_depth{{{SELECTED}}})", [(None, GREEN), (40, ORANGE), (200, RED)]),
        ("In flight", "none", f"sum(gateway_in_flight{{{SELECTED}}})", [(None, GREEN)]),
        (
            "Refused in an hour",
            "none",
            f"sum(increase(gateway_requests_total{{{refused}, {SELECTED}}}[1h])) or 0 * sum({BASE})",
            [(None, GREEN), (10, ORANGE), (100, RED)],
        ),
        ("Upstreams that fail", "none", f"sum(gateway_breaker_open{{{SELECTED}}})", ZERO_IS_GOOD),
    ):
        board = panels.add_panels(board, stat_panel(title, unit, expression, steps, decimals=0))
    return board


def _requests(board: Dashboard) -> Dashboard:
    outcomes = f"sum by (outcome) (rate(gateway_requests_total{{{SELECTED}}}{INTERVAL})) * 60"
    clients = f"sum by (client) (rate(gateway_requests_total{{{SELECTED}}}{INTERVAL})) * 60"
    tokens = f"sum by (client) (rate(gateway_tokens_total{{{SELECTED}}}{INTERVAL})) * 60"
    return panels.add_panels(
        board,
        graph("Requests per minute by outcome", "none", range_query(outcomes, "{{outcome}}"), stacked=True),
        graph(
            "Requests per minute by client", "none", range_query(highest(clients, "client"), "{{client}}"),
            stacked=True, description="Who uses the rate: the 20 highest at the end of the displayed time range.",
        ),
        graph("Tokens per minute by client", "short", range_query(highest(tokens, "client"), "{{client}}"), stacked=True),
        graph(
            "Rate per minute", "none", range_query(f"sum({BASE})", "configured"),
            range_query(f"sum({RATE})", "effective", "B"), range_query(f"sum({SENT}) * 60", "sent", "C"),
        ),
        state_timeline("State of the rate", highest(STATE, "instance, provider"), "{{provider}} {{instance}}", height=6, mappings=STATES,
                       steps=[(None, GREEN), (1, BLUE), (2, ORANGE), (3, RED)],
                       description="Retreating and floor: the upstream refused requests (429), and the rate was cut."),
    )  # fmt: skip


def _quantiles(histogram: str, quantiles: dict[str, float]) -> list[Dataquery]:
    buckets = f"sum by (le) (rate({histogram}{INTERVAL}))"
    return [
        range_query(f"histogram_quantile({quantile}, {buckets})", legend, "AB"[index])
        for index, (legend, quantile) in enumerate(quantiles.items())
    ]


def _queue(board: Dashboard) -> Dashboard:
    half, most = {"50th percentile": 0.5, "95th percentile": 0.95}, {"50th percentile": 0.5, "99th percentile": 0.99}
    return panels.add_panels(
        board,
        graph(
            "Waiting requests by priority", "none",
            range_query(f"sum by (priority) (gateway_queue_depth{{{SELECTED}}})", "{{priority}}"), stacked=True,
        ),
        graph(
            "How long requests waited", "s", *_quantiles(f"gateway_queue_wait_seconds_bucket{{{SELECTED}}}", half),
            steps=SECOND[1:], description="Those that were sent.",
        ),
        graph("In flight", "none", range_query(f"sum(gateway_in_flight{{{SELECTED}}})", "in flight")),
        graph(
            "Time that the gateway itself takes", "s", *_quantiles("gateway_overhead_seconds_bucket", most),
            description="Of all providers, without waiting.",
        ),
    )  # fmt: skip


def _upstreams(board: Dashboard) -> Dashboard:
    errors = f"sum by (status) (rate(gateway_upstream_errors_total{{{SELECTED}}}{INTERVAL})) * 60"
    half = {"50th percentile": 0.5, "95th percentile": 0.95}
    return panels.add_panels(
        board,
        graph(
            "Time until the response begins", "s", *_quantiles(f"gateway_upstream_seconds_bucket{{{SELECTED}}}", half)
        ),
        graph(
            "429 and errors per minute by status", "none", range_query(errors, "{{status}}"), stacked=True, bars=True
        ),
    )
