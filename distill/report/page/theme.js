"use strict";
// Light and dark theme, and the colours of charts. Okabe and Ito's colours are distinct for colour-blind people.

const SERIES_COLORS = ["--blue", "--vermillion", "--green", "--pink", "--orange", "--sky", "--ink"];
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 5], [1, 4]];

const cycle = (list, i) => list[i % list.length];

/** The computed colour of a custom property; canvases and SVG attributes need it. */
function color(name) {
  const probe =
    document.getElementById("probe") ?? document.body.appendChild(el("span", { id: "probe", hidden: true }));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

const seriesColor = (i) => color(cycle(SERIES_COLORS, i));

function translucent(computed, opacity) {
  return computed.replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Button that switches the theme; `changed` redraws what uses computed colours. */
function themeButton(changed) {
  const label = () => (isDark() ? "Light theme" : "Dark theme");
  const button = el("button", { type: "button", class: "theme", onclick: toggle }, label());
  function toggle() {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("distill-report-theme", document.documentElement.dataset.theme);
    } catch {} // storage may be disabled
    refresh();
  }
  function refresh() {
    button.textContent = label();
    changed();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  return button;
}

function restoreTheme() {
  try {
    const theme = localStorage.getItem("distill-report-theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {} // storage may be disabled
}
