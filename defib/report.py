"""`defib report`: what happened in the last days, and what to watch, as text, HTML or JSON."""

from collections.abc import Iterator, Sequence
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from defib.output import format_table, print_json, print_text, wrap
from defib.remediator_client import Connect
from fleet.inventory.notify import Language
from remediator.notifications.rendering import shipped_templates
from remediator.notifications.report_texts import ReportTexts, Table, describe_report
from runtime.terminal import one_line

WIDTH = 100
LABEL_WIDTH = 27
ROWS_SHOWN = 20  # of each table, as text
TIMEOUT = 300.0  # seconds; Prometheus may have to read weeks of thousands of services
INDENT = "  "
HTML_LANGUAGES: dict[Language, str] = {"en": "en", "zh": "zh-CN"}


async def show_report(connect: Connect, since: str, *, as_json: bool, as_html: bool) -> int:
    """Print a report of the time since a duration ago."""
    async with connect() as remediator:
        report = await remediator.request("GET", f"/api/v1/report?{urlencode({'since': since})}", timeout=TIMEOUT)
        language, zone = remediator.inventory.notify.language, remediator.zone
    if as_json:
        print_json(report)
        return 0
    words = shipped_templates(language).words
    texts = describe_report(words, report, zone)
    more = words["report"]["and_more"]
    print_text(_render_page(texts, more, language) if as_html else "\n".join(_format(texts, more)))
    return 0


def _render_page(texts: ReportTexts, more: str, language: Language) -> str:
    environment = Environment(
        loader=PackageLoader("defib"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html")
    return page.render(texts=texts, more=more, language=HTML_LANGUAGES[language])


def _format(texts: ReportTexts, more: str) -> Iterator[str]:
    yield f"{texts.title}  {texts.period}\n"
    rows = [
        (label if number == 0 else "", line)
        for label, text in (*texts.headline, *texts.missing)
        for number, line in enumerate(wrap(one_line(text), WIDTH - LABEL_WIDTH - len(INDENT)))
    ]
    yield format_table(rows, WIDTH)
    for table in texts.tables:
        yield from _format_table(table, more)
    if texts.tables:
        yield ""
        yield from texts.explanations


def _format_table(table: Table, more: str) -> Iterator[str]:
    yield f"\n{table.title}"
    rows: list[Sequence[str]] = [[each.upper() for each in table.head], *table.rows[:ROWS_SHOWN]]
    yield from (INDENT + line for line in format_table(rows, WIDTH - len(INDENT)).splitlines())
    if left := table.omitted + len(table.rows) - ROWS_SHOWN if len(table.rows) > ROWS_SHOWN else table.omitted:
        yield INDENT + more.format(left)
