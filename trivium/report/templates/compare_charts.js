// The charts of a comparison: quality, the reward-KL frontier, quality by cost, credit.
"use strict";

const ROAD_COLORS = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)", "var(--ink)", "var(--muted)"];
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "asterisk"];
const colorOf = (methods, name) => ROAD_COLORS[methods.findIndex((r) => r.name === name) % ROAD_COLORS.length];
const symbolOf = (methods, name) => SYMBOLS[methods.findIndex((r) => r.name === name) % SYMBOLS.length];
const measureOf = (record, name) => ({ value: record[name], low: record[`${name}_low`], high: record[`${name}_high`] });
const PLAIN_STYLE = { background: "none", color: "var(--muted)", fontSize: "12px", overflow: "visible" };

/** A place that draws itself whenever its width is known or changes. */
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

/** Short names for an axis of methods, kept apart. */
function shortNames(names, width) {
  const most = width < 500 ? 16 : 34;
  const seen = new Map();
  return new Map(names.map((name) => {
    let short = oneLine(name, most);
    while (seen.has(short)) short = `${short}′`;
    seen.set(short, true);
    return [name, short];
  }));
}

function qualityChart(methods, bases, unit, width, height) {
  const scale = unit === "share" ? 100 : 1;
  const drawn = state.drawn;
  const sorted = d3.sort(methods, (r) => -r[drawn].mean);
  const short = shortNames(sorted.map((r) => r.name), width);
  const seeds = sorted.flatMap((r) => (r.runs.length > 1 ? r.runs.map((run) => ({ method: r, value: run.final[drawn] })) : []));
  const base = d3.mean(Object.values(bases), (b) => b[drawn]);
  const left = width < 500 ? 118 : 230;
  const plot = Plot.plot({
    width, height, marginLeft: left, marginRight: width < 500 ? 18 : 60, marginTop: 10, marginBottom: 30,
    style: PLAIN_STYLE,
    x: { label: null, nice: true },
    y: { label: null, domain: sorted.map((r) => short.get(r.name)) },
    marks: [
      Plot.gridX({ ticks: 5, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.axisX({ ticks: width < 500 ? 4 : 6, tickSize: 0, tickFormat: (v) => `${plain(v)}${unit === "share" ? " %" : ""}`, color: "var(--muted)" }),
      Plot.axisY({ tickSize: 0, color: "var(--ink)" }),
      Plot.ruleX([base * scale], { stroke: "var(--muted)", strokeDasharray: "3,3" }),
      Plot.ruleY(sorted, { y: (r) => short.get(r.name), x1: (r) => r[drawn].low * scale, x2: (r) => r[drawn].high * scale, stroke: (r) => colorOf(methods, r.name), strokeWidth: 2.5, strokeOpacity: 0.45 }),
      Plot.dot(seeds, { x: (d) => d.value * scale, y: (d) => short.get(d.method.name), r: 2.5, fill: (d) => colorOf(methods, d.method.name), fillOpacity: 0.45 }),
      Plot.dot(sorted, { x: (r) => r[drawn].mean * scale, y: (r) => short.get(r.name), r: 5, symbol: (r) => symbolOf(methods, r.name), fill: (r) => colorOf(methods, r.name) }),
      width < 500 ? null : Plot.text(sorted, { x: (r) => r[drawn].high * scale, y: (r) => short.get(r.name), text: (r) => percent(r[drawn].mean, unit), dx: 8, textAnchor: "start", fill: "var(--ink)" }),
    ],
    color: { type: "identity" },
    symbol: { type: "identity" },
  });
  return described(plot, `Quality: ${sorted.map((r) => `${oneLine(r.name)} ${withUnit(r[drawn].mean, unit)}`).join("; ")}; the base ${withUnit(base, unit)}`);
}

// --- Frontier -----------------------------------------------------------------------------------

/** Where a method's runs ended: the main runs' mean, and one point for each varied value. */
function endsOfMethod(method) {
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
  const ends = methods.flatMap(endsOfMethod);
  const base = { method: null, kl: 0, y: d3.mean(Object.values(bases), (b) => b.sampled), text: "the base" };
  const trails = methods.flatMap((method) => method.runs.flatMap((run) =>
    run.curve.filter((p) => p.kl !== null).map((p) => ({ method: method.name, run: `${method.name} ${run.seed}`, kl: p.kl, y: p.sampled }))));
  const curves = ends.filter((p) => methods.find((r) => r.name === p.method).varied.length);
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
      Plot.ruleX(ends.filter((p) => p.low !== null), { x: "kl", y1: (p) => p.low * scale, y2: (p) => p.high * scale, stroke, strokeOpacity: 0.3 }),
      Plot.dot([base], { x: "kl", y: (p) => p.y * scale, r: 4, fill: "var(--muted)" }),
      Plot.dot(ends.filter((p) => !p.bound), { x: "kl", y: (p) => p.y * scale, r: (p) => (p.main ? 5.5 : 3.5), symbol: (p) => symbolOf(methods, p.method), fill: stroke }),
      Plot.dot(ends.filter((p) => p.bound), { x: "kl", y: (p) => p.y * scale, r: 5.5, symbol: (p) => symbolOf(methods, p.method), stroke, strokeWidth: 1.8 }),
    ],
    r: { type: "identity" },
    color: { type: "identity" },
    symbol: { type: "identity" },
  });
  return readable(plot, [base, ...ends], (p) => p.kl, (p) => p.y * scale, (p) => [
    el("strong", {}, p.method === null ? p.text : `${oneLine(p.method, 60)}: ${oneLine(p.text, 60)}`),
    el("p", {}, `KL ${plain(p.kl)}${p.bound ? " (bound)" : ""}, sampled quality ${withUnit(p.y, unit)}`),
  ], "Sampled quality against KL to the base");
}

