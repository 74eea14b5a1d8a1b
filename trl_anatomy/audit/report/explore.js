"use strict";
(() => {
  const data = readJSON("data");
  const concepts = new Map(records(data.concepts).map((c) => [c.concept, c]));
  const contexts = new Map(records(data.contexts).map((c) => [c.context, c]));
  const hypotheses = records(data.hypotheses);
  for (const h of hypotheses) h.id = `${h.context}~${h.concept}`;
  const byId = new Map(hypotheses.map((h) => [h.id, h]));
  const $ = (id) => document.getElementById(id);
  const VIEWS = { maps: "Maps", concepts: "Concepts", hypotheses: "Hypotheses", pairs: "Pairs" };
  const PAGE = 50;
  const state = { view: "maps", q: "", sort: "", sel: "", pair: "", mark: "" };

  // Pairs are the bulk of the page: read when first asked for. --------------------------------------------------------
  let pairStore = null;
  function pairs() {
    if (pairStore) return pairStore;
    const read = readJSON("pairs");
    const rows = records(read);
    for (const p of rows) {
      p.sample = read.samples[p.row] || null;
      if (p.sample) for (const side of ["prompt", "chosen", "rejected"]) p[side] = p.sample[side].join("");
      p.names = new Set([...p.contexts, ...p.concepts, ...(p.sample ? Object.keys(p.sample.fired) : [])]);
      p.strength = new Map(p.concepts.map((name, i) => [name, p.scores[i]]));
    }
    pairStore = { rows, byRow: new Map(rows.map((p) => [p.row, p])), cut: read.cut };
    return pairStore;
  }

  // Words of one thing --------------------------------------------------------------------------------------------------
  const about = (context) => (contexts.get(context)?.terms || []).slice(0, 4).join(" · ");
  const amount = (concept, value) => (concept.startsWith("R") ? signed(value, 2) + " sd" : points(value));
  const words = (text) => el("span", { class: "terms", dir: "auto" }, text || "no distinctive words");
  const told = (item) => (item.told ? el("p", { class: "dim", dir: "auto" }, item.told) : "");
  const significant = (h) => h.kept;
  const verdict = (h) => (h.kept ? "differs" : h.folded_under ? `as ${h.folded_under.replace("~", " ")}` : h.differs ? "by named habits" : "no evidence");
  const leans = (verdict) => data.leans[verdict] || verdict;
  const share = (value) => {
    if (value === null) return "n/a";
    const percent = 100 * value;
    return ((percent > 0 && percent < 1) || (percent > 99 && percent < 100) ? percent.toFixed(1) : percent.toFixed(0)) + " %";
  };
  // Audits of earlier versions do not know in how many responses a concept is shown.
  const rated = [...concepts.values()].some((c) => c.rate_chosen !== null);
  const shownIn = (c) => (c.rate_chosen === null ? "" : `shown in ${share(c.rate_chosen)} of chosen and ${share(c.rate_rejected)} of rejected responses; `);
  const where = (h, place) => {
    const rates = ["chosen", "rejected"].map((side) => h[`rate_${side}_${place}`]);
    return rates[0] === null || rates[1] === null ? null : `${share(rates[0])} / ${share(rates[1])}`;
  };
  const corrected = (low, high, q) => (low * high > 0 && q !== null && q > data.alpha ? `, ${data.not_significant}` : "");
  const tone = (verdict) => (verdict === "rises" ? "rise" : verdict === "falls" ? "fall" : "quiet");

  function snippet(concept, context) {
    const kind = !context ? "all" : context.startsWith("A") ? "prompt" : "feature";
    return data.snippets[kind]
      .split("habit_\ue000").join("habit_" + concept.toLowerCase())
      .split("\ue000").join(concept)
      .split("\ue001").join(context || "");
  }

  function link(text, change, label) {
    return el("a", {
      href: "#" + encode({ ...state, ...change }), "aria-label": label,
      click: (event) => { event.preventDefault(); event.stopPropagation(); go(change); },
    }, text);
  }

  function snippetBox(title, text) {
    const pre = el("pre", { class: "snippet", tabindex: "0" }, text);
    return [el("h3", null, title), copyable(pre)];
  }

  // The address -------------------------------------------------------------------------------------------------------------
  function encode(of) {
    const given = Object.entries(of).filter(([name, value]) => name === "view" || value !== "");
    return new URLSearchParams(given).toString();
  }

  function decode() {
    if (!location.hash.startsWith("#view=")) return false;
    const found = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(state)) state[name] = found.get(name) || "";
    if (!(state.view in VIEWS)) state.view = "maps";
    return true;
  }

  function go(change, replace) {
    Object.assign(state, change);
    const hash = "#" + encode(state);
    // Only the part after "#" changes, which is allowed for files; where it is not, the page still works.
    try {
      if (replace) history.replaceState(null, "", hash);
      else if (hash !== location.hash) history.pushState(null, "", hash);
    } catch { /* a frame without an address */ }
    render();
  }

  // Tables ------------------------------------------------------------------------------------------------------------------
  const COLUMNS = {
    concepts: [
      { key: "concept", title: "Concept", value: (c) => c.concept, cell: (c) => [el("b", null, c.concept), " ", words(c.label)] },
      { key: "verdict", title: "verdict", value: (c) => c.verdict, cell: (c) => [el("span", { class: tone(c.verdict) }, leans(c.verdict))] },
      ...(rated ? ["chosen", "rejected"].map((side) => ({ key: side, title: side, n: true, value: (c) => c["rate_" + side], cell: (c) => [share(c["rate_" + side])] })) : []),
      { key: "predicted", title: "lean, points of its features", n: true, value: (c) => c.predicted, cell: (c) => [el("b", null, amount(c.concept, c.predicted))] },
      { key: "size", title: "95 % interval, by size", n: true, value: (c) => Math.abs(c.predicted || 0), cell: (c) => [amount(c.concept, c.ci_low) + " … " + amount(c.concept, c.ci_high)] },
      { key: "length_adjusted", title: "at equal length", n: true, value: (c) => c.length_adjusted, cell: (c) => [amount(c.concept, c.length_adjusted)] },
      { key: "q", title: "q", n: true, value: (c) => c.q, cell: (c) => [chance(c.q), el("span", { class: "dim" }, corrected(c.ci_low, c.ci_high, c.q))] },
      { key: "differ", title: "pairs that differ", n: true, value: (c) => c.differ, cell: (c) => [count(c.differ)] },
    ],
    hypotheses: [
      { key: "context", title: "Where", value: (h) => h.context, cell: (h) => [el("b", null, h.context), " ", words(about(h.context))] },
      { key: "concept", title: "Concept", value: (h) => h.concept, cell: (h) => [el("b", null, h.concept), " ", words(concepts.get(h.concept)?.label)] },
      { key: "lean", title: "leans to", value: (h) => h.lean, cell: (h) => [el("span", { class: h.lean === "chosen" ? "rise" : "fall" }, h.lean)] },
      { key: "mean_in", title: rated ? "here, chosen / rejected" : "here", n: true, value: (h) => h.mean_in, cell: (h) => [where(h, "in") || amount(h.concept, h.mean_in)] },
      { key: "mean_out", title: "elsewhere", n: true, value: (h) => h.mean_out, cell: (h) => [where(h, "out") || amount(h.concept, h.mean_out)] },
      { key: "delta", title: "difference", n: true, value: (h) => h.delta, cell: (h) => [el("b", null, amount(h.concept, h.delta))] },
      { key: "q", title: "q", n: true, value: (h) => h.q, cell: (h) => [chance(h.q)] },
      { key: "n_in", title: "pairs", n: true, value: (h) => h.n_in, cell: (h) => [count(h.n_in)] },
      { key: "kept", title: "verdict", value: (h) => 2 * h.kept + h.differs, cell: (h) => [h.kept ? verdict(h) : el("span", { class: "dim" }, verdict(h))] },
    ],
    pairs: [
      { key: "row", title: "Row", n: true, value: (p) => p.row, cell: (p) => [el("b", null, String(p.row))] },
      { key: "prompt", title: "Prompt", value: (p) => p.prompt || "", cell: (p) => [el("span", { class: "text cut", dir: "auto" }, (p.prompt || "").slice(0, 140))] },
      { key: "contexts", title: "Contexts", value: (p) => p.contexts[0] || "", cell: (p) => [p.contexts.slice(0, 4).join(" ")] },
      { key: "concepts", title: "Strongest concepts, + in chosen, − in rejected", value: (p) => (p.concepts.length ? Math.abs(p.scores[0]) : 0),
        cell: (p) => p.concepts.slice(0, 4).flatMap((name, i) => [el("span", { class: p.scores[i] > 0 ? "rise" : "fall" }, (p.scores[i] > 0 ? "+" : "−") + name), " "]) },
      { key: "tokens", title: "tokens", value: (p) => (p.sample ? 1 : 0), cell: (p) => [p.sample ? "marked" : ""] },
    ],
  };
  const NAME = /^[tbra]\d+$/i;

  function searched(view) {
    const asked = state.q.trim().split(/\s+/).filter(Boolean);
    const names = asked.filter((word) => NAME.test(word)).map((word) => word.toUpperCase());
    const other = asked.filter((word) => !NAME.test(word)).map((word) => word.toLowerCase());
    const fit = (has, text) => names.every(has) && (!other.length || other.every((word) => text().includes(word)));
    if (view === "concepts") {
      return [...concepts.values()].filter((c) => fit((name) => c.concept === name, () => `${c.label} ${c.words} ${c.habits} ${leans(c.verdict)} ${c.kind}`.toLowerCase()));
    }
    if (view === "hypotheses") {
      return hypotheses.filter((h) => fit((name) => h.context === name || h.concept === name,
        () => `${contexts.get(h.context)?.words} ${concepts.get(h.concept)?.label} ${concepts.get(h.concept)?.words} ${concepts.get(h.concept)?.habits} ${h.lean} ${verdict(h)}`.toLowerCase()));
    }
    const found = pairs().rows.filter((p) => fit((name) => p.names.has(name), () => {
      p.lower ??= `${p.prompt || ""}\n${p.chosen || ""}\n${p.rejected || ""}`.toLowerCase();
      return p.lower;
    }));
    const strong = names.filter((name) => name.startsWith("T"));
    const score = (p) => Math.max(...strong.map((name) => Math.abs(p.strength.get(name) || 0)));
    return strong.length ? found.sort((a, b) => score(b) - score(a) || a.row - b.row) : found;
  }

  function sorted(view, rows) {
    const [key, direction] = state.sort.split(":");
    const column = COLUMNS[view].find((c) => c.key === key);
    if (!column) return rows;
    const sign = direction === "up" ? 1 : -1;
    const keyed = rows.map((row) => [column.value(row), row]);
    keyed.sort(([a], [b]) => (a === null) - (b === null)
      || sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b));
    return keyed.map(([, row]) => row);
  }

  let listed = { key: "", rows: [], shown: 0 };
  function table(view) {
    const key = [view, state.q, state.sort].join("\n");
    if (listed.key !== key) listed = { key, rows: sorted(view, searched(view)), shown: PAGE };
    const place = $("view-" + view);
    const [by, direction] = state.sort.split(":");
    const head = el("tr", null, COLUMNS[view].map((c) => el("th", {
      scope: "col", class: c.n ? "n" : null, "aria-sort": by === c.key ? (direction === "up" ? "ascending" : "descending") : null,
    }, el("button", { type: "button", "data-sort": c.key, click: () => {
      const first = c.n || c.key === "kept" || c.key === "tokens" ? "down" : "up";
      const flipped = direction === "up" ? "down" : "up";
      go({ sort: `${c.key}:${by === c.key ? flipped : first}` });
      $("view-" + view).querySelector(`[data-sort="${c.key}"]`).focus();
    } }, c.title))));
    const body = el("tbody", null, listed.rows.slice(0, listed.shown).map((row) => line(view, row)));
    const left = listed.rows.length - listed.shown;
    place.replaceChildren(
      el("div", { class: "wide" }, el("table", { class: "list" }, el("thead", null, head), body)),
      ...(left > 0 ? [el("button", { type: "button", class: "more-rows", click: () => {
        const from = listed.shown;
        listed.shown += PAGE * 4;
        table(view);
        place.querySelectorAll("tbody tr")[from]?.focus();
      } }, `Show more (${count(left)} left)`)] : []),
      ...(listed.rows.length ? [] : [el("p", { class: "dim" }, "Nothing fits the search.")]),
    );
    const all = { concepts: concepts.size, hypotheses: data.n_hypotheses, pairs: data.n_pairs }[view];
    const carried = { concepts: concepts.size, hypotheses: hypotheses.length, pairs: pairStore ? pairStore.rows.length : 0 }[view];
    $("counted").textContent = `${count(listed.rows.length)} of ${count(carried)}`
      + (carried < all ? `; the page carries ${count(carried)} of ${count(all)}, the audit folder all` : "");
  }

  const idOf = (view, row) => (view === "concepts" ? row.concept : view === "hypotheses" ? row.id : String(row.row));

  function line(view, row) {
    const id = idOf(view, row);
    const open = () => (view === "pairs" ? go({ pair: id }) : go({ sel: id }));
    return el("tr", {
      tabindex: "0", "data-id": id, "aria-selected": state.sel === id && view !== "pairs" ? "true" : null,
      click: open,
      keydown: (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
        const next = event.key === "ArrowDown" ? "nextElementSibling" : event.key === "ArrowUp" ? "previousElementSibling" : null;
        if (next) { event.preventDefault(); event.currentTarget[next]?.focus(); }
      },
    }, COLUMNS[view].map((c) => el("td", { class: c.n ? "n" : null }, c.cell(row))));
  }

  // What is selected --------------------------------------------------------------------------------------------------------
  function rowLinks(rows, mark) {
    return rows.flatMap((row, i) => [i ? ", " : "", link("row " + row, { pair: String(row), mark: mark || "" })]);
  }

  function hypothesisList(found, name) {
    if (!found.length) return [el("p", { class: "dim" }, "No evidence of a difference.")];
    return [el("ul", { class: "plain" }, found.slice(0, 8).map((h) => {
      const other = name === h.context ? h.concept : h.context;
      return el("li", null, link(other, { sel: h.id }), " ",
        words(name === h.context ? concepts.get(other)?.label : about(other)), " ",
        el("span", { class: h.delta > 0 ? "rise" : "fall" }, amount(h.concept, h.delta)));
    }))];
  }

  function detail() {
    const place = $("detail");
    const id = state.sel;
    const concept = concepts.get(id), context = contexts.get(id), hypothesis = byId.get(id);
    if (concept) {
      const found = hypotheses.filter((h) => h.concept === id && significant(h));
      place.replaceChildren(
        el("h3", { class: "title" }, id, " ", words(concept.label)), told(concept),
        el("p", null, el("b", { class: tone(concept.verdict) }, leans(concept.verdict)),
          `: ${shownIn(concept)}lean ${amount(id, concept.predicted)}${id.startsWith("T") ? " points of its features" : ""} (95 % ${amount(id, concept.ci_low)} … ${amount(id, concept.ci_high)}), q ${chance(concept.q)}${corrected(concept.ci_low, concept.ci_high, concept.q)}. `
          + `At equal length ${amount(id, concept.length_adjusted)}. Differs in ${count(concept.differ)} pairs; ${count(concept.n_features)} features.`),
        el("p", null, "Telling pairs: ", ...(concept.telling_rows.length ? rowLinks(concept.telling_rows, id) : ["none"]), ". ",
          ...(id.startsWith("T") ? [link("All its pairs", { view: "pairs", q: id, sort: "" }), ". "] : []),
          link("Hypotheses", { view: "hypotheses", q: id, sort: "" }), "."),
        el("h3", null, "Differs most in"), ...hypothesisList(found, id),
        ...snippetBox("Policy to explain it away", snippet(id, "")));
    } else if (context) {
      const found = hypotheses.filter((h) => h.context === id && significant(h));
      place.replaceChildren(
        el("h3", { class: "title" }, id, " ", words(context.terms.join(" · "))), told(context),
        el("p", null, id === "B0" ? "Pairs that show next to no concept; they are part of no test. "
          : id.startsWith("A") ? "Pairs whose prompt is about this. " : "Pairs that show alike concepts. ",
        `${count(context.pairs)} pairs. `, link("Its pairs", { view: "pairs", q: id, sort: "" }), ". ",
        link("Hypotheses", { view: "hypotheses", q: id, sort: "" }), "."),
        el("h3", null, "What leans differently here"), ...hypothesisList(found, id));
    } else if (hypothesis) {
      const h = hypothesis, c = concepts.get(h.concept);
      place.replaceChildren(
        el("h3", { class: "title" }, link(h.context, { sel: h.context }), " → ", link(h.concept, { sel: h.concept })),
        el("p", null, h.context.startsWith("A") ? "In prompts like " : "In pairs like ", words(about(h.context)),
          `, the pairs lean ${h.lean === "chosen" ? "towards" : "away from"} `, words(c?.label), " more than elsewhere."),
        where(h, "in") ? el("p", null, `Share of chosen / rejected responses that show it: ${where(h, "in")} here, ${where(h, "out") || "n/a"} elsewhere.`) : "",
        el("p", null, `${h.concept.startsWith("T") ? "Lean in points of its features: " : "Lean: "}${amount(h.concept, h.mean_in)} here, ${amount(h.concept, h.mean_out)} elsewhere; difference ${amount(h.concept, h.delta)} `
          + `(95 % ${amount(h.concept, h.ci_low)} … ${amount(h.concept, h.ci_high)}), q ${chance(h.q)}, ${count(h.n_in)} pairs. `
          + (significant(h) ? "Alike in both halves of the rows." : h.folded_under ? `It says the same as ${h.folded_under.replace("~", " → ")}.`
            : h.differs ? "It differs, and named habits explain most of it." : `No evidence: ${h.q !== null && h.q > data.alpha ? data.not_significant : "not alike in both halves of the rows"}.`)),
        el("p", null, link("The pairs behind it", { view: "pairs", q: h.concept.startsWith("T") ? `${h.context} ${h.concept}` : h.context, sort: "" }),
          ...(c && c.telling_rows.length ? ["; telling pairs of the concept: ", ...rowLinks(c.telling_rows, h.concept)] : []), "."),
        ...snippetBox("Policy to explain it away there", snippet(h.concept, h.context)));
    } else {
      place.replaceChildren(el("p", { class: "dim" }, "Choose a point, a concept or a hypothesis: what is known about it stands here, with the policy to copy."));
    }
  }

  // Maps ----------------------------------------------------------------------------------------------------------------------
  const maps = {};
  function related() {
    const id = state.sel;
    if (byId.has(id)) return new Set(id.split("~"));
    if (!concepts.has(id) && !contexts.has(id)) return null;
    const names = new Set([id]);
    for (const h of hypotheses) if (significant(h) && (h.concept === id || h.context === id)) names.add(h.concept).add(h.context);
    return names;
  }

  function mapPoints(kind) {
    const all = kind === "concepts" ? [...concepts.values()] : [...contexts.values()].filter((c) => c.context !== "B0");
    return all.map((item) => ({ item, id: item.concept || item.context, at: data.places[item.concept || item.context] })).filter((p) => p.at);
  }

  function drawMap(kind) {
    const place = $("map-" + kind);
    const found = maps[kind] || (maps[kind] = { points: mapPoints(kind), ready: false });
    if (!found.points.length) {
      place.textContent = "No map: nothing was found to place, or the folder was written without places (audit again).";
      return;
    }
    loadPlotly();
    const near = related();
    const size = (p) => (kind === "concepts" ? p.item.differ : p.item.pairs);
    const largest = Math.max(1, ...found.points.map(size));
    const shades = { rise: colour("rise"), fall: colour("fall"), quiet: colour("dim"), ink: colour("ink"), paper: colour("paper"), link: colour("link") };
    const match = state.q.trim() ? new Set(searchedNames(kind)) : null;
    const bright = (p) => (!near || near.has(p.id)) && (!match || match.has(p.id));
    const trace = {
      type: "scatter", mode: "markers+text", hoverinfo: "none", cliponaxis: false,
      x: found.points.map((p) => p.at[0]), y: found.points.map((p) => p.at[1]),
      text: [],
      textposition: "top center", textfont: { color: shades.ink, size: 10 },
      marker: {
        size: found.points.map((p) => 6 + 11 * Math.sqrt(size(p) / largest)),
        symbol: found.points.map((p) => ("RA".includes(p.id[0]) ? "square" : "circle")),
        color: found.points.map((p) => (kind === "concepts" ? shades[tone(p.item.verdict)] : shades.link)),
        opacity: found.points.map((p) => (bright(p) ? 0.85 : 0.12)),
        line: { color: found.points.map((p) => (p.id === state.sel ? shades.ink : shades.paper)), width: found.points.map((p) => (p.id === state.sel ? 3 : 1)) },
      },
    };
    const axis = (values) => {
      const low = Math.min(...values), high = Math.max(...values), pad = 0.09 * (high - low || 1);
      return { visible: false, range: [low - pad, high + pad] };
    };
    const layout = plotLayout({ xaxis: axis(trace.x), yaxis: axis(trace.y), uirevision: kind, autosize: true });
    trace.text = labels(found.points, bright, size, found.ready ? place.layout : layout);
    found.label = () => Plotly.restyle(place, { text: [labels(found.points, bright, size, place.layout)] });
    Plotly.react(place, [trace], layout, plotConfig);
    if (found.ready) return;
    found.ready = true;
    const tip = el("div", { class: "tip", role: "status" });
    place.after(tip);
    const tell = (p) => tip.replaceChildren(el("b", null, p.id), " ", words(kind === "concepts" ? p.item.label : p.item.terms.join(" · ")),
      el("span", { class: "dim" }, kind === "concepts" ? ` ${leans(p.item.verdict)} ${amount(p.id, p.item.predicted)}` : ` ${count(p.item.pairs)} pairs`));
    place.on("plotly_hover", (event) => tell(found.points[event.points[0].pointIndex]));
    place.on("plotly_unhover", () => tip.replaceChildren());
    let moved = 0;
    place.on("plotly_relayout", () => { clearTimeout(moved); moved = setTimeout(() => found.label(), 60); });
    place.on("plotly_click", (event) => go({ sel: found.points[event.points[0].pointIndex].id }));
    place.addEventListener("keydown", (event) => {
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] || [0, 0];
      const zoom = { "+": 0.7, "=": 0.7, "-": 1 / 0.7 }[event.key];
      if (dx || dy) {
        event.preventDefault();
        const from = found.points.find((p) => p.id === state.sel);
        const next = from ? nearest(found.points, from, dx, dy) : found.points[0];
        if (next) { go({ sel: next.id }); tell(next); }
      } else if (zoom || event.key === "0") {
        event.preventDefault();
        const change = {};
        for (const name of ["xaxis", "yaxis"]) {
          const [low, high] = place.layout[name].range, half = ((high - low) / 2) * (zoom || 1), middle = (low + high) / 2;
          change[name + ".range"] = zoom ? [middle - half, middle + half] : axis(name === "xaxis" ? trace.x : trace.y).range;
        }
        Plotly.relayout(place, change);
      }
    });
    new ResizeObserver(() => place.offsetWidth && Plotly.Plots.resize(place)).observe(place);
  }

  // Names that do not cover each other at this zoom: the chosen point's, then those of the largest.
  function labels(all, bright, size, layout) {
    const [x, y] = [layout.xaxis.range, layout.yaxis.range].map(([low, high]) => (value) => (value - low) / (high - low));
    const named = new Map();
    for (const p of all.filter(bright).sort((a, b) => (b.id === state.sel) - (a.id === state.sel) || size(b) - size(a))) {
      const at = [x(p.at[0]), y(p.at[1])];
      const free = [...named.values()].every((other) => Math.abs(other[0] - at[0]) > 0.075 || Math.abs(other[1] - at[1]) > 0.035);
      if (free && at.every((value) => value > -0.1 && value < 1.1)) named.set(p.id, at);
    }
    return all.map((p) => (named.has(p.id) ? p.id : ""));
  }

  function nearest(all, from, dx, dy) {
    let best = null, least = Infinity;
    for (const p of all) {
      const x = p.at[0] - from.at[0], y = p.at[1] - from.at[1], along = x * dx + y * dy, across = Math.abs(x * dy - y * dx);
      if (along > 1e-9 && along + 2.5 * across < least) { least = along + 2.5 * across; best = p; }
    }
    return best;
  }

  function searchedNames(kind) {
    const asked = state.q.trim().toLowerCase().split(/\s+/);
    const items = kind === "concepts" ? [...concepts.values()].map((c) => [c.concept, `${c.label} ${c.words} ${c.habits}`]) : [...contexts.values()].map((c) => [c.context, c.words]);
    return items.filter(([name, text]) => asked.every((word) => (NAME.test(word) ? name.toLowerCase() === word : text.toLowerCase().includes(word)))).map(([name]) => name);
  }

  // One pair ------------------------------------------------------------------------------------------------------------------
  function spanText(p, side) {
    const fired = p.sample && state.mark ? p.sample.fired[state.mark]?.[side] : null;
    const box = el("div", { class: "text", dir: "auto" });
    if (p[side] === null) box.append(el("span", { class: "dim" }, "The page was written without the dataset."));
    else if (!fired) {
      box.append(p[side]);
      if (!p.sample && p[side].length >= pairs().cut) box.append(el("span", { class: "dim" }, " … cut here; the dataset has all of it"));
    } else {
      const level = new Map(fired[0].map((token, i) => [token, fired[1][i]]));
      p.sample[side].forEach((text, i) => box.append(level.has(i) ? el("mark", { class: "m" + level.get(i) }, text) : text));
    }
    return box;
  }

  function viewer() {
    const dialog = $("viewer");
    const p = state.pair === "" ? null : pairs().byRow.get(Number(state.pair));
    if (!p) {
      if (dialog.open) dialog.close();
      return;
    }
    const sampled = p.sample ? Object.keys(p.sample.fired) : [];
    const asked = [state.mark, ...state.q.toUpperCase().split(/\s+/), ...state.sel.split("~"), ...p.concepts, ...sampled];
    state.mark = asked.find((name) => sampled.includes(name)) || "";
    const order = listed.key.startsWith("pairs\n") && listed.rows.includes(p) ? listed.rows : pairs().rows;
    const at = order.indexOf(p);
    const step = (by) => order[at + by] && go({ pair: String(order[at + by].row) }, true);
    const chip = (name) => {
      const score = p.strength.get(name);
      const label = [name, score === undefined ? null : el("span", { class: score > 0 ? "rise" : "fall" }, " " + amount(name, score))];
      if (!p.sample || !sampled.includes(name)) return el("span", { class: "chip", title: concepts.get(name)?.label || null }, label);
      return el("button", { type: "button", class: "chip", "aria-pressed": String(state.mark === name), title: concepts.get(name)?.label || null,
        "data-mark": name, click: () => { go({ mark: name }, true); dialog.querySelector(`[data-mark="${name}"]`).focus(); } }, label);
    };
    const names = [...new Set([...p.concepts, ...sampled])];
    const had = dialog.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    dialog.replaceChildren(
      el("div", { class: "viewer-head" },
        el("h2", { id: "viewer-title" }, "Row " + p.row),
        el("span", { class: "dim" }, p.contexts.join(" ")),
        el("span", { class: "space" }),
        el("button", { type: "button", "aria-label": "Previous pair", disabled: at <= 0, click: () => step(-1) }, "←"),
        el("button", { type: "button", "aria-label": "Next pair", disabled: at + 1 >= order.length, click: () => step(1) }, "→"),
        el("button", { type: "button", id: "close-viewer", click: () => dialog.close() }, "Close")),
      el("p", { class: "chips" }, names.map(chip)),
      el("p", { class: "dim" }, p.sample
        ? [state.mark ? ["Marked: tokens on which features of ", state.mark, " ", words(concepts.get(state.mark)?.label), " fire; the stronger the mark, the more of them. Choose another concept above."] : "None of its concepts fires on a single token."].flat()
        : ["Token by token the audit keeps its samples only (the table of pairs says \"marked\"); this pair is shown as plain text."]),
      el("div", { class: "pair" },
        el("div", { class: "prompt" }, el("h4", null, "Prompt"), spanText(p, "prompt")),
        el("div", null, el("h4", null, "Chosen"), spanText(p, "chosen")),
        el("div", null, el("h4", null, "Rejected"), spanText(p, "rejected"))));
    if (!dialog.open) dialog.showModal();
    // What had the focus was replaced; without it the keys would go nowhere.
    const again = had && dialog.querySelector(`[aria-label="${had}"]:not(:disabled)`);
    (again || $("close-viewer")).focus();
    dialog.onkeydown = (event) => {
      if (event.key === "ArrowRight") step(1);
      if (event.key === "ArrowLeft") step(-1);
    };
  }

  // All of it -----------------------------------------------------------------------------------------------------------------
  function render() {
    for (const view of Object.keys(VIEWS)) {
      $("view-" + view).hidden = view !== state.view;
      const tab = $("tab-" + view);
      tab.setAttribute("aria-selected", String(view === state.view));
      tab.tabIndex = view === state.view ? 0 : -1;
    }
    if ($("search").value !== state.q) $("search").value = state.q;
    $("explore").dataset.view = state.view;
    if (state.view === "maps") {
      $("counted").textContent = state.q.trim() ? `${searchedNames("contexts").length} contexts, ${searchedNames("concepts").length} concepts` : "";
      drawMap("contexts");
      drawMap("concepts");
    } else {
      table(state.view);
    }
    detail();
    viewer();
  }

  const tabs = document.querySelector("[role=tablist]");
  Object.entries(VIEWS).forEach(([view, title]) => tabs.append(el("button", {
    type: "button", role: "tab", id: "tab-" + view, "aria-controls": "view-" + view,
    click: () => go({ view, sort: "" }),
    keydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const all = Object.keys(VIEWS), next = all[(all.indexOf(view) + by + all.length) % all.length];
      go({ view: next, sort: "" });
      $("tab-" + next).focus();
    },
  }, title)));
  let typing = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    const q = event.target.value;
    typing = setTimeout(() => go({ q }, true), 120);
  });
  $("viewer").addEventListener("close", () => {
    if (state.pair === "") return;
    const row = state.pair;
    go({ pair: "", mark: "" });
    document.querySelector(`#view-pairs tr[data-id="${Number(row)}"]`)?.focus();
  });
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, dialog")) return;
    if (event.key === "/") { event.preventDefault(); $("explore").scrollIntoView(); $("search").focus(); }
    const view = Object.keys(VIEWS)[Number(event.key) - 1];
    if (view && event.key >= "1") { go({ view, sort: "" }); $("explore").scrollIntoView(); $("tab-" + view).focus({ preventScroll: true }); }
  });
  for (const button of document.querySelectorAll(".open-pair")) {
    button.addEventListener("click", () => go({ pair: button.dataset.row, mark: button.dataset.concept }));
  }
  for (const button of document.querySelectorAll("button.rule")) {
    button.addEventListener("click", () => {
      $("rule").textContent = snippet(button.dataset.concept, "");
      $("rule-name").textContent = button.dataset.concept;
    });
  }
  const restore = () => { if (decode()) { $("explore").scrollIntoView(); render(); } };
  addEventListener("hashchange", restore);
  addEventListener("popstate", restore);
  start();
  drawn.push(() => state.view === "maps" && ["contexts", "concepts"].forEach(drawMap));
  const asked = decode();
  if (asked) $("explore").scrollIntoView();
  // Away from the first screen the maps are drawn when they come near.
  if (asked || !("IntersectionObserver" in window)) render();
  else {
    const seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) { seen.disconnect(); render(); }
    }, { rootMargin: "50px" });
    seen.observe($("explore"));
    detail();
  }
})();
