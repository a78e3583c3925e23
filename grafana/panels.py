"""Building blocks of the dashboards: queries, panels with units and thresholds, variables, links."""

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
ALL = ".*"  # also matches an empty label: a service may have no host
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
ThresholdSteps = Sequence[tuple[float | None, str]]  # lower bound and colour; the first has no bound
UP_THRESHOLDS: ThresholdSteps = ((None, RED), (1, GREEN))
ZERO_IS_GOOD: ThresholdSteps = ((None, GREEN), (1, RED))
USAGE_THRESHOLDS: ThresholdSteps = ((None, GREEN), (0.8, ORANGE), (0.9, RED))
AVAILABILITY_THRESHOLDS: ThresholdSteps = ((None, RED), (0.99, ORANGE), (0.995, GREEN))
# The job that publishes a metric. Series of the same name from other jobs are ignored.
JOBS = {
    r"(service|provider|host|gpu|defib_exporter)_\w+": 'job="defib-exporter"',
    r"defib_remediator_\w+": 'job="defib-remediator"',
    r"defib_(build|config)_\w+": 'job=~"defib-(exporter|remediator)"',
    r"prometheus_\w+": 'job="prometheus"',
    r"alertmanager_\w+": 'job="alertmanager"',
}
STRING_OR_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<name>[a-zA-Z_][\w:]*)(?P<brace>{)?')
Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, table.Panel, statetimeline.Panel, bargauge.Panel)


def select_job(expression: str) -> str:
    """Add a `job` matcher to every metric in `expression`: the job that publishes it."""

    def add_matcher(match: re.Match[str]) -> str:
        name = match["name"] or ""
        job = next((job for names, job in JOBS.items() if re.fullmatch(names, name)), "")
        if not job:
            return match[0]
        return f"{name}{{{job}, " if match["brace"] else f"{name}{{{job}}}"

    return STRING_OR_NAME.sub(add_matcher, expression)


def range_query(expression: str, legend: str = "", ref: str = "A") -> Dataquery:
    """Return a query over the displayed time range."""
    return (
        Dataquery()
        .expr(select_job(expression))
        .legend_format(legend or "__auto")
        .ref_id(ref)
        .range()
        .datasource(SOURCE)
    )


def instant_query(expression: str, ref: str = "A", legend: str = "") -> Dataquery:
    """Return a query at the end of the displayed time range: a series that has ended is not shown."""
    query = Dataquery().expr(select_job(expression)).ref_id(ref).instant().datasource(SOURCE)
    return query.legend_format(legend or "__auto")


def threshold_config(steps: ThresholdSteps) -> ThresholdsConfig:
    result = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(result)


def value_mappings(texts: Mapping[str, tuple[str, str]]) -> list[model.ValueMapping]:
    """Return mappings from values to the text and colour that are displayed."""
    options = {value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in texts.items()}
    return [model.ValueMap(options=options)]


UP_DOWN_MAPPINGS = value_mappings({"1": ("up", GREEN), "0": ("down", RED)})


def _configure(panel: Panel, title: str, unit: str, width: int, height: int, description: str) -> Panel:
    panel = panel.title(title).unit(unit).span(width).height(height).datasource(SOURCE)
    return panel.description(description) if description else panel


