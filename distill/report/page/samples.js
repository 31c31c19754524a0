"use strict";
// The list of prompts with the responses of several steps and runs side by side. A prompt is drawn when it is scrolled to.

const VERDICT_MARKS = { right: "✓", wrong: "✗", failed: "!", "not graded": "–" };
const RESPONSES_AT_FIRST = 2;

class Samples {
  constructor(data) {
    this.data = data;
    this.cards = new Map();
    this.list = el("div", { class: "cards", id: "cards" });
    this.filters = new Filters(data, () => this.update());
    this.seen = new IntersectionObserver((entries) => this.reach(entries), { rootMargin: "700px" });
    this.kind = this.filters.kind;
    this.selection = "";
  }

  build() {
    if (!this.data.samples.set.length) return el("p", { class: "empty" }, "This page has no samples.");
    const root = el("div", {}, el("h2", { class: "sr" }, "Responses to prompts"), this.filters.build(), this.list);
    this.update();
    return root;
  }

  /** Apply the filter. A change of colours alone does not draw the list again. */
  update() {
    const groups = this.filters.select();
    const selection = JSON.stringify([this.filters.query, groups.map((group) => [group.prompt, group.samples])]);
    if (selection !== this.selection) this.redrawList(groups);
    else if (this.kind !== this.filters.kind) this.paint();
    this.selection = selection;
    this.kind = this.filters.kind;
  }

  redrawList(groups) {
    this.seen.disconnect();
    tooltip.hide();
    this.cards.clear();
    this.estimated = false;
    const nodes = groups.map((group) => {
      const node = el("article", {
        class: "card",
        "data-prompt": group.prompt,
        "aria-label": this.data.index.prompts[group.prompt].title,
      });
      this.cards.set(node, { group, views: [], filled: false });
      return node;
    });
    this.list.replaceChildren(
      ...(nodes.length ? nodes : [el("p", { class: "empty" }, "No response fulfils these conditions.")]),
    );
    for (const node of nodes) this.seen.observe(node);
  }

  paint() {
    for (const { views } of this.cards.values()) for (const view of views) view.paint(this.filters.kind);
  }

  redraw() {
    for (const { views } of this.cards.values()) for (const view of views) view.paintStrip();
  }

  reach(entries) {
    for (const { target, isIntersecting } of entries) {
      const card = this.cards.get(target);
      if (!card) continue;
      if (isIntersecting && !card.filled) this.fill(target, card);
      else if (!isIntersecting && card.filled && !target.contains(document.activeElement)) empty(target, card);
    }
  }

  async fill(node, card) {
    card.filled = true;
    const samples = await Promise.all(card.group.samples.map((i) => this.data.sample(i)));
    if (!card.filled || !node.isConnected) return;
    card.views = [];
    card.read = this.commonTexts(card.group.samples, samples);
    const columns = this.columns(card, samples);
    node.classList.add("filled");
    node.replaceChildren(this.head(card.group, samples, card.read), el("div", { class: "columns" }, columns));
    node.style.minHeight = "";
    for (const view of card.views) view.attached();
    this.estimate(node.offsetHeight);
  }

  /** Cards that are not drawn have the height of the first one that was drawn, so that the scroll bar moves little. */
  estimate(height) {
    if (this.estimated) return;
    this.estimated = true;
    this.list.style.setProperty("--card-height", `${height}px`);
  }

  head({ prompt, samples: members }, contents, read) {
    const { samples, index } = this.data;
    const [first] = contents;
    const { teacher, inContext } = read;
    const body = el(
      "div",
      { class: "prompt-texts", hidden: true },
      labelled("The student read", first.prompt, null),
      teacher && labelled("The teacher read", teacher, first.prompt),
      inContext &&
        inContext !== teacher &&
        labelled("With the context in view, the student read", inContext, first.prompt),
    );
    const note =
      teacher === undefined
        ? "The teacher did not read the same text for all responses: see each response."
        : teacher && "The teacher read other text than the student.";
    return el(
      "div",
      { class: "card-head" },
      el(
        "div",
        { class: "card-title" },
        el("h3", {}, prose(index.prompts[prompt].title.replace(/\s+/g, " "))),
        toggle("Prompt", body),
      ),
      el(
        "div",
        { class: "meta" },
        el("span", {}, "Source ", el("b", {}, inline(index.sources[samples.source[members[0]]] ?? ""))),
        first.gold !== null &&
          first.gold !== undefined &&
          el("span", {}, "Gold answer ", el("b", {}, inline(String(first.gold)))),
        note && el("span", { class: "context" }, note),
      ),
      body,
    );
  }

  /**
   * The text that the teacher read before the responses, and the prompt with the context: null if it is the student's
   * prompt, undefined if it differs between responses. Responses that were not compared have no teacher.
   */
  commonTexts(members, contents) {
    const common = (list) =>
      new Set(list.map(({ text }) => text)).size > 1 ? undefined : (list[0]?.text ?? null);
    const texts = members.map((i, k) => ({
      text: contents[k].teacher_prompt ?? null,
      inContext: this.isInContext(i),
      compared: this.isCompared(i) || Boolean(contents[k].teacher_prompt),
    }));
    return {
      teacher: common(texts.filter((each) => !each.inContext && each.compared)),
      inContext: common(texts.filter((each) => each.inContext)),
    };
  }

  isCompared(i) {
    const { forward, reverse } = this.data.samples;
    return forward[i] !== null || reverse[i] !== null;
  }

