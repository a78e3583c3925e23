"""What the dashboards are put together from: queries, panels with units and thresholds, variables, links."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    TableSortByFieldState,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardLink,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, prometheus
from grafana_foundation_sdk.models import dashboard as model

SOURCE = model.DataSourceRef(type_val="prometheus", uid="prometheus")
TAG = "defib"
ALL = ".*"  # an empty host, too: services need not have one
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
Steps = Sequence[tuple[float | None, str]]  # from which value on, in which colour; the first has no value
UP_OR_DOWN: Steps = ((None, RED), (1, GREEN))
NONE_IS_WELL: Steps = ((None, GREEN), (1, RED))
FULL: Steps = ((None, GREEN), (0.8, ORANGE), (0.9, RED))
AVAILABILITY: Steps = ((None, RED), (0.99, ORANGE), (0.995, GREEN))
# The job that publishes a metric: what other jobs serve under its name is not ours.
JOBS = {
    r"(service|provider|host|gpu|defib_exporter)_\w+": 'job="defib-exporter"',
    r"defib_remediator_\w+": 'job="defib-remediator"',
    r"defib_(build|config)_\w+": 'job=~"defib-(exporter|remediator)"',
    r"prometheus_\w+": 'job="prometheus"',
    r"alertmanager_\w+": 'job="alertmanager"',
}
STRING_OR_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<name>[a-zA-Z_][\w:]*)(?P<brace>{)?')
Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, table.Panel, statetimeline.Panel, bargauge.Panel)


def of_job(expression: str) -> str:
    """The expression with each metric selected from the job that publishes it."""

    def selected(found: re.Match[str]) -> str:
        name = found["name"] or ""
        job = next((job for names, job in JOBS.items() if re.fullmatch(names, name)), "")
        if not job:
            return found[0]
        return f"{name}{{{job}, " if found["brace"] else f"{name}{{{job}}}"

    return STRING_OR_NAME.sub(selected, expression)


def query(expression: str, legend: str = "", ref: str = "A") -> Dataquery:
    """A query over the time that is shown."""
    return Dataquery().expr(of_job(expression)).legend_format(legend or "__auto").ref_id(ref).range().datasource(SOURCE)


def now(expression: str, ref: str = "A", legend: str = "") -> Dataquery:
    """A query of the last moment that is shown: what is not known then is not shown as it was."""
    asked = Dataquery().expr(of_job(expression)).ref_id(ref).instant().datasource(SOURCE)
    return asked.legend_format(legend or "__auto")


def thresholds(steps: Steps) -> ThresholdsConfig:
    made = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(made)


def words(meaning: Mapping[str, tuple[str, str]]) -> list[model.ValueMapping]:
    """Values and what is shown for each: text and colour."""
    shown = {value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in meaning.items()}
    return [model.ValueMap(options=shown)]


UP_DOWN_WORDS = words({"1": ("up", GREEN), "0": ("down", RED)})


def _placed(panel: Panel, title: str, unit: str, width: int, height: int, about: str) -> Panel:
    panel = panel.title(title).unit(unit).span(width).height(height).datasource(SOURCE)
    return panel.description(about) if about else panel


def lines(
    title: str,
    unit: str,
    *queries: Dataquery,
    width: int = 12,
    height: int = 8,
    steps: Steps = (),
    stacked: bool = False,
    top: float | None = None,
    least: float | None = 0,
    bars: bool = False,
    about: str = "",
) -> timeseries.Panel:
    """Values over time."""
    panel = _placed(timeseries.Panel(), title, unit, width, height, about).fill_opacity(40 if stacked else 8)
    for each in queries:
        panel = panel.with_target(each)
    if steps:
        panel = panel.thresholds(thresholds(steps)).thresholds_style(
            GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    if stacked:
        panel = panel.stacking(StackingConfig().mode(common.StackingMode.NORMAL))
    if bars:
        panel = panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if top is not None:
        panel = panel.max(top)
    if least is not None:
        panel = panel.min(least)
    legend = VizLegendOptions().show_legend(show_legend=True).placement(common.LegendPlacement.BOTTOM)
    legend = legend.display_mode(common.LegendDisplayMode.LIST)
    tooltip = VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    return panel.legend(legend).tooltip(tooltip)


def number(
    title: str,
    unit: str,
    expression: str,
    steps: Steps,
    *,
    width: int = 4,
    height: int = 4,
    meaning: list[model.ValueMapping] | None = None,
    about: str = "",
    legend: str = "",
) -> stat.Panel:
    """One value, or one for each series, as it is now."""
    panel = _placed(stat.Panel(), title, unit, width, height, about).thresholds(thresholds(steps))
    panel = panel.with_target(now(expression, legend=legend)).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.color_mode(common.BigValueColorMode.BACKGROUND).graph_mode(common.BigValueGraphMode.NONE)
    return panel.mappings(meaning) if meaning else panel


def gauges(
    title: str,
    unit: str,
    expression: str,
    legend: str,
    steps: Steps,
    *,
    width: int = 12,
    height: int = 8,
    about: str = "",
) -> bargauge.Panel:
    """A bar for each series, as it is now."""
    panel = _placed(bargauge.Panel(), title, unit, width, height, about).thresholds(thresholds(steps)).min(0)
    panel = panel.max(1) if unit == "percentunit" else panel
    panel = panel.with_target(now(expression, legend=legend)).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.orientation(common.VizOrientation.HORIZONTAL).display_mode(common.BarGaugeDisplayMode.BASIC)


def states(
    title: str, expression: str, legend: str, *, width: int = 24, height: int = 8, about: str = ""
) -> statetimeline.Panel:
    """Up and down over time."""
    panel = _placed(statetimeline.Panel(), title, "none", width, height, about).with_target(query(expression, legend))
    panel = panel.mappings(UP_DOWN_WORDS).thresholds(thresholds(UP_OR_DOWN)).merge_values(merge_values=True)
    return panel.show_value(common.VisibilityMode.NEVER)


def rows(
    title: str,
    queries: Mapping[str, str],
    columns: Mapping[str, str],
    *,
    width: int = 24,
    height: int = 9,
    units: Mapping[str, str] | None = None,
    steps: Mapping[str, Steps] | None = None,
    meaning: Mapping[str, list[model.ValueMapping]] | None = None,
    links: Mapping[str, str] | None = None,
    sort: str = "",
    down: bool = False,
    about: str = "",
) -> table.Panel:
    """A table of what is so now.

    `queries` are expressions by the title of their value's column, joined by the labels they share; where the title is
    empty, the labels alone are shown. `columns` are the labels that are shown, by name, with their titles, in order.
    The rest is by a column's title.
    """
    panel = _placed(table.Panel(), title, "none", width, height, about).filterable(filterable=True)
    refs = {value: chr(ord("A") + index) for index, value in enumerate(queries)}
    for value, expression in queries.items():
        panel = panel.with_target(now(expression, refs[value]).format(prometheus.PromQueryFormat.TABLE))
    fields = {f"Value #{refs[value]}" if len(queries) > 1 else "Value": value for value in queries}
    fields = {name: value for name, value in fields.items() if value}
    order = [*columns, *fields]
    names = {**columns, **fields}
    if len(queries) > 1:
        panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    shown = {"include": {"names": order}}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="filterFieldsByName", options=shown))
    organized = {"indexByName": {name: index for index, name in enumerate(order)}, "renameByName": names}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=organized))
    for name in dict.fromkeys([*(units or {}), *(steps or {}), *(meaning or {}), *(links or {})]):
        panel = panel.override_by_name(name, _properties(name, units, steps, meaning, links))
    return panel.sort_by([TableSortByFieldState().display_name(sort).desc(desc=down)]) if sort else panel


def _properties(
    name: str,
    units: Mapping[str, str] | None,
    steps: Mapping[str, Steps] | None,
    meaning: Mapping[str, list[model.ValueMapping]] | None,
    links: Mapping[str, str] | None,
) -> list[model.DynamicConfigValue]:
    """How one column is shown."""
    found: list[model.DynamicConfigValue] = []
    if units and name in units:
        found.append(model.DynamicConfigValue(id_val="unit", value=units[name]))
    if steps and name in steps:
        found.append(model.DynamicConfigValue(id_val="thresholds", value=thresholds(steps[name]).build()))
    if meaning and name in meaning:
        found.append(model.DynamicConfigValue(id_val="mappings", value=meaning[name]))
    if (steps and name in steps) or (meaning and name in meaning):
        cell = {"type": "color-text"}
        found.append(model.DynamicConfigValue(id_val="custom.cellOptions", value=cell))
    if links and name in links:
        link = {"title": "Open", "url": links[name] + "&${__url_time_range}"}
        found.append(model.DynamicConfigValue(id_val="links", value=[link]))
    return found


def variable(name: str, label: str, values: str, *, one: bool = False, offered: bool = False) -> QueryVariable:
    """A choice among a label's values; several and all, unless `one`.

    All means whatever there is, an empty label too; where it is only what is `offered`, all of the choices before it count.
    """
    made = QueryVariable(name).label(label).datasource(SOURCE).query({"query": of_job(values), "refId": name})
    made = made.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
    if one:
        return made
    made = made.multi(multi=True).include_all(include_all=True)
    made = made if offered else made.all_value(ALL)
    return made.current(model.VariableOption(text="All", value="$__all"))


def marks(name: str, expression: str, colour: str) -> AnnotationQuery:
    """Marks on every panel where an expression is not 0; `python -m grafana` gives them their words, from their labels."""
    return (
        AnnotationQuery().name(name).expr(of_job(expression)).datasource(SOURCE).enable(enable=True).icon_color(colour)
    )


def add(made: Dashboard, *panels: Builder[model.Panel]) -> Dashboard:
    """The dashboard with more panels, from left to right."""
    for panel in panels:
        made = made.with_panel(panel)
    return made


def dashboard(name: str, title: str, about: str, variables: Sequence[QueryVariable] = ()) -> Dashboard:
    """An empty dashboard that links to the others and takes the choices along."""
    link = DashboardLink("Defib").type(model.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(as_dropdown=True)
    made = Dashboard(title).uid(f"defib-{name}").description(about).tags([TAG]).refresh("30s").time("now-6h", "now")
    made = made.timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR).readonly()
    made = made.link(link.include_vars(include_vars=True).keep_time(keep_time=True))
    for each in variables:
        made = made.with_variable(each)
    return made
