"use strict";
// One plot of uPlot with error bars, bands and stacked areas.

const PLOT_HEIGHT = 210;
const FONT = "11px system-ui, sans-serif";

/**
 * Draw lines into `host`. `options`: {log, unit, labels (numbers at the x values 0, 1, ...), sync (key of the common cursor), range
 * ([min, max] of x or null), isWhole (x has only whole numbers), moved(row), zoomed([min, max])}.
 */
function drawPlot(host, lines, options) {
  const columns = columnsOf(lines, options.log);
  const settings = {
    width: Math.max(120, host.clientWidth),
    height: PLOT_HEIGHT,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    scales: {
      x: { time: false, ...(options.labels && { range: (_, low, high) => [low - 0.3, high + 0.3] }) },
      y: { distr: options.log ? 3 : 1, ...(options.unit === "fraction" && !options.log && { range: fractions }) },
    },
    axes: [xAxis(options), yAxis(options)],
    series: [{}, ...lines.flatMap((line) => seriesOf(line, columns[0].length))],
    bands: lines.flatMap((line, i) => (line.area ? [bandOf(line, 3 * i)] : [])),
    cursor: cursorOf(options),
    hooks: {
      draw: [(plot) => drawErrors(plot, lines)],
      setCursor: [(plot) => options.moved(plot.cursor.idx)],
      setSelect: [(plot) => select(plot, options)],
    },
  };
  const plot = new uPlot(settings, columns, host);
  if (options.range) plot.setScale("x", { min: options.range[0], max: options.range[1] });
  return plot;
}

/** Range of an axis of fractions: 0 to 1 if all values are equal, where uPlot's range has no limit of 1. */
function fractions(_, low, high) {
  return low === high ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
}

/** Distances of ticks on an axis of steps or tokens: whole numbers. */
const WHOLE = Array.from({ length: 13 }, (_, i) => [1, 2, 5].map((digit) => digit * 10 ** i)).flat();

function xAxis({ labels, isWhole }) {
  const common = {
    ...axis(),
    size: 28,
    space: 55,
    values: (_, ticks) => ticks.map(short),
    ...(isWhole && { incrs: WHOLE }),
  };
  if (!labels) return common;
  const every = labels.length > 10 ? 2 : 1;
  const ticks = [...labels.keys()].filter((i) => i % every === 0);
  return { ...common, splits: () => ticks, values: () => ticks.map((i) => short(labels[i])) };
}

function yAxis(options) {
  const values = (_, ticks) =>
    ticks.map((tick) => (tick === null ? "" : options.unit === "fraction" ? number(tick, "fraction") : short(tick)));
  return { ...axis(), size: 52, space: 34, values };
}

function axis() {
  const line = { stroke: color("--grid"), width: 1 };
  return { stroke: color("--muted"), font: FONT, grid: line, ticks: { ...line, size: 4 }, gap: 4 };
}

/** A short number on an axis. */
function short(value) {
  const size = Math.abs(value);
  for (const [limit, letter] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ]) {
    const unit = letter === "k" ? 1e3 : limit;
    if (size >= limit) return `${trim((value / unit).toPrecision(3))}${letter}`;
  }
  return size !== 0 && size < 1e-3
    ? value.toExponential().replace(/(\.\d\d)\d*e/, "$1e")
    : String(Number(value.toPrecision(6)));
}

function seriesOf(line, rows) {
  const points = { show: line.points ? rows < 200 : rows <= 20, size: 5, fill: line.color, stroke: line.color };
  const spanGaps = Boolean(line.joined);
  const limit = { stroke: "transparent", points: { show: false }, limit: true, spanGaps };
  return [
    { spanGaps, stroke: line.color, width: line.stack ? 1 : 1.75, dash: line.stack ? [] : line.dash, points },
    limit,
    limit,
  ];
}

function bandOf(line, first) {
  return { series: [first + 3, first + 2], fill: translucent(line.color, line.stack ? 0.55 : 0.15) };
}

function cursorOf(options) {
  const only = (type) => type === "mousemove" || type === "mouseleave";
  return {
    y: false,
    points: { size: (plot, i) => (plot.series[i].limit ? 0 : 7) },
    dataIdx: (plot, i, row) => (i === 0 || plot.series[i].limit ? row : (nearest(plot.data[i], row) ?? row)),
    drag: { x: true, y: false, setScale: false },
    sync: options.sync ? { key: options.sync, scales: ["x", null], filters: { pub: only, sub: only } } : undefined,
    bind: { dblclick: () => () => options.zoomed(null) },
  };
}

function select(plot, options) {
  const { left, width } = plot.select;
  if (width < 5) return;
  const ends = [left, left + width].map((position) => plot.posToVal(position, "x"));
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  options.zoomed(ends);
}

function drawErrors(plot, lines) {
  const { ctx } = plot;
  ctx.save();
  ctx.beginPath();
  ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  ctx.clip();
  lines.forEach((line, i) => line.low && !line.area && drawBars(plot, ctx, line.color, 3 * i + 1));
  ctx.restore();
}

function drawBars(plot, ctx, stroke, first) {
  const cap = 3 * devicePixelRatio;
  ctx.strokeStyle = stroke;
  ctx.lineWidth = 1.25 * devicePixelRatio;
  ctx.beginPath();
  plot.data[0].forEach((x, row) => {
    const [low, high] = [plot.data[first + 1][row], plot.data[first + 2][row]];
    if (low == null || high == null) return;
    const at = plot.valToPos(x, "x", true);
    const ends = [low, high].map((value) => plot.valToPos(value, "y", true));
    for (const end of ends) {
      ctx.moveTo(at - cap, end);
      ctx.lineTo(at + cap, end);
    }
    ctx.moveTo(at, ends[0]);
    ctx.lineTo(at, ends[1]);
  });
  ctx.stroke();
}