def graph(
    title: str,
    unit: str,
    *queries: Dataquery,
    width: int = 12,
    height: int = 8,
    steps: ThresholdSteps = (),
    stacked: bool = False,
    maximum: float | None = None,
    minimum: float | None = 0,
    bars: bool = False,
    description: str = "",
) -> timeseries.Panel:
    """Return a graph over time."""
    panel = _configure(timeseries.Panel(), title, unit, width, height, description).fill_opacity(40 if stacked else 8)
    for each in queries:
        panel = panel.with_target(each)
    if steps:
        panel = panel.thresholds(threshold_config(steps)).thresholds_style(
            GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    if stacked:
        panel = panel.stacking(StackingConfig().mode(common.StackingMode.NORMAL))
    if bars:
        panel = panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if maximum is not None:
        panel = panel.max(maximum)
    if minimum is not None:
        panel = panel.min(minimum)
    legend = VizLegendOptions().show_legend(show_legend=True).placement(common.LegendPlacement.BOTTOM)
    legend = legend.display_mode(common.LegendDisplayMode.LIST)
    tooltip = VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    return panel.legend(legend).tooltip(tooltip)


def stat_panel(
    title: str,
    unit: str,
    expression: str,
    steps: ThresholdSteps,
    *,
    width: int = 4,
    height: int = 4,
    mappings: list[model.ValueMapping] | None = None,
    description: str = "",
    legend: str = "",
) -> stat.Panel:
    """Return a panel with the current value, or one value for each series."""
    panel = _configure(stat.Panel(), title, unit, width, height, description).thresholds(threshold_config(steps))
    panel = panel.with_target(instant_query(expression, legend=legend)).reduce_options(
        ReduceDataOptions().calcs(["lastNotNull"])
    )
    panel = panel.color_mode(common.BigValueColorMode.BACKGROUND).graph_mode(common.BigValueGraphMode.NONE)
    return panel.mappings(mappings) if mappings else panel


def bar_gauge(
    title: str,
    unit: str,
    expression: str,
    legend: str,
    steps: ThresholdSteps,
    *,
    width: int = 12,
    height: int = 8,
    description: str = "",
) -> bargauge.Panel:
    """Return a panel with one bar for each series: the current value."""
    panel = (
        _configure(bargauge.Panel(), title, unit, width, height, description).thresholds(threshold_config(steps)).min(0)
    )
    panel = panel.max(1) if unit == "percentunit" else panel
    panel = panel.with_target(instant_query(expression, legend=legend)).reduce_options(
        ReduceDataOptions().calcs(["lastNotNull"])
    )
    return panel.orientation(common.VizOrientation.HORIZONTAL).display_mode(common.BarGaugeDisplayMode.BASIC)


def state_timeline(
    title: str, expression: str, legend: str, *, width: int = 24, height: int = 8, description: str = ""
) -> statetimeline.Panel:
    """Return a timeline of up and down for each series."""
    panel = _configure(statetimeline.Panel(), title, "none", width, height, description).with_target(
        range_query(expression, legend)
    )
    panel = panel.mappings(UP_DOWN_MAPPINGS).thresholds(threshold_config(UP_THRESHOLDS)).merge_values(merge_values=True)
    return panel.show_value(common.VisibilityMode.NEVER)


def table_panel(
    title: str,
    queries: Mapping[str, str],
    columns: Mapping[str, str],
    *,
    width: int = 24,
    height: int = 9,
    units: Mapping[str, str] | None = None,
    steps: Mapping[str, ThresholdSteps] | None = None,
    mappings: Mapping[str, list[model.ValueMapping]] | None = None,
    links: Mapping[str, str] | None = None,
    sort: str = "",
    descending: bool = False,
    description: str = "",
) -> table.Panel:
    """Return a table of current values.

    `queries` maps the title of a value column to its expression; an expression with an empty title contributes labels
    only. Rows are joined on shared labels. `columns` maps labels to column titles, in order. `units`, `steps`,
    `mappings` and `links` are keyed by column title.
    """
    panel = _configure(table.Panel(), title, "none", width, height, description).filterable(filterable=True)
    refs = {value: chr(ord("A") + index) for index, value in enumerate(queries)}
    for value, expression in queries.items():
        panel = panel.with_target(instant_query(expression, refs[value]).format(prometheus.PromQueryFormat.TABLE))
    fields = {f"Value #{refs[value]}" if len(queries) > 1 else "Value": value for value in queries}
    fields = {name: value for name, value in fields.items() if value}
    order = [*columns, *fields]
    names = {**columns, **fields}
    if len(queries) > 1:
        panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    fields_to_show = {"include": {"names": order}}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="filterFieldsByName", options=fields_to_show))
    organized = {"indexByName": {name: index for index, name in enumerate(order)}, "renameByName": names}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=organized))
    for name in dict.fromkeys([*(units or {}), *(steps or {}), *(mappings or {}), *(links or {})]):
        panel = panel.override_by_name(name, _properties(name, units, steps, mappings, links))
    return panel.sort_by([TableSortByFieldState().display_name(sort).desc(desc=descending)]) if sort else panel


def _properties(
    name: str,
    units: Mapping[str, str] | None,
    steps: Mapping[str, ThresholdSteps] | None,
    mappings: Mapping[str, list[model.ValueMapping]] | None,
    links: Mapping[str, str] | None,
) -> list[model.DynamicConfigValue]:
    """Return the display properties of a column."""
    properties: list[model.DynamicConfigValue] = []
    if units and name in units:
        properties.append(model.DynamicConfigValue(id_val="unit", value=units[name]))
    if steps and name in steps:
        properties.append(model.DynamicConfigValue(id_val="thresholds", value=threshold_config(steps[name]).build()))
    if mappings and name in mappings:
        properties.append(model.DynamicConfigValue(id_val="mappings", value=mappings[name]))
    if (steps and name in steps) or (mappings and name in mappings):
        cell = {"type": "color-text"}
        properties.append(model.DynamicConfigValue(id_val="custom.cellOptions", value=cell))
    if links and name in links:
        link = {"title": "Open", "url": links[name] + "&${__url_time_range}"}
        properties.append(model.DynamicConfigValue(id_val="links", value=[link]))
    return properties


def variable(name: str, label: str, values: str, *, single: bool = False, only_offered: bool = False) -> QueryVariable:
    """Return a dashboard variable over the values of a label, with multiple selection and "All" unless `single`.

    "All" matches every value, the empty one included; with `only_offered`, only the values that the preceding variables
    leave.
    """
    result = QueryVariable(name).label(label).datasource(SOURCE).query({"query": select_job(values), "refId": name})
    result = result.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
    if single:
        return result
    result = result.multi(multi=True).include_all(include_all=True)
    result = result if only_offered else result.all_value(ALL)
    return result.current(model.VariableOption(text="All", value="$__all"))


def annotation(name: str, expression: str, colour: str) -> AnnotationQuery:
    """Return an annotation for the times when an expression is not 0; `render` adds the texts."""
    return (
        AnnotationQuery()
        .name(name)
        .expr(select_job(expression))
        .datasource(SOURCE)
        .enable(enable=True)
        .icon_color(colour)
    )


def add_panels(result: Dashboard, *panels: Builder[model.Panel]) -> Dashboard:
    """Append panels, from left to right."""
    for panel in panels:
        result = result.with_panel(panel)
    return result


def dashboard(name: str, title: str, description: str, variables: Sequence[QueryVariable] = ()) -> Dashboard:
    """Return an empty dashboard with links to the other dashboards that keep variables and time range."""
    link = DashboardLink("Defib").type(model.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(as_dropdown=True)
    result = (
        Dashboard(title).uid(f"defib-{name}").description(description).tags([TAG]).refresh("30s").time("now-6h", "now")
    )
    result = result.timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR).readonly()
    result = result.link(link.include_vars(include_vars=True).keep_time(keep_time=True))
    for each in variables:
        result = result.with_variable(each)
    return result
