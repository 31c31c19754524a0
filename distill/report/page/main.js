"use strict";
// Start: read the index, build the views when they are opened, follow the address's fragment.

const VIEWS = [
  ["overview", "Overview"],
  ["curves", "Curves"],
  ["samples", "Samples"],
  ["compare", "Compare"],
];

class Page {
  constructor(data) {
    this.data = data;
    this.app = document.getElementById("app");
    this.built = new Map();
    this.current = null;
    const views = VIEWS.filter(([name]) => name !== "compare" || data.runs.length > 1);
    this.links = new Map(views.map(([name, title]) => [name, el("a", { href: `#${name}` }, title)]));
    const { title, made } = data.index;
    document.title = title;
    document.getElementById("top").replaceChildren(
      el(
        "div",
        { class: "topbar" },
        el(
          "div",
          { class: "brand" },
          el("h1", {}, inline(title)),
          el("span", { class: "made" }, `made ${made.slice(0, 16).replace("T", " ")}`),
        ),
        el("nav", { "aria-label": "Views" }, [...this.links.values()]),
        themeButton(() => this.redraw()),
      ),
    );
    this.app.replaceChildren();
    addEventListener("hashchange", () => this.open());
    addEventListener("scroll", () => tooltip.scrolled(), { passive: true, capture: true });
    this.open();
  }

  build(name) {
    const { data } = this;
    if (name === "overview") return overview(data);
    if (name === "compare") return { root: compare(data), redraw() {} };
    const view = name === "curves" ? new Curves(data) : new Samples(data);
    view.root = view.build();
    return view;
  }

  open() {
    const wanted = location.hash.slice(1);
    if (wanted === "app" && this.current) return; // the skip link
    const name = this.links.has(wanted) ? wanted : "overview";
    if (!this.built.has(name)) {
      const view = this.build(name);
      const root = el(
        "section",
        { class: `view view-${name}`, "aria-label": this.links.get(name).textContent },
        view.root,
      );
      this.built.set(name, { root, view });
      this.app.append(root);
    }
    if (this.current) this.built.get(this.current).scroll = scrollY;
    for (const [key, { root }] of this.built) root.hidden = key !== name;
    this.current = name;
    scrollTo(0, this.built.get(name).scroll ?? 0);
    for (const [key, link] of this.links) {
      if (key === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const opened = this.built.get(name);
    if (opened.outdated) opened.view.redraw();
    opened.outdated = false;
    tooltip.hide();
  }

  /** Draw again what uses computed colours: the open view now, other views when they are opened. */
  redraw() {
    for (const view of this.built.values()) {
      if (view.root.hidden) view.outdated = true;
      else view.view.redraw();
    }
  }
}

async function start() {
  restoreTheme();
  try {
    const index = await inflate(document.getElementById("index").textContent);
    globalThis.page = new Page(new Data(index));
    requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("drawn")));
  } catch (error) {
    document
      .getElementById("app")
      .replaceChildren(
        el(
          "p",
          { class: "empty" },
          `This page cannot be read: ${error.message}. A browser from 2024 or later is needed.`,
        ),
      );
    throw error;
  }
}

document.addEventListener("DOMContentLoaded", start);
