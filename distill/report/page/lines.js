"use strict";
// What a chart draws: lines of one or several runs on a common x axis, in the form that uPlot reads.

/**
 * A line: {label, run, order, color, dash, x, y, low, high, area, points}. `low` and `high` are error bars, or the limits of
 * a band if `area` is set. `order` is the place of the series in the chart, `run` the number of the run.
 */
function linesOf(data, chart, axis, shown) {
  const several = data.runs.length > 1;
  return chart.series.flatMap((series, order) =>
    data.runs.flatMap((run, r) => {
      const table = run.tables[series.table];
      const y = table?.series[series.name];
      if (!shown.has(r) || !y) return [];
      const error = series.error && table.series[series.error];
      const band = series.band?.map((name) => table.series[name]);
      const limits = error ? aroundOf(y, error) : band?.every(Boolean) ? { low: band[0], high: band[1] } : {};
      const pair = measured(chart, series);
      return [
        {
          label: series.label,
          run: r,
          order,
          x: table[axis],
          y,
          ...limits,
          area: !error && "low" in limits,
          color: seriesColor(several ? r : (pair ?? order)),
          dash: dashOf(chart, series, order, several),
          points: series.table === "validation",
          joined: series.table === "validation",
        },
      ];
    }),
  );
}

const FORECAST = /(^|\/)forecast\//;

/** Place of the measured series that belongs to a predicted one, or null. */
function measured(chart, series) {
  if (!FORECAST.test(series.name)) return null;
  const place = chart.series.findIndex((each) => each.name === series.name.replace(FORECAST, "$1"));
  return place < 0 ? null : place;
}

/** In a chart with predictions, these are dashed and measured values are not. */
function dashOf(chart, series, order, several) {
  const hasForecast = chart.series.some((each) => FORECAST.test(each.name));
  if (!hasForecast || several) return cycle(DASHES, order);
  return FORECAST.test(series.name) ? DASHES[2] : DASHES[0];
}

function aroundOf(y, error) {
  const shift = (sign) => y.map((value, i) => (value === null || error[i] == null ? null : value + sign * error[i]));
  return { low: shift(-1), high: shift(1) };
}

/** Lines of KL by position: some steps of one run, the first and the last of several runs. */
function positionLines(data, kind, shown) {
  const several = data.runs.length > 1;
  return data.runs.flatMap((run, r) => {
    if (!run.positions || !shown.has(r)) return [];
    const usable = run.positions.curves.filter((curve) => curve[kind].some((value) => value !== null));
    return spaced(usable, several ? 2 : 4).map((curve, order) => ({
      label: several ? ["first validation", "last validation"][order] : `step ${curve.step}`,
      run: r,
      order,
      x: curve[kind].map((_, i) => i),
      y: curve[kind],
      area: false,
      color: seriesColor(several ? r : order),
      dash: cycle(DASHES, several ? 1 - order : order),
      points: true,
    }));
  });
}

/** At most n elements with equal distances, with the first and the last. */
function spaced(list, n) {
  if (list.length <= n) return list;
  return Array.from({ length: n }, (_, i) => list[Math.round((i * (list.length - 1)) / (n - 1))]);
}

/** The longest list of bins' edges: runs with shorter responses have fewer of the same bins. */
function binEdges(data) {
  const lists = data.runs.flatMap((run) => (run.positions ? [run.positions.edges] : []));
  return lists.reduce((longest, edges) => (edges.length > longest.length ? edges : longest), []);
}

/** Name of a bin of positions: "0", "4–7", "64+". */
function binName(edges, i) {
  if (edges[i + 1] === undefined) return `${edges[i]}+`;
  return edges[i + 1] - edges[i] === 1 ? `${edges[i]}` : `${edges[i]}–${edges[i + 1] - 1}`;
}

/** Smallest and largest x of all runs, so that all charts have the same range; null without any. */
function extent(data, axis, shown) {
  const xs = data.runs.flatMap((run, r) =>
    shown.has(r) ? Object.values(run.tables).flatMap((table) => table[axis]) : [],
  );
  const known = xs.filter((x) => x !== null);
  const [low, high] = known.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  return low < high ? [low, high] : null;
}

/** Lines of one run, each on top of the sum of the lines before it. */
function stacked(lines) {
  let below = [];
  return lines.map((line) => {
    const low = line.y.map((_, i) => below[i] ?? 0);
    below = line.y.map((value, i) => low[i] + (value ?? 0));
    return { ...line, y: below, low, high: below, shown: line.y, area: true, stack: true, points: false };
  });
}

/** uPlot's columns: x, then y, low and high of each line. `undefined`: another line's x; `null`: a missing value. */
function columnsOf(lines, log) {
  const xs = [...new Set(lines.flatMap((line) => line.x.filter((x) => x !== null)))].sort((a, b) => a - b);
  const row = new Map(xs.map((x, i) => [x, i]));
  const column = (x, y) => {
    const values = new Array(xs.length).fill(undefined);
    x.forEach((at, i) => at !== null && (values[row.get(at)] = log && y[i] <= 0 ? null : y[i]));
    return values;
  };
  return [
    xs,
    ...lines.flatMap((line) =>
      [line.y, line.low ?? [], line.high ?? []].map((y) =>
        y.length ? column(line.x, y) : new Array(xs.length).fill(undefined),
      ),
    ),
  ];
}

/** Number of the row nearest to `row` that has a value. */
function nearest(column, row) {
  for (let step = 0; step < column.length; step++) {
    for (const i of [row - step, row + step]) if (column[i] !== null && column[i] !== undefined) return i;
  }
  return null;
}
