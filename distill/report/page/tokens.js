"use strict";
// A response token by token: colour by KL, focus by arrow keys, an overview strip of a long response.

/** Limits of the colour levels, nats per token. They are fixed, so that colours mean the same in all runs and pages. */
const LEVELS = [0.01, 0.03, 0.1, 0.3, 1, 3];
const PIECE = 240;

function level(kl) {
  if (kl === null || kl === undefined) return null;
  let i = 0;
  while (i < LEVELS.length && kl >= LEVELS[i]) i++;
  return i;
}

/** The scale of colours with its limits. */
function scale() {
  const names = LEVELS.map((limit, i) => (i ? `${LEVELS[i - 1]}–${limit}` : `< ${limit}`)).concat(`≥ ${LEVELS.at(-1)}`);
  return el(
    "div",
    { class: "scale", role: "img", "aria-label": `Colours: ${names.join(", ")} nats per token` },
    el("span", { class: "label" }, "nats per token"),
    names.map((name, i) => el("span", { class: `k${i}` }, name)),
  );
}

/**
 * The tokens of one response. Tokens are drawn in pieces when they are scrolled to.
 * `sample`: {texts, forward, reverse, top}; `kind`: forward or reverse; `query`: text to mark, lower case.
 */
class Tokens {
  constructor(sample, kind, query, label) {
    Object.assign(this, { sample, kind, drawn: 0, active: 0 });
    this.top = new Map((sample.top ?? []).map((entry) => [entry.at, entry]));
    this.hits = hits(sample.texts, query);
    this.text = el("div", {
      class: "tokens",
      role: "group",
      "aria-label": `${label}. Arrow keys move between tokens, N and P between tokens with top tokens.`,
      dir: "auto",
    });
    this.body = el("div", { class: "tokens-scroll", onscroll: () => this.fill() }, this.text);
    this.strip =
      sample[kind] && sample.texts.length > 60
        ? el("canvas", {
            class: "strip",
            title: "Highest KL along the response. Click to go there.",
            onclick: (event) => this.jump(event),
          })
        : null;
    this.root = el("div", { class: "response-body" }, this.strip, this.body);
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.text.addEventListener("focusin", (event) => this.focused(event));
    this.text.addEventListener("focusout", () => tooltip.hide());
    this.text.addEventListener("pointerover", (event) => this.pointed(event));
    this.text.addEventListener("pointerleave", () => tooltip.hide());
    this.draw(PIECE);
  }

  get length() {
    return this.sample.texts.length;
  }

  /** Draw tokens until `end`. */
  draw(end) {
    const stop = Math.min(end, this.length);
    const piece = document.createDocumentFragment();
    for (let i = this.drawn; i < stop; i++) piece.append(this.token(i));
    this.drawn = Math.max(this.drawn, stop);
    this.text.append(piece);
  }

