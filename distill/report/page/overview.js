"use strict";
// The overview: how each run ended, its headline numbers, the first charts, facts and recipe.

const STATUS_MARKS = { finished: "✓", running: "▶", stopped: "■", failed: "✗", unknown: "?" };
const CHARTS_IN_OVERVIEW = 3;
const LONG_FACT = 120;

function notesOf(notes) {
  if (!notes.length) return null;
  return el(
    "aside",
    { class: "notes", "aria-label": "Notes" },
    el("h2", {}, notes.length === 1 ? "Note" : "Notes"),
    el(
      "ul",
      {},
      notes.map((note) => el("li", {}, prose(note))),
    ),
  );
}

/** The overview and the charts in it. The charts of one run are above its facts. */
function overview(data) {
  const first = mainCharts(data.index.charts);
  const curves = new Curves(
    data,
    first.map((chart) => ({ ...chart, id: `overview-${chart.id}` })),
  );
  const charts = first.length > 0 && el("section", { class: "group" }, el("h2", {}, "Main curves"), curves.build(true));
  const several = data.runs.length > 1;
  const runs = several
    ? [
        el(
          "div",
          { class: "runs-grid" },
          data.runs.map((run, r) => el("section", { class: "run" }, result(run, r), description(run, false))),
        ),
        charts,
      ]
    : data.runs.map((run) => [
        el("section", { class: "run" }, result(run, null)),
        charts,
        el("section", { class: "run description" }, description(run, true)),
      ]);
  return { root: el("div", {}, notesOf(data.index.notes ?? []), runs), redraw: () => curves.redraw() };
}

/** Charts of held-out problems, then of training. */
function mainCharts(charts) {
  const lines = charts.filter((chart) => chart.group === "quality" && chart.kind === "lines");
  const isHeldOut = (chart) => chart.series.some((series) => series.table === "validation");
  const heldOut = lines.filter(isHeldOut).slice(0, CHARTS_IN_OVERVIEW - 1);
  return [...heldOut, ...lines.filter((chart) => !isHeldOut(chart))].slice(0, CHARTS_IN_OVERVIEW);
}

/** How a run ended, and its headline numbers. `number` is its place among several runs, or null. */
function result(run, number) {
  return [
    el(
      "div",
      { class: "run-head" },
      el("h2", {}, number !== null && runSwatch(number), el("span", {}, inline(run.name))),
      statusBadge(run.status),
    ),
    el("p", { class: "ending" }, prose(run.ending ?? ""), " ", el("span", { class: "folder" }, inline(run.folder))),
    el("div", { class: "tiles" }, run.headline.map(tile)),
  ];
}

/** Alarms, facts and recipe of a run. */
function description(run, open) {
  return [
    run.alarms?.length > 0 && details("Alarms", run.alarms.length, facts(run.alarms), true),
    run.facts.length > 0 && details("Facts", run.facts.length, facts(run.facts), open),
    run.recipe && recipeOf(run.recipe, open),
  ];
}

function statusBadge(status) {
  return el(
    "span",
    { class: `badge status-${status}` },
    el("span", { "aria-hidden": "true" }, STATUS_MARKS[status] ?? "?"),
    ` ${status}`,
  );
}

function tile({ label, value, detail }) {
  return el(
    "div",
    { class: "tile" },
    el("div", { class: "tile-label" }, label),
    el("div", { class: "tile-value" }, inline(value)),
    detail && el("div", { class: "tile-detail" }, prose(detail)),
  );
}

function details(title, n, content, open) {
  return el(
    "details",
    { open },
    el("summary", {}, title, n ? el("span", { class: "count" }, String(n)) : null),
    content,
  );
}

function facts(list) {
  return el(
    "dl",
    { class: "facts" },
    list.map(({ label, value }) =>
      el("div", { class: value.length > LONG_FACT ? "long" : null }, el("dt", {}, label), el("dd", {}, prose(value))),
    ),
  );
}

function recipeOf({ parent, changes, text }, open) {
  const rows = changes.map(({ key, old, new: value }) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, breakable(key)),
      el("td", { class: "old" }, prose(old)),
      el("td", {}, prose(value)),
    ),
  );
  const head = el(
    "tr",
    {},
    ["key", "parent", "this run"].map((name) => el("th", { scope: "col" }, name)),
  );
  const table = el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Changes of the recipe" },
    el("table", { class: "table changes" }, el("thead", {}, head), el("tbody", {}, rows)),
  );
  return [
    details(
      `Recipe, changes to ${parent ?? "its parent"}`,
      changes.length,
      changes.length ? table : el("p", {}, "No changes."),
      open && changes.length <= 20,
    ),
    details("Full recipe", 0, el("pre", { class: "recipe", tabindex: 0 }, prose(text)), false),
  ];
}

/** A dotted key that may break after its dots. */
function breakable(key) {
  return key.split(".").flatMap((part, i) => (i ? [".", el("wbr"), part] : [part]));
}
