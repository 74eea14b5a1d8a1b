"use strict";
// Shared by the pages. Text of the data reaches the document through textContent only, and plotly never sees it.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function readJSON(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function records(table) {
  return table.rows.map((row) => Object.fromEntries(table.columns.map((name, i) => [name, row[i]])));
}

function signed(value, digits) {
  if (value === null) return "n/a";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
}

const points = (value) => signed(value === null ? null : 100 * value, 1);
const chance = (value) => (value === null ? "n/a" : value < 1e-4 ? "< 0.0001" : String(Number(value.toPrecision(2))));
const count = (value) => value.toLocaleString("en");

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = el("textarea", { class: "offscreen" });
    field.value = text;
    (document.querySelector("dialog[open]") || document.body).append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

// The text with a button that copies it, in the place of `source`.
function copyable(source) {
  const box = el("div", { class: "copyable" });
  source.replaceWith(box);
  const button = el("button", {
    type: "button",
    class: "copy",
    click: async (event) => {
      const button = event.currentTarget;
      await copyText(source.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    },
  }, "Copy");
  box.append(source, button);
  return box;
}

// Colours of the style sheet, as the plots need them.
function colour(name) {
  const probe = el("span", { class: "ink-" + name, hidden: true });
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const drawn = []; // what has to be drawn again in other colours

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function paint() {
  const button = document.getElementById("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  for (const draw of drawn) draw();
}

function loadPlotly() {
  if (window.Plotly) return;
  const script = el("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}

function plotLayout(more) {
  const text = { color: colour("dim"), family: getComputedStyle(document.body).fontFamily, size: 11 };
  return Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: text, hovermode: "closest", showlegend: false,
    dragmode: "pan", margin: { l: 8, r: 8, t: 8, b: 8 },
  }, more);
}

const plotConfig = { scrollZoom: true, displayModeBar: false, doubleClick: "reset", showTips: false };

function start() {
  for (const node of document.querySelectorAll(".js")) node.hidden = false;
  for (const pre of document.querySelectorAll("pre.snippet")) copyable(pre);
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  } catch { /* no storage for this page: the choice lasts until it is closed */ }
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* as above */ }
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
}