// --- Cost ---------------------------------------------------------------------------------------

/** A method's curve over a currency: seeds averaged evaluation by evaluation. */
function costSeries(method, currency, drawn) {
  const length = d3.min(method.runs, (run) => run.curve.length) ?? 0;
  const x = [], y = [], low = [], high = [];
  for (let i = 0; i < length; i++) {
    const points = method.runs.map((run) => run.curve[i]);
    const values = points.map((p) => p[drawn]).filter((v) => v !== null);
    if (!values.length) continue;
    x.push(d3.mean(points, (p) => p[currency]));
    y.push(d3.mean(values));
    low.push(method.runs.length > 1 ? d3.min(values) : points[0][`${drawn}_low`]);
    high.push(method.runs.length > 1 ? d3.max(values) : points[0][`${drawn}_high`]);
  }
  return { x, y, low, high };
}

function costChart(methods, unit, currency, words) {
  const series = methods.filter((method) => method.runs.some((run) => run.curve.length)).map((method) => ({
    title: method.name, name: method.name, meaning: `${oneLine(method.name)}, ${state.drawn}`, source: "", unit,
    color: colorOf(methods, method.name), ...costSeries(method, currency, state.drawn),
  }));
  const most = d3.max(series, (s) => d3.max(s.x)) || 1;
  const ticks = (n) => d3.ticks(0, most, n);
  const axis = {
    label: words,
    ticks,
    tick: (v) => (v < 1000 ? plain(v) : compact(v)),
    format: (v) => `${plain(v)} ${words}`,
  };
  const panel = curvePanel({ title: `Quality, ${state.drawn}, by ${words}`, unit, series, axis, domain: [0, most], smooth: false });
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
  return described(plot, `Signal-to-noise: ${sorted.map((c) => `${oneLine(c.method)} ${plain(c.snr)}`).join("; ")}`);
}

// --- Reading ------------------------------------------------------------------------------------

function described(plot, words) {
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", words);
  return plot;
}

/** Let the pointer read the nearest point, and arrow keys go from point to point. */
function readable(plot, points, xOf, yOf, tell, words) {
  const place = (p) => [plot.scale("x").apply(xOf(p)), plot.scale("y").apply(yOf(p))];
  const show = (p) => {
    const box = plot.getBoundingClientRect();
    const [x, y] = place(p);
    showTip(tell(p), box.left + x, box.top + y);
  };
  let current = -1;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const distance = (p) => Math.hypot(place(p)[0] - (event.clientX - box.left), place(p)[1] - (event.clientY - box.top));
    const nearest = d3.least(points, distance);
    if (nearest && distance(nearest) < 24) show(nearest);
    else hideTip();
  });
  plot.addEventListener("pointerleave", hideTip);
  plot.addEventListener("blur", hideTip);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    current = Math.max(0, Math.min(points.length - 1, current + move));
    show(points[current]);
  });
  plot.setAttribute("tabindex", "0");
  return described(plot, `${words}. Arrow keys go from point to point.`);
}
