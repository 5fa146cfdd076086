// One chart: curves over a common x, their bands, alarms on the axis, and a reader's hair line.
"use strict";

const COLORS = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)"];
const HEIGHT = 190;
const MANY_POINTS = 60;
const SMOOTHED = 30; // points from which on a moving average is drawn
const NEAR = 7;

/** The number at `x` on the line through (xs, ys), which rises in xs. */
function along(xs, ys, x) {
  if (!xs.length) return x;
  const right = Math.min(Math.max(d3.bisectLeft(xs, x), 1), xs.length - 1);
  if (xs.length === 1) return ys[0];
  const [x0, x1] = [xs[right - 1], xs[right]];
  return x1 === x0
    ? ys[right]
    : ys[right - 1] + ((x - x0) / (x1 - x0)) * (ys[right] - ys[right - 1]);
}

/** A centered moving average over `width` points, of the finite ones among them. */
function movingAverage(values, width) {
  const half = Math.floor(width / 2);
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return NaN;
    return d3.mean(values.slice(Math.max(0, i - half), i + half + 1).filter(Number.isFinite));
  });
}

/**
 * How an axis of x is written, for a kind and the largest value on it: {label, ticks(count) → places,
 * tick(place) → its short text, format(place) → its text in a hint}.
 */
function xAxis(kind, most) {
  const ticks = (count) => d3.ticks(0, most, count);
  if (kind === "elapsed") {
    const [unit, name] = most > 2 * 3600 ? [3600, "h"] : most > 120 ? [60, "min"] : [1, "s"];
    const whole = (count) => d3.ticks(0, most / unit, count).map((v) => v * unit);
    return {
      label: `time (${name})`,
      ticks: whole,
      tick: (v) => plain(v / unit),
      format: duration,
    };
  }
  const tokens = { generated: "generated tokens", trained: "trained tokens" }[kind];
  if (tokens)
    return {
      label: tokens,
      ticks,
      tick: (v) => (v < 1000 ? plain(v) : compact(v)),
      format: (v) => `${plain(v)} ${tokens}`,
    };
  const steps = (count) => ticks(Math.min(count, most)).filter(Number.isInteger);
  return {
    label: "step",
    ticks: steps,
    tick: (v) => (v < 1e4 ? String(v) : compact(v)),
    format: (v) => `step ${plain(Math.round(v), 7)}`,
  };
}

/**
 * A panel with a heading, a legend whose entries explain themselves, and the chart.
 *
 * options: {
 *   title, unit,
 *   series: [{title, name, meaning, source, unit, x: [...], y: [...], low?, high?, color?, quiet?}],
 *   axis: as xAxis returns it, domain: [from, to],
 *   marks: [{x, text, strong}],     alarms on the axis; a strong one has a line through the chart
 *   rule: number or null,           a level to compare with
 *   smooth: bool,                   a moving average over the faint curve
 * }
 */
function curvePanel(options) {
  const series = options.series.map((curve, i) => ({
    ...curve,
    color: curve.color ?? COLORS[i % COLORS.length],
    y: curve.y.map(numeric),
    points: readPoints(curve),
  }));
  const figure = el(
    "figure",
    { class: "panel" },
    caption(options, series),
    el("div", { class: "chart" }),
  );
  const target = figure.lastChild;
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(target.clientWidth);
    if (!now || now === width) return;
    width = now;
    target.replaceChildren(curves({ ...options, series }, width));
  }).observe(target);
  return figure;
}

function readPoints(curve) {
  const read = (values, i) => (values ? numeric(values[i]) : null);
  return curve.x.map((x, i) => ({
    x,
    y: numeric(curve.y[i]),
    low: read(curve.low, i),
    high: read(curve.high, i),
  }));
}

/** The heading; a single curve needs no legend, its title is the heading and explains itself. */
function caption({ title, unit, series: [only, ...more] }, series) {
  const words = more.length
    ? title
    : hint(el("button", { type: "button", class: "term" }, headingOf(only)), () => meaning(only));
  const told = (more.length ? title : only.title).toLowerCase().endsWith(unit.toLowerCase());
  const shown = unit === "share" ? "%" : told ? "" : unit;
  const heading = el(
    "h4",
    {},
    words,
    shown ? el("span", { class: "unit" }, ` ${oneLine(shown)}`) : null,
  );
  return el("figcaption", {}, heading, more.length ? legend(series) : null);
}

