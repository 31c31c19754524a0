"use strict";
// What is known about one token: its KLs, and the most probable tokens of student and teacher.

const tooltip = {
  root: null,
  owner: null,

  show(node, tokens) {
    this.root ??= document.body.appendChild(el("div", { id: "tooltip", role: "tooltip", hidden: true }));
    this.owner?.removeAttribute("aria-describedby");
    this.owner = node;
    node.setAttribute("aria-describedby", "tooltip");
    this.root.replaceChildren(...tokenFacts(Number(node.dataset.i), tokens));
    this.root.hidden = false;
    this.place(node);
  },

  hide() {
    if (!this.root) return;
    this.root.hidden = true;
    this.owner?.removeAttribute("aria-describedby");
    this.owner = null;
  },

  /** After scrolling: follow a focused token, hide otherwise. */
  scrolled() {
    if (this.owner && this.owner === document.activeElement) this.place(this.owner);
    else this.hide();
  },

  /** Below the token, or above it where there is no space below; at the bottom of a narrow window (style sheet). */
  place(node) {
    const box = largestBox(node);
    const { offsetWidth: width, offsetHeight: height } = this.root;
    const below = box.bottom + 8;
    const top = below + height < innerHeight ? below : Math.max(4, box.top - height - 8);
    this.root.style.top = `${top}px`;
    this.root.style.left = `${Math.max(8, Math.min(box.left - 12, document.documentElement.clientWidth - width - 8))}px`;
  },
};

function tokenFacts(i, tokens) {
  const { texts, forward, reverse } = tokens.sample;
  const kl = (values, name, text) =>
    el(
      "div",
      { class: "kl" },
      el("dt", {}, name),
      el(
        "dd",
        {},
        el("span", { class: `chip-kl k${level(values?.[i]) ?? "none"}` }, number(values?.[i])),
        " ",
        el("small", {}, text),
      ),
    );
  const entry = tokens.top.get(i);
  const head = el(
    "div",
    { class: "token-head" },
    el("code", {}, inline(texts[i])),
    el("span", {}, `token ${i + 1} of ${texts.length}`),
  );
  const kls = el(
    "dl",
    {},
    kl(forward, "forward KL", "teacher || student"),
    kl(reverse, "reverse KL", "student || teacher"),
  );
  if (!forward && !reverse) return [head, el("p", {}, "The teacher did not score this response.")];
  if (!entry)
    return [
      head,
      kls,
      el(
        "p",
        {},
        tokens.top.size
          ? "Top tokens are stored for the tokens with an underline."
          : "No top tokens are stored for this response.",
      ),
    ];
  return [
    head,
    kls,
    el(
      "div",
      { class: "tops" },
      topList("Student", entry.student, entry.chosen?.student),
      topList("Teacher", entry.teacher, entry.chosen?.teacher),
    ),
    isUnlisted(entry) && el("p", { class: "unlisted" }, "The response's token is not among them."),
  ].filter(Boolean);
}

/** True if the response's token is in neither list. Pages of older versions do not have this information. */
function isUnlisted({ chosen }) {
  return Boolean(chosen) && (chosen.student ?? null) === null && (chosen.teacher ?? null) === null;
}

/** Tokens with probabilities as bars. `chosen`: place of the response's token in the list, which is marked, or null. */
function topList(name, list, chosen) {
  const rows = list.map(([text, p], place) => {
    const bar = el("span", { class: "bar" });
    bar.style.width = `${Math.max(1, 100 * p)}%`;
    const isChosen = place === chosen;
    return el(
      "li",
      { class: isChosen ? "chosen" : null },
      el("code", {}, inline(text)),
      isChosen && el("span", { class: "sr" }, " (in the response)"),
      el("span", { class: "probability" }, probability(p)),
      el("span", { class: "track" }, bar),
    );
  });
  return el("div", { class: "top-list" }, el("h4", {}, name), el("ol", {}, rows));
}
