"use strict";
// Which responses are listed, and in which order.

const SORTS = [
  ["file", "Order of the files"],
  ["kl-high", "Highest KL first"],
  ["kl-low", "Lowest KL first"],
  ["fell", "KL fell most"],
  ["rose", "KL rose most"],
  ["long", "Longest first"],
  ["short", "Shortest first"],
];

/** Filter of responses; `changed` receives the new selection. */
class Filters {
  constructor(data, changed) {
    const { sample_sets: sets, sources, verdicts } = data.index;
    Object.assign(this, {
      data,
      changed,
      sets,
      kind: "forward",
      source: "",
      verdict: "",
      query: "",
      sort: "file",
      others: false,
    });
    this.limits = { kl: [null, null], tokens: [null, null] };
    this.chosen = new Set(firstAndLast(data));
    this.results = el("p", { class: "results", role: "status" });
    this.texts = null;
    this.search = debounce(150, (text) => this.setQuery(text));
    this.sources = used(data.samples.source, sources);
    this.verdicts = used(data.samples.verdict, verdicts);
  }

  build() {
    const pick = (name, options) =>
      el(
        "select",
        { name, onchange: (event) => this.set({ [name]: event.target.value }) },
        options.map(([value, text]) => el("option", { value }, text)),
      );
    const listed = (names) => [["", "all"], ...names.map(([i, name]) => [String(i), name])];
    const row = el(
      "div",
      { class: "filters" },
      field(
        "Search",
        el("input", {
          type: "search",
          name: "query",
          placeholder: "text in prompt or response",
          oninput: (event) => this.search(event.target.value),
        }),
      ),
      this.sources.length > 1 && field("Source", pick("source", listed(this.sources))),
      this.verdicts.length > 1 && field("Verdict", pick("verdict", listed(this.verdicts))),
      this.range("kl", "Mean KL", "0.01"),
      this.range("tokens", "Length", "1"),
      field("Sort", pick("sort", SORTS)),
    );
    const colors = el(
      "div",
      { class: "colors" },
      choice(
        "Colour",
        [
          ["forward", "forward KL"],
          ["reverse", "reverse KL"],
        ],
        this.kind,
        (kind) => this.set({ kind }),
      ),
      scale(),
      el(
        "span",
        { class: "hint" },
        "Point at a token, or focus it and use the arrow keys. N and P: next and previous token with top tokens (dotted line).",
      ),
    );
    return el(
      "div",
      { class: "panel" },
      row,
      this.setPicker(),
      colors,
      el(
        "div",
        { class: "results-row" },
        this.results,
        el(
          "label",
          { class: "check" },
          el("input", {
            type: "checkbox",
            name: "others",
            onchange: (event) => this.set({ others: event.target.checked }),
          }),
          "show all responses to the prompts found, not only the matching ones",
        ),
      ),
    );
  }

  range(name, label, step) {
    const input = (end, text) =>
      el("input", {
        type: "number",
        name: `${name}-${text}`,
        min: 0,
        step,
        placeholder: text,
        "aria-label": `${label}, ${text}`,
        oninput: debounce(150, (event) => {
          this.limits[name][end] = event.target.value === "" ? null : Number(event.target.value);
          this.set({});
        }),
      });
    return el(
      "div",
      { class: "field range", role: "group", "aria-label": label },
      el("span", { class: "label" }, label),
      el("span", {}, input(0, "min"), input(1, "max")),
    );
  }

  setPicker() {
    const box = (set, i) =>
      el(
        "label",
        { class: "chip" },
        el("input", {
          type: "checkbox",
          "data-set": i,
          checked: this.chosen.has(i),
          onchange: (event) => this.choose(i, event.target.checked),
        }),
        set.label,
      );
    const rows = this.data.runs.map((run, r) => {
      const boxes = this.sets.flatMap((set, i) => (set.run === r ? [box(set, i)] : []));
      return (
        boxes.length > 0 &&
        el(
          "div",
          { class: "set-row", role: "group", "aria-label": run.name },
          this.data.runs.length > 1 &&
            el("span", { class: "run-name" }, runSwatch(r), el("span", {}, inline(run.name))),
          el("div", { class: "chips" }, boxes),
        )
      );
    });
    const all = (chosen, text) => el("button", { type: "button", onclick: () => this.chooseAll(chosen()) }, text);
    const buttons =
      this.sets.length > 2 &&
      el(
        "div",
        { class: "set-buttons" },
        all(() => firstAndLast(this.data), "First and last"),
        all(() => this.sets.keys(), "All"),
        all(() => [], "None"),
      );
    this.shown = el("b", {});
    this.picker = el(
      "details",
      { class: "sets", open: innerWidth > 700 || this.sets.length <= 4 },
      el("summary", {}, "Steps shown: ", this.shown),
      el("div", { class: "sets-body" }, el("div", { class: "set-rows" }, rows), buttons),
    );
    this.showChosen();
    return this.picker;
  }