/** A title with a capital; a symbol, or the bare name of an unknown number, stays as it is. */
function headingOf({ title, meaning: known }) {
  const line = oneLine(title, 60);
  return line.startsWith("log ") || !known ? line : line.charAt(0).toUpperCase() + line.slice(1);
}

function legend(series) {
  const entry = (curve) => {
    const sample = el("i", { class: "line", style: { "--color": curve.color } });
    const button = el(
      "button",
      { type: "button", class: "term" },
      sample,
      oneLine(curve.title, 48),
    );
    return el(
      "li",
      {},
      hint(button, () => meaning(curve)),
    );
  };
  return el("ul", { class: "legend" }, series.map(entry));
}

function curves(options, width) {
  const { series, axis, domain, marks = [], rule = null } = options;
  const scale = options.unit === "share" ? 100 : 1;
  const y = yDomain(series, rule, scale);
  const plot = Plot.plot({
    width,
    height: HEIGHT,
    marginLeft: 46,
    marginRight: 10,
    marginTop: 8,
    marginBottom: 26,
    style: { background: "none", color: "var(--muted)", fontSize: "11px", overflow: "visible" },
    x: { domain, label: null },
    y: { domain: y, label: null },
    marks: [
      Plot.gridY({ ticks: 4, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.axisY({ ticks: 4, tickSize: 0, tickFormat: (v) => plain(v), color: "var(--muted)" }),
      Plot.axisX({
        ticks: axis.ticks(Math.max(2, Math.min(6, Math.floor(width / 80)))),
        tickSize: 0,
        tickFormat: axis.tick,
        color: "var(--muted)",
      }),
      rule === null
        ? null
        : Plot.ruleY([rule * scale], { stroke: "var(--muted)", strokeDasharray: "2,3" }),
      Plot.ruleX(
        marks.filter((m) => m.strong).map((m) => m.x),
        { stroke: "var(--alarm)", strokeWidth: 1, strokeDasharray: "3,3" },
      ),
      ...series.flatMap((curve) => lines(curve, options.smooth, scale)),
      ...brokenPoints(series, y),
      Plot.dot(marks, {
        x: "x",
        y: y[0],
        symbol: "triangle",
        r: 4,
        fill: "var(--alarm)",
        stroke: "var(--panel)",
        strokeWidth: 1,
        dy: -3,
      }),
    ],
  });
  return hairline(plot, options, scale);
}

/** The marks of one curve: its band, its line, and dots where there are few. */
function lines(curve, smooth, scale) {
  const at = { x: "x", y: (p) => (Number.isFinite(p.y) ? p.y * scale : NaN), stroke: curve.color };
  const banded = curve.points.filter((p) => p.low !== null && p.high !== null);
  const ends = { x: "x", y1: (p) => p.low * scale, y2: (p) => p.high * scale };
  const averaged = smooth && curve.points.length >= SMOOTHED;
  const width = 2 * Math.floor(Math.max(5, curve.points.length / 30) / 2) + 1;
  const mean = averaged
    ? movingAverage(
        curve.points.map((p) => p.y),
        width,
      ).map((v, i) => ({ x: curve.points[i].x, y: v }))
    : [];
  const few = curve.points.length <= MANY_POINTS;
  return [
    banded.length > 1
      ? Plot.areaY(banded, { ...ends, fill: curve.color, fillOpacity: 0.13 })
      : null,
    banded.length === 1
      ? Plot.ruleX(banded, { ...ends, stroke: curve.color, strokeWidth: 2, strokeOpacity: 0.45 })
      : null,
    Plot.line(curve.points, {
      ...at,
      strokeWidth: curve.quiet ? 1 : 1.6,
      strokeOpacity: averaged ? 0.25 : curve.quiet ? 0.6 : 1,
      strokeLinejoin: "round",
    }),
    averaged ? Plot.line(mean, { ...at, strokeWidth: 1.8 }) : null,
    few && !averaged
      ? Plot.dot(curve.points, {
          ...at,
          r: curve.points.length === 1 ? 3.5 : 1.8,
          fill: curve.color,
          stroke: null,
        })
      : null,
  ];
}

/** Crosses at the upper edge, where a number is not finite. */
function brokenPoints(series, y) {
  return series.map((curve) => {
    const broken = curve.points.filter((p) => p.y !== null && !Number.isFinite(p.y));
    return broken.length
      ? Plot.dot(broken, { x: "x", y: y[1], symbol: "times", r: 3.5, stroke: curve.color, dy: 4 })
      : null;
  });
}

function yDomain(series, rule, scale) {
  const values = series.flatMap((curve) => curve.points.flatMap((p) => [p.y, p.low, p.high]));
  const finite = values.filter((v) => v !== null && Number.isFinite(v));
  let [low, high] = d3.extent([...finite, ...(rule === null ? [] : [rule])]);
  if (low === undefined) [low, high] = [0, 1];
  if (low === high)
    [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(low) / 10];
  const room = 0.06 * (high - low);
  const [bottom, top] = [
    low >= 0 && low < 0.6 * high ? 0 : low - room,
    high <= 0 && high > 0.6 * low ? 0 : high + room,
  ];
  return [bottom * scale, top * scale];
}

// --- Reading values off -------------------------------------------------------------------------

/** Let pointer and arrow keys read values off a plot. */
function hairline(plot, options, scale) {
  const { series, title } = options;
  const toX = plot.scale("x");
  const { show, hide } = reader(plot, options, scale);
  const places = d3.sort(new Set(series.flatMap((curve) => curve.x)));
  let current = places.length - 1;
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) * plot.viewBox.baseVal.width) / box.width;
    current = d3.bisectCenter(places, toX.invert(pixel));
    show(places[current], event.clientX, event.clientY);
  };
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
  const step = (event) => {
    if (event.key === "Escape") hide();
    if (!moves[event.key] || !places.length) return;
    event.preventDefault();
    current = Math.max(0, Math.min(places.length - 1, current + moves[event.key]));
    const box = plot.getBoundingClientRect();
    show(places[current], box.left + toX.apply(places[current]), box.top + HEIGHT / 3);
  };
  const told = series.map((curve) => spoken(curve, options.unit)).join("; ");
  plot.setAttribute("tabindex", "0");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${oneLine(title)}: ${told}. Arrow keys read values.`);
  for (const name of ["pointermove", "pointerdown"]) plot.addEventListener(name, nearest);
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, hide);
  plot.addEventListener("keydown", step);
  return plot;
}

/** The hair line with its dots and hint: {show(place, clientX, clientY), hide()}. */
function reader(plot, options, scale) {
  const { series, axis, marks = [] } = options;
  const [toX, toY] = [plot.scale("x"), plot.scale("y")];
  const layer = d3.select(plot).append("g").attr("pointer-events", "none").attr("display", "none");
  const line = layer.append("line").attr("stroke", "var(--muted)");
  line.attr("y1", 8).attr("y2", HEIGHT - 26);
  const dots = series.map((curve) =>
    layer.append("circle").attr("r", 3.5).attr("fill", curve.color).attr("stroke", "var(--panel)"),
  );
  const read = (curve, i, place, pixel) => {
    const point = curve.points[d3.bisectCenter(curve.x, place)];
    const near = point && Math.abs(toX.apply(point.x) - pixel) <= NEAR;
    dots[i].attr("display", near && Number.isFinite(point.y) ? null : "none");
    if (!near) return null;
    if (Number.isFinite(point.y)) {
      dots[i].attr("cx", toX.apply(point.x)).attr("cy", toY.apply(point.y * scale));
    }
    return valueRow(curve, point, options.unit);
  };
  const show = (place, clientX, clientY) => {
    const pixel = toX.apply(place);
    layer.attr("display", null);
    line.attr("x1", pixel).attr("x2", pixel);
    const rows = series.map((curve, i) => read(curve, i, place, pixel));
    const near = marks.filter((mark) => Math.abs(toX.apply(mark.x) - pixel) <= NEAR).slice(0, 3);
    const told = near.map((m) => el("p", { class: "alarm-text" }, `▲ ${oneLine(m.text, 160)}`));
    const values = el("table", {}, el("tbody", {}, rows));
    showTip([el("p", { class: "faint" }, axis.format(place)), values, ...told], clientX, clientY);
  };
  const hide = () => {
    layer.attr("display", "none");
    hideTip();
  };
  return { show, hide };
}

function valueRow(curve, point, unit) {
  const measure = { value: point.y, low: point.low, high: point.high };
  const value = point.low === null ? withUnit(point.y, unit, 4) : interval(measure, unit);
  return el(
    "tr",
    {},
    el(
      "td",
      {},
      el("i", { class: "line", style: { "--color": curve.color } }),
      oneLine(curve.title, 40),
    ),
    el("td", { class: "number" }, value),
  );
}

function spoken(curve, unit) {
  const [first, last] = [curve.points[0], curve.points[curve.points.length - 1]];
  return last
    ? `${oneLine(curve.title)} from ${withUnit(first.y, unit)} to ${withUnit(last.y, unit)}`
    : oneLine(curve.title);
}