  token(i) {
    const node = document.createElement("span");
    const text = this.sample.texts[i];
    node.className = this.classes(i);
    node.dataset.i = i;
    node.tabIndex = i === this.active ? 0 : -1;
    if (/^ ?[\w.,;:!?'"()$=+*/<>|-]+$/.test(text)) node.textContent = text;
    else append(node, visible(text));
    return node;
  }

  classes(i) {
    const k = level(this.sample[this.kind]?.[i]);
    return `t${k === null ? "" : ` k${k}`}${this.top.has(i) ? " top" : ""}${this.hits.has(i) ? " hit" : ""}`;
  }

  /** Draw more tokens when the end of the drawn ones is near. */
  fill() {
    const { body } = this;
    const isNearEnd = () => body.clientHeight > 0 && body.scrollTop + body.clientHeight > body.scrollHeight - 300;
    while (this.drawn < this.length && isNearEnd()) this.draw(this.drawn + PIECE);
  }

  /** To be called when the element is in the page and has its size. */
  attached() {
    this.fill();
    this.paintStrip();
  }

  expand() {
    this.root.classList.add("expanded");
    this.draw(this.length);
  }

  paint(kind) {
    this.kind = kind;
    for (const node of this.text.children) node.className = this.classes(Number(node.dataset.i));
    this.paintStrip();
  }

  paintStrip() {
    const { strip } = this;
    const values = this.sample[this.kind];
    if (!strip || !strip.clientWidth || !values) return;
    const width = (strip.width = Math.min(strip.clientWidth, values.length));
    strip.height = 1;
    const context = strip.getContext("2d");
    const colors = [...LEVELS.keys(), LEVELS.length].map((i) => color(`--k${i}`));
    for (let x = 0; x < width; x++) {
      const [from, to] = [x, x + 1].map((end) => Math.floor((end * values.length) / width));
      context.fillStyle = colors[level(Math.max(...values.slice(from, to)))];
      context.fillRect(x, 0, 1, 1);
    }
  }

  jump(event) {
    const box = this.strip.getBoundingClientRect();
    this.focus(Math.floor(((event.clientX - box.left) / box.width) * this.length));
  }

  focus(i) {
    const next = Math.min(this.length - 1, Math.max(0, i));
    this.draw(next + 50);
    this.text.children[this.active].tabIndex = -1;
    this.active = next;
    const node = this.text.children[next];
    node.tabIndex = 0;
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  focused(event) {
    const node = event.target.closest(".t");
    if (!node) return;
    this.text.children[this.active].tabIndex = -1;
    this.active = Number(node.dataset.i);
    node.tabIndex = 0;
    tooltip.show(node, this);
  }

  pointed(event) {
    const node = event.target.closest(".t");
    if (node) tooltip.show(node, this);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = this.target(event.key);
    if (event.key === "Escape") tooltip.hide();
    if (to === null) return;
    event.preventDefault();
    this.focus(to);
  }

  /** Number of the token that a key leads to. */
  target(key) {
    const at = this.active;
    const marked = [...this.top.keys()];
    switch (key.length === 1 ? key.toLowerCase() : key) {
      case "ArrowRight":
        return at + 1;
      case "ArrowLeft":
        return at - 1;
      case "ArrowDown":
        return this.vertical(1);
      case "ArrowUp":
        return this.vertical(-1);
      case "Home":
        return 0;
      case "End":
        return this.length - 1;
      case "n":
        return marked.find((i) => i > at) ?? null;
      case "p":
        return marked.findLast((i) => i < at) ?? null;
      default:
        return null;
    }
  }

  /** The token of the next or previous line that is nearest to the left edge of the active one. */
  vertical(direction) {
    const nodes = this.text.children;
    const start = largestBox(nodes[this.active]);
    let best = null,
      line = null;
    for (let i = this.active + direction; i >= 0 && i < this.length; i += direction) {
      if (i >= this.drawn) this.draw(this.drawn + PIECE);
      const box = largestBox(nodes[i]);
      if (Math.abs(box.top - start.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      const distance = Math.abs(box.left - start.left);
      if (best === null || distance < best.distance) best = { i, distance };
    }
    return best?.i ?? null;
  }
}

/** The widest box of a token that continues on the next line: its leading blank may be alone on the line before. */
function largestBox(node) {
  const boxes = [...node.getClientRects()];
  return boxes.reduce(
    (widest, box) => (box.width > widest.width ? box : widest),
    boxes[0] ?? node.getBoundingClientRect(),
  );
}

/** Numbers of the tokens that overlap a place of `query` in the joined texts. */
function hits(texts, query) {
  const found = new Set();
  if (!query) return found;
  const joined = fold(texts.join(""));
  let start = joined.indexOf(query);
  for (let i = 0, at = 0; i < texts.length && start >= 0; i++) {
    const end = at + texts[i].length;
    while (start >= 0 && start + query.length <= at) start = joined.indexOf(query, start + 1);
    if (start >= 0 && start < end && at < start + query.length) found.add(i);
    at = end;
  }
  return found;
}
