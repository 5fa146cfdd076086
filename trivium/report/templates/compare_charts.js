// Charts of a comparison: quality, reward-KL frontier, quality by cost, credit assignment.
"use strict";

const METHOD_COLORS = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)", "var(--ink)", "var(--muted)"];
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "asterisk"];
const colorOf = (methods, name) => METHOD_COLORS[methods.findIndex((m) => m.name === name) % METHOD_COLORS.length];
const symbolOf = (methods, name) => SYMBOLS[methods.findIndex((m) => m.name === name) % SYMBOLS.length];
const measureOf = (record, name) => ({ value: record[name], low: record[`${name}_low`], high: record[`${name}_high`] });
const PLAIN_STYLE = { background: "none", color: "var(--muted)", fontSize: "12px", overflow: "visible" };

/** An element that redraws its content when its width changes. */
function sized(heightOf, draw) {
  const target = el("div", { class: "chart" });
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(target.clientWidth);
    if (!now || now === width) return;
    width = now;
    target.replaceChildren(draw(width, heightOf(width)));
  }).observe(target);
  return target;
}

function methodLegend(methods) {
  return el("ul", { class: "legend" }, methods.map((method) =>
    el("li", {},
      el("i", { class: "swatch", style: { "--color": colorOf(methods, method.name) } }),
      oneLine(method.name, 60))));
}

/** Short, unique names for an axis of methods. */
function shortNames(names, width) {
  const maximum = width < 500 ? 16 : 34;
  const seen = new Map();
  return new Map(names.map((name) => {
    let short = oneLine(name, maximum);
    while (seen.has(short)) short = `${short}′`;
    seen.set(short, true);
    return [name, short];
  }));
}

