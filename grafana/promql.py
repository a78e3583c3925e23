"""Changes that all queries need: the job of a metric, its last value, its value at the end, and bounds on the result."""

import re
from collections.abc import Callable

# The job that publishes a metric. Series of the same name from other jobs are ignored.
JOBS = {
    r"(service|provider|host|gpu|defib_exporter)_\w+": 'job="defib-exporter"',
    r"defib_remediator_\w+": 'job="defib-remediator"',
    r"gateway_\w+": 'job="defib-gateway"',
    r"defib_(build|config)_\w+": 'job=~"defib-(exporter|remediator|gateway)"',
    r"prometheus_\w+": 'job="prometheus"',
    r"alertmanager_\w+": 'job="alertmanager"',
    r"node_\w+": 'job="node"',
}
# How long a table shows a series that has ended: as long as Prometheus looks back for one that was not scraped.
LAST = "[5m]"
_SERIES = re.compile(rf"{'|'.join(JOBS)}|\w+:\w[\w:]*|up|scrape_\w+")
_TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*"'
    r'|(?P<name>[a-zA-Z_][\w:]*)(?P<braces>{(?:[^"}]|"(?:[^"\\]|\\.)*")*})?(?P<range>\[[^\]]*\])?(?P<offset> offset \w+)?'
)


def select_job(expression: str) -> str:
    """Add a `job` matcher to every metric in `expression`: the job that publishes it."""

    def add_matcher(match: re.Match[str]) -> str:
        job = next((job for names, job in JOBS.items() if re.fullmatch(names, match["name"])), "")
        if not job:
            return match[0]
        braces = f"{{{job}, {match['braces'][1:]}" if match["braces"] else f"{{{job}}}"
        return f"{match['name']}{braces}{match['range'] or ''}{match['offset'] or ''}"

    return _change_series(expression, add_matcher)


def keep_last(expression: str) -> str:
    """Use the last value of every series in `expression`, so that a lost scrape removes nothing.

    `ALERTS` is as it is: an alert that has ended is not shown.
    """

    def look_back(match: re.Match[str]) -> str:
        if match["range"]:
            return match[0]
        return f"last_over_time({match['name']}{match['braces'] or ''}{LAST}{match['offset'] or ''})"

    return _change_series(expression, look_back)


def at_end(expression: str) -> str:
    """Evaluate every series in `expression` at the end of the displayed time range."""
    return _change_series(
        expression,
        lambda match: f"{match['name']}{match['braces'] or ''}{match['range'] or ''} @ end(){match['offset'] or ''}",
    )


def highest(expression: str, by: str, count: int = 20, *, lowest: bool = False, rank: str = "") -> str:
    """Return the series of `expression` for the `count` values of the labels `by` that have the highest `rank` at the end.

    They are the same for the whole range: `topk` alone chooses others at each point, any number in all. Without `rank`, it
    is the expression itself.
    """
    choose = "bottomk" if lowest else "topk"
    chosen = f"{choose}({count}, max by ({by}) ({at_end(keep_last(rank or expression))}))"
    return f"({expression}) and on ({by}) {chosen}"


def _change_series(expression: str, change: Callable[[re.Match[str]], str]) -> str:
    """Replace the metrics and recorded series in `expression`: no label has the name of one."""
    return _TOKEN.sub(
        lambda match: change(match) if match["name"] and _SERIES.fullmatch(match["name"]) else match[0], expression
    )
