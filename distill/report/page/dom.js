"use strict";
// Elements, text and numbers. Text of models, prompts and recipes only becomes text nodes and attribute values here.

/** Create an element. Properties: on* are listeners, true/false set or omit an attribute; children are nodes or texts. */
function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
}

/** A line as in a chart: its dashes distinguish series where colours do not. */
function swatch(color, dash) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const line = document.createElementNS(space, "line");
  for (const [name, value] of Object.entries({ width: 26, height: 10, "aria-hidden": "true", class: "swatch" })) {
    svg.setAttribute(name, value);
  }
  const attributes = { x1: 0, x2: 26, y1: 5, y2: 5, stroke: color, "stroke-width": 2.5 };
  if (dash.length) attributes["stroke-dasharray"] = dash.join(" ");
  for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
  svg.append(line);
  return svg;
}

/** Four significant digits; a fraction as per cent; a dash for a missing value. */
function number(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "fraction") return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6))
    return value
      .toExponential(2)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return trim(value.toPrecision(4));
}

function trim(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

function probability(value) {
  if (value > 0 && value < 0.0005) return "<0.1%";
  return `${(100 * value).toFixed(1)}%`;
}

/** Lower case of the same length: a letter whose lower case has more characters stays, so that positions are kept. */
function fold(text) {
  const lower = text.toLowerCase();
  if (lower.length === text.length) return lower;
  return Array.from(text, (letter) =>
    letter.toLowerCase().length === letter.length ? letter.toLowerCase() : letter,
  ).join("");
}

function count(n, singular, plural) {
  return `${n.toLocaleString("en")} ${n === 1 ? singular : (plural ?? `${singular}s`)}`;
}

// Control characters and direction marks. Line feed, tab and blank have their own marks.
const INVISIBLE =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;
const SPECIAL = new RegExp(`${INVISIBLE.source}|[\\n\\t]`, "g");

/** Nodes for a text in which line feeds, tabs and characters without a glyph are visible. */
function visible(text) {
  if (text === "") return [mark("▯", "mark")]; // a token with a part of a multi-byte character
  if (text.trim() === "" && !text.includes("\n")) return [mark(text.replace(/\t/g, "→").replace(/[^→]/g, "·"), "mark")];
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SPECIAL)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    if (match[0] === "\n") nodes.push(mark("↵", "mark"), "\n");
    else if (match[0] === "\t") nodes.push(mark("→", "mark"), "\t");
    else nodes.push(mark(`U+${match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`, "code"));
    from = match.index + 1;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

/** The same for a text of several lines: line feeds are only line breaks. */
function prose(text) {
  return text.split("\n").flatMap((line, i) => [...(i ? ["\n"] : []), ...(line ? visible(line) : [])]);
}

/** One line: blanks at both ends are visible, as in lists of tokens. */
function inline(text) {
  if (text === "" || text.trim() === "") return visible(text).filter((node) => node !== "\n");
  const [, before, middle, after] = /^( *)([^]*?)( *)$/.exec(text);
  const blanks = (run) => (run ? [mark("·".repeat(run.length), "mark")] : []);
  return [...blanks(before), ...visible(middle).filter((node) => node !== "\n"), ...blanks(after)];
}

function mark(text, kind) {
  return el("span", { class: kind }, text);
}

/** A group of buttons of which one is pressed. */
function choice(label, options, value, change) {
  const buttons = options.map(([key, text]) =>
    el(
      "button",
      { type: "button", "data-key": key, "aria-pressed": String(key === value), onclick: () => select(key) },
      text,
    ),
  );
  function select(key) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.key === key));
    change(key);
  }
  return el(
    "div",
    { class: "choice", role: "group", "aria-label": label },
    el("span", { class: "label" }, label),
    buttons,
  );
}

function field(label, control) {
  return el("label", { class: "field" }, el("span", { class: "label" }, label), control);
}

function debounce(milliseconds, action) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}
