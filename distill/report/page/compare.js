"use strict";
// The comparison of several runs: differences of their recipes, final numbers.

function compare(data) {
  const { final, recipe_differences: differences } = data.index;
  const names = data.runs.map((run) => run.name);
  return el(
    "div",
    {},
    el(
      "section",
      {},
      el("h2", {}, "Final numbers"),
      table(
        "Final numbers",
        final.columns,
        final.rows.map(({ label, cells, help }) => [
          [el("span", {}, label), help && el("div", { class: "help" }, help)],
          ...cells.map(inline),
        ]),
      ),
    ),
    el(
      "section",
      {},
      el("h2", {}, "Differences of the recipes"),
      differences.length
        ? table(
            "Differences of the recipes",
            names,
            differences.map(({ key, values }) => [
              el("code", {}, breakable(key)),
              ...values.map((value) => el("code", {}, prose(value))),
            ]),
          )
        : el("p", {}, "The recipes are equal."),
    ),
  );
}

function table(label, columns, rows) {
  const head = el(
    "tr",
    {},
    el("td", {}),
    columns.map((name, i) => el("th", { scope: "col" }, runSwatch(i), el("span", {}, inline(name)))),
  );
  const body = rows.map(([first, ...cells]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, first),
      cells.map((cell) => el("td", {}, cell)),
    ),
  );
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    el("table", { class: "table" }, el("thead", {}, head), el("tbody", {}, body)),
  );
}
