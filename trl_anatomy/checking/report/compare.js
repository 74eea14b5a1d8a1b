"use strict";
(() => {
  const data = readJSON("data");
  const place = document.getElementById("scatter");
  const select = document.getElementById("model");
  let model = 0, chosen = -1, ready = false;
  const finite = (value) => (value === null ? 0 : value);

  function draw() {
    const seen = data.observed[model];
    const x = data.concepts.map((c) => 100 * c[2]), y = seen.map((o) => 100 * o[0]);
    const ends = [...data.concepts.flatMap((c) => [c[2], c[3], c[4]]), ...data.observed.flat(2)].map((value) => 100 * finite(value));
    const low = Math.min(0, ...ends), high = Math.max(0, ...ends), pad = 0.06 * (high - low || 1);
    const range = [low - pad, high + pad];
    const error = (middle, from, to) => ({
      type: "data", symmetric: false, thickness: 1, width: 0, color: colour("dim"),
      array: middle.map((value, i) => (to[i] === null ? 0 : 100 * to[i] - value)),
      arrayminus: middle.map((value, i) => (from[i] === null ? 0 : value - 100 * from[i])),
    });
    const line = { type: "scatter", mode: "lines", x: range, y: range, hoverinfo: "skip", line: { color: colour("dim"), width: 1, dash: "dot" } };
    const dots = {
      type: "scatter", mode: "markers+text", x, y, hoverinfo: "none", textposition: "top left", textfont: { size: 10, color: colour("ink") },
      text: data.concepts.map((c, i) => (i < 12 || i === chosen ? c[0] : "")), // the largest predicted come first
      error_x: error(x, data.concepts.map((c) => c[3]), data.concepts.map((c) => c[4])),
      error_y: error(y, seen.map((o) => o[1]), seen.map((o) => o[2])),
      marker: {
        size: data.concepts.map((_, i) => (i === chosen ? 12 : 8)), color: data.concepts.map((c) => colour(c[2] > 0 ? "rise" : "fall")),
        line: { width: data.concepts.map((_, i) => (i === chosen ? 3 : 0)), color: colour("ink") },
      },
    };
    const axis = (title) => ({
      title: { text: title }, range, zeroline: true, zerolinecolor: colour("dim"), gridcolor: colour("rule"), ticks: "", showline: false,
    });
    const layout = plotLayout({ xaxis: axis("predicted shift, points"), yaxis: axis("observed shift, points"), margin: { l: 55, r: 15, t: 15, b: 45 }, uirevision: "same" });
    Plotly.react(place, [line, dots], layout, plotConfig);
    if (ready) return;
    ready = true;
    const at = (event) => event.points.find((point) => point.curveNumber === 1)?.pointIndex;
    place.on("plotly_hover", (event) => at(event) !== undefined && tell(at(event)));
    place.on("plotly_click", (event) => { if (at(event) !== undefined) { chosen = at(event); tell(chosen); draw(); } });
    place.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!by || !data.concepts.length) return;
      event.preventDefault();
      chosen = (chosen + by + data.concepts.length) % data.concepts.length;
      tell(chosen);
      draw();
    });
    new ResizeObserver(() => place.offsetWidth && Plotly.Plots.resize(place)).observe(place);
  }

  function tell(i) {
    const [name, label, predicted, low, high] = data.concepts[i], [mean, from, to] = data.observed[model][i];
    document.getElementById("point").replaceChildren(
      el("h3", { class: "title" }, name, " ", el("span", { class: "terms", dir: "auto" }, label || "no distinctive words")),
      el("p", null, "Predicted ", el("b", null, points(predicted)), ` points (${points(low)} … ${points(high)}), observed `,
        el("b", null, points(mean)), ` (${points(from)} … ${points(to)}).`),
      el("p", null, el("a", { href: "#" + name }, "In the table")));
  }

  start();
  if (!data.concepts.length) place.textContent = "No concept, so nothing was predicted.";
  else {
    loadPlotly();
    drawn.push(draw);
    draw();
  }
  select?.addEventListener("change", () => { model = Number(select.value); draw(); if (chosen >= 0) tell(chosen); });
})();
