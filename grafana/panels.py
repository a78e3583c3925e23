"""Building blocks of the dashboards: queries, panels with units and thresholds, variables, links."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    CustomVariable,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model

from grafana.promql import keep_last, select_job

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "defib"
ROWS = (100, 200, 500, 1000)
ALL = ".*"  # also matches an empty label: a service may have no host
GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "#808080"
ThresholdSteps = Sequence[tuple[float | None, str]]  # lower bound and colour; the first has no bound
# Two digits: a disk that is 99.95 % full is not full. Of the availability of 30 days, the third shows 26 seconds.
DECIMALS: Mapping[str, int] = {"percentunit": 2}
AVAILABILITY_DECIMALS = 3
GAP_MILLISECONDS = 90_000.0  # a line crosses a lost scrape, or a collector that failed once
UP_THRESHOLDS: ThresholdSteps = ((None, RED), (1, GREEN))
STATE_THRESHOLDS: ThresholdSteps = ((None, RED), (1, GREY), (2, GREEN))
ZERO_IS_GOOD: ThresholdSteps = ((None, GREEN), (1, RED))
USAGE_THRESHOLDS: ThresholdSteps = ((None, GREEN), (0.8, ORANGE), (0.9, RED))
AVAILABILITY_THRESHOLDS: ThresholdSteps = ((None, RED), (0.99, ORANGE), (0.995, GREEN))
Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, table.Panel, statetimeline.Panel, bargauge.Panel)


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
    """Return a query at the end of the displayed time range, with the last value of every series."""
    query = Dataquery().expr(keep_last(select_job(expression))).ref_id(ref).instant().datasource(SOURCE)
    return query.legend_format(legend or "__auto")


def threshold_config(steps: ThresholdSteps) -> ThresholdsConfig:
    result = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(result)


def value_mappings(texts: Mapping[str, tuple[str, str]]) -> list[model.ValueMapping]:
    """Return mappings from values to the text and colour that are displayed."""
    options = {value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in texts.items()}
    return [model.ValueMap(options=options)]


UP_DOWN_MAPPINGS = value_mappings({"1": ("up", GREEN), "0": ("down", RED)})
# `known` also where `up` is absent: nothing is known of a service that was not probed, or of a host without a shell.
STATE_MAPPINGS = value_mappings({"2": ("up", GREEN), "1": ("unknown", GREY), "0": ("down", RED)})


def state(up: str, known: str, by: str, on: str) -> str:
    """Return an expression that is 2 for up, 1 for unknown, 0 for down: for the series of `known` that `up` has or not."""
    return f"(2 * max by ({by}) ({up}) or on ({on}) group by ({by}) ({known}))"


def configure(
    panel: Panel, title: str, unit: str, width: int, height: int, description: str, decimals: int | None = None
) -> Panel:
    panel = panel.title(title).unit(unit).span(width).height(height).datasource(SOURCE)
    if (digits := DECIMALS.get(unit) if decimals is None else decimals) is not None:
        panel = panel.decimals(digits)
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
    decimals: int | None = None,
) -> timeseries.Panel:
    """Return a graph over time."""
    panel = configure(timeseries.Panel(), title, unit, width, height, description, decimals)
    panel = panel.fill_opacity(40 if stacked else 8).span_nulls(GAP_MILLISECONDS)
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
    decimals: int | None = None,
) -> stat.Panel:
    """Return a panel with the current value, or one value for each series."""
    panel = configure(stat.Panel(), title, unit, width, height, description, decimals)
    panel = panel.thresholds(threshold_config(steps))
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
        configure(bargauge.Panel(), title, unit, width, height, description).thresholds(threshold_config(steps)).min(0)
    )
    panel = panel.max(1) if unit == "percentunit" else panel
    panel = panel.with_target(instant_query(expression, legend=legend)).reduce_options(
        ReduceDataOptions().calcs(["lastNotNull"])
    )
    return panel.orientation(common.VizOrientation.HORIZONTAL).display_mode(common.BarGaugeDisplayMode.BASIC)


def state_timeline(
    title: str,
    expression: str,
    legend: str,
    *,
    width: int = 24,
    height: int = 8,
    description: str = "",
    mappings: list[model.ValueMapping] = STATE_MAPPINGS,
    steps: ThresholdSteps = STATE_THRESHOLDS,
) -> statetimeline.Panel:
    """Return a timeline for each series, with the states of `state()` or, with other `mappings`, of the expression."""
    panel = configure(statetimeline.Panel(), title, "none", width, height, description).with_target(
        range_query(expression, legend)
    )
    panel = panel.mappings(mappings).thresholds(threshold_config(steps)).merge_values(merge_values=True)
    return panel.show_value(common.VisibilityMode.NEVER)


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


def _source_variable() -> DatasourceVariable:
    """Return the variable for the Prometheus to query: at first, the one that is provisioned."""
    current = model.VariableOption(text="Prometheus", value="prometheus")
    return DatasourceVariable("datasource").label("Data source").type("prometheus").current(current)


def _rows_variable() -> CustomVariable:
    """Return the variable for the number of rows in a table: 10,000 services are too many for a browser."""
    options = [model.VariableOption(text=str(each), value=str(each), selected=each == ROWS[0]) for each in ROWS]
    values = ",".join(map(str, ROWS))
    return CustomVariable("rows").label("Rows").values(values).options(options).current(options[0])


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


def dashboard(
    name: str, title: str, description: str, variables: Sequence[QueryVariable] = (), *, rows: bool = True
) -> Dashboard:
    """Return an empty dashboard with links to the other dashboards that keep variables and time range.

    With `rows`, a variable limits the rows of its tables.
    """
    link = DashboardLink("Defib").type(model.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(as_dropdown=True)
    result = (
        Dashboard(title).uid(f"defib-{name}").description(description).tags([TAG]).refresh("30s").time("now-6h", "now")
    )
    result = result.timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR).readonly()
    result = result.link(link.include_vars(include_vars=True).keep_time(keep_time=True))
    for each in (_source_variable(), *variables, *([_rows_variable()] if rows else [])):
        result = result.with_variable(each)
    return result
