"""Tables of current values: queries that are joined on labels, with a bounded number of rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from grafana_foundation_sdk.builders import table
from grafana_foundation_sdk.builders.common import TableFooterOptions, TableSortByFieldState
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus

from grafana.panels import DECIMALS, ThresholdSteps, configure, instant_query, threshold_config

# Where the cells of a label lead.
LINKS = {
    label: f"/d/defib-{board}?var-{label}=${{__value.raw}}&${{datasource:queryparam}}&${{__url_time_range}}"
    for label, board in (("service", "service"), ("host", "hosts"))
}
TIME = "dateTimeAsIsoNoDateIfToday"  # of milliseconds


@dataclass(frozen=True)
class Value:
    """A column with the values of an expression."""

    expression: str
    unit: str = "none"
    decimals: int | None = None
    steps: ThresholdSteps = ()
    mappings: list[model.ValueMapping] = field(default_factory=list)

    def list_properties(self) -> Iterator[model.DynamicConfigValue]:
        """Yield what makes the column look different from a plain one."""
        decimals = DECIMALS.get(self.unit) if self.decimals is None else self.decimals
        if self.unit != "none":
            yield model.DynamicConfigValue(id_val="unit", value=self.unit)
        if decimals is not None:
            yield model.DynamicConfigValue(id_val="decimals", value=decimals)
        if self.steps:
            yield model.DynamicConfigValue(id_val="thresholds", value=threshold_config(self.steps).build())
        if self.mappings:
            yield model.DynamicConfigValue(id_val="mappings", value=self.mappings)
        if self.steps or self.mappings:
            yield model.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"})


def table_panel(
    title: str,
    labels: Mapping[str, str],
    values: Mapping[str, Value],
    *,
    key: str = "",
    rank: str = "",
    lowest: bool = False,
    bounded: bool = False,
    whole: bool = False,
    sort: Sequence[str] = (),
    width: int = 24,
    height: int = 9,
    description: str = "",
) -> table.Panel:
    """Return a table with a row for each combination of `labels`, which has their titles.

    `values` has the title of each value; one without a title contributes labels only. Every expression is aggregated to
    the labels of the table: others, the name of the metric among them, would prevent that rows are joined. It has $rows
    rows: those with the highest, or lowest, `rank` among the values of the labels `key`. Without them, the first value ranks
    rows. `bounded`: one service or the processes of Defib have few rows. `whole`: the expressions are whole queries, and
    have the same labels. `sort` has titles; with `-`, descending.
    """
    panel = configure(table.Panel(), title, "none", width, height, description).filterable(filterable=True)
    panel = panel.footer(TableFooterOptions().enable_pagination(enable_pagination=True).show(show=False))
    by = ", ".join(labels)
    key, rank = key or by, rank or next(iter(values.values())).expression
    limit = f"{'bottomk' if lowest else 'topk'}($rows, max by ({key}) ({rank}))"
    refs = {name: chr(ord("A") + index) for index, name in enumerate(values)}
    for name, value in values.items():
        expression = value.expression if whole else f"max by ({by}) ({value.expression})"
        if not (bounded or whole):
            expression = limit if (key, rank) == (by, value.expression) else f"{expression} and on ({key}) {limit}"
        panel = panel.with_target(instant_query(expression, refs[name]).format(prometheus.PromQueryFormat.TABLE))
    fields = {f"Value #{refs[name]}" if len(values) > 1 else "Value": name for name in values if name}
    names = {**labels, **fields}
    if len(values) > 1:
        panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    shown = {"include": {"names": list(names)}}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="filterFieldsByName", options=shown))
    organized = {"indexByName": {name: index for index, name in enumerate(names)}, "renameByName": names}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=organized))
    for name, value in values.items():
        if name and (properties := list(value.list_properties())):
            panel = panel.override_by_name(name, properties)
    for label, name in labels.items():
        if label not in LINKS:
            continue
        link = [{"title": "Open", "url": LINKS[label]}]
        panel = panel.override_by_name(name, [model.DynamicConfigValue(id_val="links", value=link)])
    return panel.sort_by(
        [TableSortByFieldState().display_name(each.lstrip("-")).desc(desc=each.startswith("-")) for each in sort]
    )
