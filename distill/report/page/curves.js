"use strict";
// The curves: a grid of charts by group with a common x axis, a common cursor and a common zoom.

const GROUPS = [
  ["Quality", ["quality"]],
  ["Responses", ["responses"]],
  ["Optimization", ["optimization"]],
  ["Time and memory", ["time", "memory"]],
];
const AXES = [
  ["step", "Step"],
  ["tokens", "Tokens"],
  ["hours", "Hours"],
];

/** One chart: head, legend with values, plot. A stacked chart of several runs has one plot for each run. */
class Chart {
  constructor(view, chart, run = null) {
    Object.assign(this, { view, chart, run, log: chart.log, kind: "forward", plot: null, lines: [] });
    const name = run === null ? chart.title : `${chart.title}: ${view.data.runs[run].name}`;
    this.legend = el("div", { class: "legend" });
    this.host = el("div", { class: "plot", tabindex: 0, role: "img", onkeydown: (event) => this.key(event) });
    this.tools = el("div", { class: "tools" });
    this.root = el(
      "figure",
      { class: "chart", id: `chart-${chart.id}${run === null ? "" : `-${run}`}` },
      el(
        "figcaption",
        {},
        el("h3", { title: chart.help }, inline(name)),
        el("span", { class: "unit" }, chart.unit === "fraction" ? "" : chart.unit),
        this.tools,
      ),
      el("p", { class: "help" }, chart.help),
      this.legend,
      this.host,
    );
    this.name = name;
    this.addTools();
  }

  addTools() {
    const press = (label, title, pressed, action) => {
      const button = el(
        "button",
        {
          type: "button",
          title,
          "aria-pressed": String(pressed),
          onclick: () => {
            button.setAttribute("aria-pressed", String(action()));
            this.draw();
          },
        },
        label,
      );
      return button;
    };
    const { kind } = this.chart;
    const tools = [];
    if (kind === "positions")
      tools.push(
        press("reverse", "Show KL(student || teacher)", false, () => {
          this.kind = this.kind === "forward" ? "reverse" : "forward";
          return this.kind === "reverse";
        }),
      );
    if (kind !== "stacked") tools.push(press("log", "Logarithmic scale", this.log, () => (this.log = !this.log)));
    tools.push(press("wide", "Use the full width", false, () => this.root.classList.toggle("wide")));
    this.tools.replaceChildren(...tools);
  }

  read() {
    const { data, axis, shown } = this.view;
    if (this.chart.kind === "positions") return positionLines(data, this.kind, shown);
    if (this.chart.kind !== "stacked") return linesOf(data, this.chart, axis, shown);
    const lines = linesOf(data, this.chart, axis, new Set([this.run ?? 0]));
    return stacked(lines.map((line) => ({ ...line, color: seriesColor(line.order) })));
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    this.root.hidden = this.run !== null && !this.view.shown.has(this.run);
    this.lines = this.read();
    this.drawLegend();
    if (!this.host.clientWidth || !this.lines.some((line) => line.x.some((x) => x !== null))) {
      this.host.replaceChildren(el("p", { class: "empty" }, this.emptyReason()));
      return;
    }
    this.host.replaceChildren();
    const positions = this.chart.kind === "positions";
    this.labels = positions ? binEdges(this.view.data) : null;
    this.plot = drawPlot(this.host, this.lines, {
      log: this.log,
      unit: this.chart.unit,
      labels: this.labels,
      isWhole: this.view.axis !== "hours",
      sync: positions ? null : "x",
      range: positions ? null : (this.view.range ?? extent(this.view.data, this.view.axis, this.view.shown)),
      moved: (row) => this.showValues(row),
      zoomed: (range) => (positions ? this.zoom(range) : this.view.zoom(range)),
    });
    this.showValues(null);
    this.host.setAttribute("aria-label", `${this.name}. ${this.summary()} Arrow keys move the cursor.`);
  }

  emptyReason() {
    if (!this.lines.length) return "No values.";
    return `No values by ${this.view.axis}: choose another x axis.`;
  }

  /** Show a range of x; null: all. */
  zoom(range) {
    if (!this.plot) return;
    const xs = this.plot.data[0];
    const all = this.labels ? null : extent(this.view.data, this.view.axis, this.view.shown);
    const [min, max] = range ?? all ?? [xs[0], xs.at(-1)];
    this.plot.setScale("x", { min, max });
  }