function qualityChart(methods, bases, unit, width, height) {
  const scale = unit === "share" ? 100 : 1;
  const decoding = state.decoding;
  const sorted = d3.sort(methods, (m) => -m[decoding].mean);
  const short = shortNames(sorted.map((m) => m.name), width);
  const seeds = sorted.flatMap((m) => (m.runs.length > 1 ? m.runs.map((run) => ({ method: m, value: run.final[decoding] })) : []));
  const spread = (m) => d3.extent([m[decoding].low, m[decoding].high, ...m.runs.map((run) => run.final[decoding])].filter((x) => x !== null));
  const range = (m) => d3.extent(m.runs, (run) => run.final[decoding]);
  const bounded = sorted.filter((m) => m[decoding].low !== null);
  const base = d3.mean(Object.values(bases), (b) => b[decoding]);
  const left = width < 500 ? 118 : 230;
  const plot = Plot.plot({
    width, height, marginLeft: left, marginRight: width < 500 ? 18 : 60, marginTop: 10, marginBottom: 30,
    style: PLAIN_STYLE,
    x: { label: null, nice: true },
    y: { label: null, domain: sorted.map((m) => short.get(m.name)) },
    marks: [
      Plot.gridX({ ticks: 5, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.axisX({ ticks: width < 500 ? 4 : 6, tickSize: 0, tickFormat: (v) => `${plain(v)}${unit === "share" ? " %" : ""}`, color: "var(--muted)" }),
      Plot.axisY({ tickSize: 0, color: "var(--ink)" }),
      Plot.ruleX([base * scale], { stroke: "var(--muted)", strokeDasharray: "3,3" }),
      Plot.ruleY(sorted, { y: (m) => short.get(m.name), x1: (m) => range(m)[0] * scale, x2: (m) => range(m)[1] * scale, stroke: (m) => colorOf(methods, m.name), strokeWidth: 1, strokeOpacity: 0.6 }),
      Plot.ruleY(bounded, { y: (m) => short.get(m.name), x1: (m) => m[decoding].low * scale, x2: (m) => m[decoding].high * scale, stroke: (m) => colorOf(methods, m.name), strokeWidth: 2.5, strokeOpacity: 0.45 }),
      Plot.dot(seeds, { x: (d) => d.value * scale, y: (d) => short.get(d.method.name), r: 2.5, fill: (d) => colorOf(methods, d.method.name), fillOpacity: 0.45 }),
      Plot.dot(sorted, { x: (m) => m[decoding].mean * scale, y: (m) => short.get(m.name), r: 5, symbol: (m) => symbolOf(methods, m.name), fill: (m) => colorOf(methods, m.name) }),
      width < 500 ? null : Plot.text(sorted, { x: (m) => spread(m)[1] * scale, y: (m) => short.get(m.name), text: (m) => percent(m[decoding].mean, unit), dx: 8, textAnchor: "start", fill: "var(--ink)" }),
    ],
    color: { type: "identity" },
    symbol: { type: "identity" },
  });
  return withLabel(plot, `Quality: ${sorted.map((m) => `${oneLine(m.name)} ${withUnit(m[decoding].mean, unit)}`).join("; ")}; the base ${withUnit(base, unit)}`);
}

// --- Frontier -----------------------------------------------------------------------------------

/** Final points of a method: the mean of its main runs, and one point for each varied value. */
function finalPoints(method) {
  const main = method.runs.filter((run) => run.final.kl !== null);
  const point = (final, text) => ({ method: method.name, kl: final.kl, y: final.sampled, low: final.sampled_low, high: final.sampled_high, text });
  const found = method.varied.filter((run) => run.final.kl !== null).map((run) => point(run.final, `${run.setting.split(".").at(-1)} ${JSON.stringify(run.value)}`));
  if (main.length) {
    const mean = (name) => d3.mean(main, (run) => run.final[name]);
    found.push({ ...point({ kl: mean("kl"), sampled: mean("sampled"), sampled_low: null, sampled_high: null }, method.best_of ? `best of ${method.best_of}` : "as configured"), main: true, bound: Boolean(method.best_of) });
  }
  return d3.sort(found, (p) => p.kl);
}

function frontierChart(methods, bases, unit, width, height) {
  const scale = unit === "share" ? 100 : 1;
  const points = methods.flatMap(finalPoints);
  const base = { method: null, kl: 0, y: d3.mean(Object.values(bases), (b) => b.sampled), text: "the base" };
  const trails = methods.flatMap((method) => method.runs.flatMap((run) =>
    run.curve.filter((p) => p.kl !== null).map((p) => ({ method: method.name, run: `${method.name} ${run.seed}`, kl: p.kl, y: p.sampled }))));
  const curves = points.filter((p) => methods.find((m) => m.name === p.method).varied.length);
  const stroke = (p) => colorOf(methods, p.method);
  const plot = Plot.plot({
    width, height, marginLeft: 52, marginRight: 24, marginTop: 14, marginBottom: 40,
    style: PLAIN_STYLE,
    x: { label: "KL to the base (nats per response)", nice: true, labelAnchor: "center", labelArrow: "none" },
    y: { label: null, nice: true },
    marks: [
      Plot.gridY({ ticks: 5, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.axisX({ ticks: width < 500 ? 4 : 8, tickSize: 0, color: "var(--muted)", label: "KL to the base (nats per response)", labelAnchor: "center", labelArrow: "none" }),
      Plot.axisY({ ticks: 5, tickSize: 0, tickFormat: (v) => `${plain(v)}${unit === "share" ? " %" : ""}`, color: "var(--muted)", label: null }),
      Plot.line(trails, { x: "kl", y: (p) => p.y * scale, z: "run", stroke, strokeOpacity: 0.25, strokeWidth: 1.2 }),
      Plot.line(curves, { x: "kl", y: (p) => p.y * scale, z: "method", stroke, strokeWidth: 1.6 }),
      Plot.ruleX(points.filter((p) => p.low !== null), { x: "kl", y1: (p) => p.low * scale, y2: (p) => p.high * scale, stroke, strokeOpacity: 0.3 }),
      Plot.dot([base], { x: "kl", y: (p) => p.y * scale, r: 4, fill: "var(--muted)" }),
      Plot.dot(points.filter((p) => !p.bound), { x: "kl", y: (p) => p.y * scale, r: (p) => (p.main ? 5.5 : 3.5), symbol: (p) => symbolOf(methods, p.method), fill: stroke }),
      Plot.dot(points.filter((p) => p.bound), { x: "kl", y: (p) => p.y * scale, r: 5.5, symbol: (p) => symbolOf(methods, p.method), stroke, strokeWidth: 1.8 }),
    ],
    r: { type: "identity" },
    color: { type: "identity" },
    symbol: { type: "identity" },
  });
  return addPointTooltips(plot, [base, ...points], (p) => p.kl, (p) => p.y * scale, (p) => [
    el("strong", {}, p.method === null ? p.text : `${oneLine(p.method, 60)}: ${oneLine(p.text, 60)}`),
    el("p", {}, `KL ${plain(p.kl)}${p.bound ? " (bound)" : ""}, sampled quality ${withUnit(p.y, unit)}`),
  ], "Sampled quality against KL to the base");
}

// --- Cost ---------------------------------------------------------------------------------------

/** A method's curve over a currency, averaged over seeds at each evaluation. */
function costSeries(method, currency, decoding) {
  const length = d3.min(method.runs, (run) => run.curve.length) ?? 0;
  const x = [], y = [], low = [], high = [];
  for (let i = 0; i < length; i++) {
    const points = method.runs.map((run) => run.curve[i]);
    const values = points.map((p) => p[decoding]).filter((v) => v !== null);
    if (!values.length) continue;
    x.push(d3.mean(points, (p) => p[currency]));
    y.push(d3.mean(values));
    low.push(method.runs.length > 1 ? d3.min(values) : points[0][`${decoding}_low`]);
    high.push(method.runs.length > 1 ? d3.max(values) : points[0][`${decoding}_high`]);
  }
  return { x, y, low, high };
}

function costChart(methods, unit, currency, label) {
  const series = methods.filter((method) => method.runs.some((run) => run.curve.length)).map((method) => ({
    title: method.name, name: method.name, meaning: `${oneLine(method.name)}, ${state.decoding}`, source: "", unit,
    color: colorOf(methods, method.name), ...costSeries(method, currency, state.decoding),
  }));
  const maximum = d3.max(series, (s) => d3.max(s.x)) || 1;
  const ticks = (n) => d3.ticks(0, maximum, n);
  const axis = {
    label: label,
    ticks,
    tick: (v) => (v < 1000 ? plain(v) : compact(v)),
    format: (v) => `${plain(v)} ${label}`,
  };
  const panel = curvePanel({ title: `Quality, ${state.decoding}, by ${label}`, unit, series, axis, domain: [0, maximum], smooth: false });
  panel.classList.add("tall");
  return panel;
}

// --- Credit -------------------------------------------------------------------------------------

function creditChart(credit, methods, width, height) {
  const sorted = d3.sort(credit, (c) => -c.snr);
  const short = shortNames(sorted.map((c) => c.method), width);
  const left = width < 500 ? 118 : 230;
  const plot = Plot.plot({
    width, height, marginLeft: left, marginRight: 30, marginTop: 10, marginBottom: 30,
    style: PLAIN_STYLE,
    x: { label: null, nice: true, zero: true },
    y: { label: null, domain: sorted.map((c) => short.get(c.method)) },
    marks: [
      Plot.gridX({ ticks: 5, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.axisX({ ticks: width < 500 ? 4 : 6, tickSize: 0, color: "var(--muted)" }),
      Plot.axisY({ tickSize: 0, color: "var(--ink)" }),
      Plot.ruleX([0], { stroke: "var(--muted)" }),
      Plot.ruleY(sorted, { y: (c) => short.get(c.method), x1: "snr_low", x2: "snr_high", stroke: (c) => colorOf(methods, c.method), strokeWidth: 2.5, strokeOpacity: 0.45 }),
      Plot.dot(sorted, { x: "snr", y: (c) => short.get(c.method), r: 5, symbol: (c) => symbolOf(methods, c.method), fill: (c) => colorOf(methods, c.method) }),
    ],
    color: { type: "identity" },
    symbol: { type: "identity" },
  });
  return withLabel(plot, `Signal-to-noise: ${sorted.map((c) => `${oneLine(c.method)} ${plain(c.snr)}`).join("; ")}`);
}

// --- Tooltips and labels ------------------------------------------------------------------------

function withLabel(plot, label) {
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", label);
  return plot;
}

/** Show the tooltip of the point nearest to the pointer; arrow keys move between points. */
function addPointTooltips(plot, points, xOf, yOf, tooltip, label) {
  const position = (p) => [plot.scale("x").apply(xOf(p)), plot.scale("y").apply(yOf(p))];
  const show = (p) => {
    const box = plot.getBoundingClientRect();
    const [x, y] = position(p);
    showTooltip(tooltip(p), box.left + x, box.top + y);
  };
  let current = -1;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const distance = (p) => Math.hypot(position(p)[0] - (event.clientX - box.left), position(p)[1] - (event.clientY - box.top));
    const nearest = d3.least(points, distance);
    if (nearest && distance(nearest) < 24) show(nearest);
    else hideTooltip();
  });
  plot.addEventListener("pointerleave", hideTooltip);
  plot.addEventListener("blur", hideTooltip);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    current = Math.max(0, Math.min(points.length - 1, current + move));
    show(points[current]);
  });
  plot.setAttribute("tabindex", "0");
  return withLabel(plot, `${label}. Arrow keys move between points.`);
}