  isInContext(i) {
    return this.data.index.sample_sets[this.data.samples.set[i]].kind === "in_context";
  }

  /** What was read before one response, if it is not the same for all responses: a button and its text. */
  ownText(i, content, read) {
    const inContext = this.isInContext(i);
    if ((inContext ? read.inContext : read.teacher) !== undefined) return [];
    if (!content.teacher_prompt)
      return this.isCompared(i) ? [el("span", { class: "same-text" }, "The teacher read the student's prompt.")] : [];
    const name = inContext ? "With the context in view, the student read" : "The teacher read";
    const body = el("div", { class: "own-text", hidden: true }, labelled(name, content.teacher_prompt, content.prompt));
    return [toggle(inContext ? "Prompt with the context" : "Teacher's prompt", body), body];
  }

  columns(card, contents) {
    const { samples, index } = this.data;
    const bySet = Map.groupBy(card.group.samples.keys(), (k) => samples.set[card.group.samples[k]]);
    return [...bySet]
      .sort((a, b) => a[0] - b[0])
      .map(([set, members]) => {
        const { run, label } = index.sample_sets[set];
        const responses = members.map((k) => [card.group.samples[k], contents[k]]);
        const name =
          this.data.runs.length > 1
            ? [runSwatch(run), el("span", { class: "run-name" }, inline(this.data.runs[run].name))]
            : [];
        const title = this.data.runs.length > 1 ? `${this.data.runs[run].name}, ${label}` : label;
        const column = el(
          "section",
          { class: "column", "aria-label": title },
          el("h4", {}, name, el("span", { class: "set" }, label)),
        );
        column.append(
          ...responses.slice(0, RESPONSES_AT_FIRST).map(([i, content]) => this.response(card, i, content, title)),
        );
        this.addRest(column, card, responses.slice(RESPONSES_AT_FIRST), title);
        return column;
      });
  }

  addRest(column, card, rest, title) {
    if (!rest.length) return;
    const more = el(
      "button",
      {
        type: "button",
        class: "more",
        onclick: () => {
          more.replaceWith(...rest.map(([i, content]) => this.response(card, i, content, title)));
          for (const view of card.views) view.attached();
        },
      },
      count(rest.length, "more response"),
    );
    column.append(more);
  }

  response(card, i, content, title) {
    const { samples, index } = this.data;
    const verdict = index.verdicts[samples.verdict[i]];
    const finish = index.finishes[samples.finish[i]];
    const n = samples.response[i];
    const label = `${title}, response ${n + 1}, ${verdict}`;
    const facts = el(
      "div",
      { class: "response-head" },
      verdictBadge(verdict),
      el("span", {}, count(samples.tokens[i], "token")),
      finish !== "stop" && el("span", { class: "finish" }, finish === "length" ? "cut at the limit" : finish),
      kl("forward", samples.forward[i]),
      kl("reverse", samples.reverse[i]),
    );
    const [button, ownText] = this.ownText(i, content, card.read);
    const root = el("div", { class: "response", "data-sample": i }, facts, ownText);
    if (button) facts.append(button);
    if (!content.texts?.length) {
      root.append(el("div", { class: "tokens plain", dir: "auto" }, prose(content.answer)));
      return root;
    }
    const view = new Tokens(content, this.filters.kind, this.filters.query, label);
    card.views.push(view);
    root.append(view.root);
    if (view.length > 120)
      facts.append(
        el(
          "button",
          {
            type: "button",
            class: "expand",
            onclick: (event) => {
              view.expand();
              event.target.remove();
            },
          },
          "show all",
        ),
      );
    return root;
  }
}

function kl(name, value) {
  return (
    value !== null &&
    value !== undefined &&
    el("span", { class: "mean-kl" }, `${name} `, el("b", { class: `chip-kl k${level(value)}` }, number(value)))
  );
}

function verdictBadge(verdict) {
  return el(
    "span",
    { class: `badge verdict-${verdict.replace(" ", "-")}` },
    el("span", { "aria-hidden": "true" }, VERDICT_MARKS[verdict] ?? "–"),
    ` ${verdict}`,
  );
}

/** A button that shows and hides `body`. */
function toggle(label, body) {
  const button = el(
    "button",
    {
      type: "button",
      "aria-expanded": "false",
      onclick: () => {
        body.hidden = !body.hidden;
        button.setAttribute("aria-expanded", String(!body.hidden));
      },
    },
    label,
  );
  return button;
}

/** A text under its name; the part that differs from `other` is marked. */
function labelled(name, text, other) {
  return el(
    "div",
    { class: "labelled" },
    el("h4", {}, name),
    el("pre", { tabindex: 0, dir: "auto" }, other === null ? prose(text) : difference(text, other)),
  );
}

function difference(text, other) {
  let start = 0;
  while (start < Math.min(text.length, other.length) && text[start] === other[start]) start++;
  let end = 0;
  while (end < Math.min(text.length, other.length) - start && text.at(-1 - end) === other.at(-1 - end)) end++;
  const middle = text.slice(start, text.length - end);
  return [
    prose(text.slice(0, start)),
    middle && el("mark", {}, prose(middle)),
    prose(text.slice(text.length - end)),
  ].flat();
}

/** Drop what a card has drawn, and keep its height. */
function empty(node, card) {
  node.style.minHeight = `${node.offsetHeight}px`;
  node.classList.remove("filled");
  node.replaceChildren();
  card.filled = false;
  card.views = [];
}