  key(event) {
    if (!this.plot) return;
    const xs = this.plot.data[0];
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length };
    if (event.key === "Escape") this.view.zoom(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const row = Math.min(xs.length - 1, Math.max(0, (this.plot.cursor.idx ?? 0) + moves[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(xs[row], "x"), top: 10 });
  }

  /** Show the values at a row of the plot, or the last values. */
  showValues(row) {
    if (!this.plot) return;
    const at = row ?? this.plot.data[0].length - 1;
    const x = this.plot.data[0][at];
    this.lines.forEach((line, i) => {
      const column = line.stack ? null : this.plot.data[3 * i + 1];
      const found = column ? nearest(column, at) : line.x.indexOf(x);
      const value = column ? column[found] : line.shown[found];
      this.cells[i].textContent =
        found === null || found < 0 ? "–" : number(value, this.chart.unit) + this.limits(line, i, found);
    });
    this.place.textContent = this.placeName(row, x);
  }

  /** Name of an x value. The last values of several runs may be at different x. */
  placeName(row, x) {
    const name = this.labels ? `token ${binName(this.labels, x)}` : `${this.view.axis} ${number(x)}`;
    if (row !== null) return name;
    return this.view.data.runs.length > 1 && this.run === null && !this.labels
      ? `last, by ${this.view.axis}`
      : `last, ${name}`;
  }

  limits(line, i, row) {
    if (!line.low || line.stack) return "";
    const [value, low, high] = [1, 2, 3].map((k) => this.plot.data[3 * i + k][row]);
    if (low == null || high == null) return "";
    const unit = this.chart.unit;
    return line.area ? ` (${number(low, unit)}–${number(high, unit)})` : ` ± ${number(high - value, unit)}`;
  }

  summary() {
    return this.lines.map((line, i) => `${line.label}: ${this.cells[i].textContent}`).join(", ") + ".";
  }

  /** Series by rows; with several runs, runs by columns. */
  drawLegend() {
    this.place = el("span", { class: "place" });
    this.cells = this.lines.map(() => el("span", { class: "value" }));
    const runs = this.run === null ? [...new Set(this.lines.map((line) => line.run))] : [];
    if (this.view.data.runs.length === 1 || runs.length === 0) {
      const items = this.lines.map((line, i) =>
        el(
          "span",
          { class: "item" },
          line.stack ? box(line.color) : swatch(line.color, line.dash),
          inline(line.label),
          this.cells[i],
        ),
      );
      this.legend.replaceChildren(el("div", { class: "items" }, items), this.place);
      return;
    }
    const orders = [...new Set(this.lines.map((line) => line.order))];
    const cell = (order, run) => {
      const i = this.lines.findIndex((line) => line.order === order && line.run === run);
      return el("td", {}, i < 0 ? "–" : this.cells[i]);
    };
    const rows = orders.map((order) => {
      const line = this.lines.find((each) => each.order === order);
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, swatch(color("--ink"), line.dash), inline(line.label)),
        runs.map((run) => cell(order, run)),
      );
    });
    const name = (run) => this.view.data.runs[run].name;
    const head = el(
      "tr",
      {},
      el("td", {}, this.place),
      runs.map((run) => el("th", { scope: "col", title: name(run) }, runSwatch(run), " ", inline(name(run)))),
    );
    this.legend.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
  }
}

function box(fill) {
  const node = el("span", { class: "box", "aria-hidden": "true" });
  node.style.background = fill;
  return node;
}

/** All charts. They are drawn when they are scrolled to. */
class Curves {
  constructor(data, charts = data.index.charts) {
    Object.assign(this, { data, axis: "step", range: null, shown: new Set(data.runs.keys()) });
    this.charts = charts.flatMap((chart) =>
      chart.kind === "stacked" && data.runs.length > 1
        ? [...data.runs.keys()].map((run) => new Chart(this, chart, run))
        : [new Chart(this, chart)],
    );
    this.waiting = new Map(this.charts.map((chart) => [chart.root, chart]));
    this.seen = new IntersectionObserver((entries) => this.reach(entries), { rootMargin: "300px" });
    this.resized = new ResizeObserver((entries) => this.resize(entries));
  }