  showChosen() {
    this.shown.textContent = `${this.chosen.size} of ${this.sets.length}`;
  }

  choose(i, isChosen) {
    if (isChosen) this.chosen.add(i);
    else this.chosen.delete(i);
    this.showChosen();
    this.set({});
  }

  chooseAll(chosen) {
    this.chosen = new Set(chosen);
    for (const box of this.picker.querySelectorAll("input")) box.checked = this.chosen.has(Number(box.dataset.set));
    this.showChosen();
    this.set({});
  }

  set(values) {
    Object.assign(this, values);
    this.changed(this);
  }

  async setQuery(text) {
    this.query = fold(text.trim());
    if (this.query && !this.texts) {
      this.texts = await this.data.texts(
        (share) => (this.results.textContent = `Reading texts: ${Math.round(100 * share)}%`),
      );
    }
    this.set({});
  }

  /** True for a response of a shown step that fulfils all other conditions. */
  matches(i) {
    const { samples } = this.data;
    return (
      (this.source === "" || samples.source[i] === Number(this.source)) &&
      (this.verdict === "" || samples.verdict[i] === Number(this.verdict)) &&
      within(samples[this.kind][i], this.limits.kl) &&
      within(samples.tokens[i], this.limits.tokens) &&
      (!this.query || !this.texts || this.texts[i].includes(this.query))
    );
  }

  /** Prompts with their responses: [{prompt, samples, matching}], sorted. */
  select() {
    const { samples } = this.data;
    const groups = new Map();
    for (let i = 0; i < samples.set.length; i++) {
      if (!this.chosen.has(samples.set[i])) continue;
      const group = groups.get(samples.prompt[i]) ?? { prompt: samples.prompt[i], all: [], matching: [] };
      groups.set(samples.prompt[i], group);
      group.all.push(i);
      if (this.matches(i)) group.matching.push(i);
    }
    const found = [...groups.values()].filter((group) => group.matching.length);
    for (const group of found) group.samples = this.others ? group.all : group.matching;
    const matching = found.reduce((sum, group) => sum + group.matching.length, 0);
    this.results.textContent = `${count(matching, "response")} to ${count(found.length, "prompt")}`;
    return this.sorted(found);
  }

  sorted(groups) {
    const { samples } = this.data;
    const kls = (group) => group.matching.map((i) => samples[this.kind][i]).filter((value) => value !== null);
    const lengths = (group) => group.matching.map((i) => samples.tokens[i]);
    const keys = {
      file: (group) => group.prompt,
      "kl-high": (group) => -Math.max(...kls(group)),
      "kl-low": (group) => Math.min(...kls(group)),
      fell: (group) => this.change(group),
      rose: (group) => -this.change(group, -Infinity),
      long: (group) => -Math.max(...lengths(group)),
      short: (group) => Math.min(...lengths(group)),
    };
    const keyed = groups.map((group) => [keys[this.sort](group), group]);
    return keyed.sort((a, b) => (a[0] === b[0] ? 0 : a[0] < b[0] ? -1 : 1)).map(([, group]) => group);
  }

  /** Mean KL of the last step less that of the first one, over the runs of a prompt. */
  change(group, missing = Infinity) {
    const { samples } = this.data;
    const changes = [];
    for (const run of this.data.runs.keys()) {
      const means = new Map();
      for (const i of group.all) {
        const set = this.sets[samples.set[i]];
        const value = samples[this.kind][i];
        if (set.run === run && set.kind !== "in_context" && value !== null)
          means.set(set.step, [...(means.get(set.step) ?? []), value]);
      }
      if (means.size < 2) continue;
      const steps = [...means.keys()].sort((a, b) => a - b);
      changes.push(mean(means.get(steps.at(-1))) - mean(means.get(steps[0])));
    }
    return changes.length ? mean(changes) : missing;
  }
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function within(value, [low, high]) {
  if (low === null && high === null) return true;
  return value !== null && (low === null || value >= low) && (high === null || value <= high);
}

function used(column, names) {
  const present = new Set(column);
  return [...names.entries()].filter(([i]) => present.has(i));
}

/** The sets that are shown first: each run's first and last validation and its in-context bound, or its last training samples. */
function firstAndLast(data) {
  const sets = [...data.index.sample_sets.entries()];
  return data.runs.flatMap((_, run) => {
    const of = (kind) =>
      sets
        .filter(([, set]) => set.run === run && set.kind === kind)
        .sort((a, b) => a[1].step - b[1].step)
        .map(([i]) => i);
    const validation = of("validation");
    if (!validation.length) return of("train").slice(-1);
    return [...new Set([validation[0], ...of("in_context"), validation.at(-1)])];
  });
}
