// Prints what Grafana shows in table panels: as JSON, the titles of the columns and the texts of the cells.
//
// Reads from standard input: [{panel, answers: {refId: data of Prometheus' /api/v1/query}}]. Grafana's server turns an
// answer into one frame for each series, or an empty one; the rest is Grafana's own code: the data source makes tables of
// these frames, the panel's transformations join them, and overrides, units and mappings make texts of the values.
"use strict";
const fs = require("node:fs");
const path = require("node:path");

globalThis.window = globalThis; // parts of a browser that it looks for
globalThis.navigator ??= { languages: ["en"], language: "en" };
const data = require("@grafana/data");

// Grafana's data source is a module for a browser's bundler. The one file that is needed here imports three packages.
function loadResultTransformer() {
  const folder = path.dirname(require.resolve("@grafana/prometheus/package.json"));
  const text = fs.readFileSync(path.join(folder, "dist/esm/result_transformer.mjs"), "utf8");
  const body = text
    .replace(/^import \{(.*)\} from ('.*');$/gm, "const {$1} = require($2);")
    .replace(/^export \{(.*)\};$/m, "return {$1};");
  return new Function("require", body)(require);
}

const { transformV2 } = loadResultTransformer();
const transformers = [...new Set(Object.values(data.standardTransformers))]; // some have two names
data.standardTransformersRegistry.setInit(() =>
  transformers.map((each) => ({ id: each.id, aliasIds: each.aliasIds, name: each.name, transformation: each })),
);

// Table cells have no options that these tests look at.
const property = (id, process) => ({
  id,
  path: id,
  name: id,
  process: process ?? ((value) => value),
  shouldApply: () => true,
});
const registry = new data.Registry(() => [
  ...["unit", "decimals", "mappings", "links", "displayName", "min", "max", "noValue"].map((id) => property(id)),
  property("thresholds", data.thresholdsOverrideProcessor),
  { ...property("custom.cellOptions"), path: "cellOptions", isCustom: true },
]);

function toFrames(refId, answer) {
  const field = (name, type, values, more = {}) => ({ name, type, values, config: {}, ...more });
  if (answer.result.length === 0) {
    return [{ refId, fields: [], length: 0, meta: { custom: { resultType: answer.resultType } } }];
  }
  return answer.result.map(({ metric, value }) => ({
    refId,
    length: 1,
    meta: { type: "numeric-multi", custom: { resultType: answer.resultType } },
    fields: [
      field("Time", data.FieldType.time, [value[0] * 1000]),
      field(metric.__name__ ?? "Value", data.FieldType.number, [value[1]], { labels: metric }),
    ],
  }));
}

async function show({ panel, answers }) {
  const frames = panel.targets.flatMap((target) => toFrames(target.refId, answers[target.refId]));
  const tables = transformV2({ data: frames }, { targets: panel.targets }, {}).data;
  const joined = await new Promise((resolve, reject) => {
    data.transformDataFrame(panel.transformations ?? [], tables).subscribe({ next: resolve, error: reject });
  });
  const displayed = data.applyFieldOverrides({
    data: joined,
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme: data.createTheme(),
    timeZone: "utc",
  });
  // A table panel shows one frame; others can be chosen in a list.
  return { title: panel.title, frames: displayed.length, ...toTexts(displayed[0], panel.options?.sortBy ?? []) };
}

// The panel sorts rows by several columns, the first one first.
function toTexts(frame, sortBy) {
  const titles = frame.fields.map((field) => data.getFieldDisplayName(field, frame));
  const sorted = [...sortBy].reverse().reduce((sorted, { displayName, desc }) => {
    return data.sortDataFrame(sorted, titles.indexOf(displayName), desc);
  }, frame);
  const rows = Array.from({ length: frame.length }, (_, row) =>
    sorted.fields.map((field) => data.formattedValueToString(field.display(field.values[row]))),
  );
  return { columns: titles, rows };
}

async function main() {
  const panels = JSON.parse(fs.readFileSync(0, "utf8"));
  process.stdout.write(JSON.stringify(await Promise.all(panels.map(show))));
}

main();