  /** A section for each group, without controls if `plain`. */
  build(plain = false) {
    for (const chart of this.charts) {
      this.seen.observe(chart.root);
      this.resized.observe(chart.host);
    }
    if (plain)
      return el(
        "div",
        { class: "grid" },
        this.charts.map((chart) => chart.root),
      );
    const sections = GROUPS.map(([title, groups]) => {
      const charts = this.charts.filter((chart) => groups.includes(chart.chart.group));
      return (
        charts.length > 0 &&
        el(
          "section",
          { class: "group" },
          el("h2", {}, title),
          el(
            "div",
            { class: "grid" },
            charts.map((chart) => chart.root),
          ),
        )
      );
    });
    return el("div", {}, this.controls(), sections, this.anyMetric());
  }

  /** A section where a chart of any recorded metric can be added. */
  anyMetric() {
    const names = (table) =>
      [...new Set(this.data.runs.flatMap((run) => Object.keys(run.tables[table]?.series ?? {})))].sort();
    const groups = ["train", "validation"].map((table) =>
      el(
        "optgroup",
        { label: table === "train" ? "training" : table },
        names(table).map((name) => el("option", { value: JSON.stringify([table, name]) }, name)),
      ),
    );
    const grid = el("div", { class: "grid" });
    const select = el(
      "select",
      {
        name: "metric",
        onchange: () => {
          if (select.value) grid.prepend(this.add(...JSON.parse(select.value)));
        },
      },
      el("option", { value: "" }, "choose a metric"),
      groups,
    );
    return el(
      "section",
      { class: "group" },
      el("h2", {}, "Any metric"),
      el("div", { class: "toolbar" }, field("Add a chart", select)),
      grid,
    );
  }

  add(table, name) {
    const series = [{ table, name, label: name, error: null, band: null }];
    const chart = new Chart(this, {
      id: `metric-${table}-${name}`,
      title: name,
      unit: "",
      help: "",
      group: "any",
      kind: "lines",
      log: false,
      series,
    });
    this.charts.push(chart);
    this.waiting.set(chart.root, chart);
    this.seen.observe(chart.root);
    this.resized.observe(chart.host);
    return chart.root;
  }

  controls() {
    this.reset = el("button", { type: "button", hidden: true, onclick: () => this.zoom(null) }, "Reset zoom");
    const runs =
      this.data.runs.length > 1 &&
      el(
        "div",
        { class: "runs", role: "group", "aria-label": "Runs" },
        this.data.runs.map((run, r) =>
          el(
            "label",
            { class: "chip" },
            el("input", { type: "checkbox", checked: true, onchange: (event) => this.show(r, event.target.checked) }),
            runSwatch(r),
            el("span", {}, inline(run.name)),
          ),
        ),
      );
    return el(
      "div",
      { class: "toolbar" },
      choice("x axis", AXES, this.axis, (axis) => this.setAxis(axis)),
      runs,
      this.reset,
      el("span", { class: "hint" }, "Drag to zoom, double click to reset."),
    );
  }

  reach(entries) {
    for (const { target, isIntersecting } of entries) {
      const chart = this.waiting.get(target);
      if (!isIntersecting || !chart) continue;
      this.waiting.delete(target);
      this.seen.unobserve(target);
      chart.draw();
    }
  }

  resize(entries) {
    for (const { target, contentRect } of entries) {
      const chart = this.charts.find((each) => each.host === target);
      if (chart.plot && contentRect.width && Math.abs(contentRect.width - chart.plot.width) > 1) {
        chart.plot.setSize({ width: contentRect.width, height: PLOT_HEIGHT });
      }
    }
  }

  redraw() {
    for (const chart of this.charts) if (!this.waiting.has(chart.root)) chart.draw();
  }

  show(run, isShown) {
    if (isShown) this.shown.add(run);
    else this.shown.delete(run);
    this.redraw();
  }

  setAxis(axis) {
    this.axis = axis;
    this.zoom(null);
    this.redraw();
  }

  zoom(range) {
    this.range = range;
    if (this.reset) this.reset.hidden = range === null;
    for (const chart of this.charts) if (chart.chart.kind !== "positions") chart.zoom(range);
  }
}

/** The colour of a run as an element that follows the theme. */
function runSwatch(run) {
  return el("span", { class: `box run-${run % SERIES_COLORS.length}`, "aria-hidden": "true" });
}
