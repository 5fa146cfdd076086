// One chart: curves over a common x axis, their bands, alarms on the axis, and a crosshair.
"use strict";

const COLORS = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)"];
const HEIGHT = 190;
const MANY_POINTS = 60;
const MIN_SMOOTHED_POINTS = 30; // minimum number of points for a moving average
const MAX_POINTER_DISTANCE = 7;

/** Linear interpolation at `x` between the points (xs, ys), with increasing xs. */
function interpolate(xs, ys, x) {
  if (!xs.length) return x;
  const right = Math.min(Math.max(d3.bisectLeft(xs, x), 1), xs.length - 1);
  if (xs.length === 1) return ys[0];
  const [x0, x1] = [xs[right - 1], xs[right]];
  return x1 === x0
    ? ys[right]
    : ys[right - 1] + ((x - x0) / (x1 - x0)) * (ys[right] - ys[right - 1]);
}

/** A centered moving average over `width` points; non-finite values are left out. */
function movingAverage(values, width) {
  const half = Math.floor(width / 2);
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return NaN;
    return d3.mean(values.slice(Math.max(0, i - half), i + half + 1).filter(Number.isFinite));
  });
}

/**
 * Format of an x axis, for its kind and its maximum: {label, ticks(count) → positions,
 * tick(position) → short text, format(position) → text in a tooltip}.
 */
function xAxis(kind, maximum) {
  const ticks = (count) => d3.ticks(0, maximum, count);
  if (kind === "elapsed") {
    const [unit, name] = maximum > 2 * 3600 ? [3600, "h"] : maximum > 120 ? [60, "min"] : [1, "s"];
    const whole = (count) => d3.ticks(0, maximum / unit, count).map((v) => v * unit);
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
  const steps = (count) => ticks(Math.min(count, maximum)).filter(Number.isInteger);
  return {
    label: "step",
    ticks: steps,
    tick: (v) => (v < 1e4 ? String(v) : compact(v)),
    format: (v) => `step ${plain(Math.round(v), 7)}`,
  };
}

/**
 * A panel with a heading, a legend with tooltips, and the chart.
 *
 * options: {
 *   title, unit,
 *   series: [{title, name, meaning, source, unit, x: [...], y: [...], low?, high?, color?,
 *             secondary?}],
 *   axis: as xAxis returns it, domain: [from, to],
 *   marks: [{x, text, strong}],     alarms on the axis; a strong alarm has a line through the chart
 *   rule: number or null,           horizontal line for comparison
 *   smooth: bool,                   moving average over the faint curve
 * }
 */
function curvePanel(options) {
  const series = options.series.map((curve, i) => ({
    ...curve,
    color: curve.color ?? COLORS[i % COLORS.length],
    y: curve.y.map(numeric),
    points: pointsOf(curve),
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

function pointsOf(curve) {
  const read = (values, i) => (values ? numeric(values[i]) : null);
  return curve.x.map((x, i) => ({
    x,
    y: numeric(curve.y[i]),
    low: read(curve.low, i),
    high: read(curve.high, i),
  }));
}

/** The heading; the title of a single curve is the heading, and there is no legend. */
function caption({ title, unit, series: [only, ...more] }, series) {
  const words = more.length
    ? title
    : withTooltip(el("button", { type: "button", class: "term" }, headingOf(only)), () =>
        meaning(only),
      );
  const endsWithUnit = (more.length ? title : only.title).toLowerCase().endsWith(unit.toLowerCase());
  const shown = unit === "share" ? "%" : endsWithUnit ? "" : unit;
  const heading = el(
    "h4",
    {},
    words,
    shown ? el("span", { class: "unit" }, ` ${oneLine(shown)}`) : null,
  );
  return el("figcaption", {}, heading, more.length ? legend(series) : null);
}

/** A capitalized title; a symbol or the name of an unknown metric is unchanged. */
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
      withTooltip(button, () => meaning(curve)),
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
      ...nonFiniteMarks(series, y),
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
  return addCrosshair(plot, options, scale);
}

/** The marks of one curve: its band, its line, and dots if there are few points. */
function lines(curve, smooth, scale) {
  const at = { x: "x", y: (p) => (Number.isFinite(p.y) ? p.y * scale : NaN), stroke: curve.color };
  const banded = curve.points.filter((p) => p.low !== null && p.high !== null);
  const ends = { x: "x", y1: (p) => p.low * scale, y2: (p) => p.high * scale };
  const averaged = smooth && curve.points.length >= MIN_SMOOTHED_POINTS;
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
      strokeWidth: curve.secondary ? 1 : 1.6,
      strokeOpacity: averaged ? 0.25 : curve.secondary ? 0.6 : 1,
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

/** Crosses at the upper edge for values that are not finite. */
function nonFiniteMarks(series, y) {
  return series.map((curve) => {
    const nonFinite = curve.points.filter((p) => p.y !== null && !Number.isFinite(p.y));
    return nonFinite.length
      ? Plot.dot(nonFinite, { x: "x", y: y[1], symbol: "times", r: 3.5, stroke: curve.color, dy: 4 })
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

// --- Crosshair ----------------------------------------------------------------------------------

/** Show the values of a plot for the pointer and the arrow keys. */
function addCrosshair(plot, options, scale) {
  const { series, title } = options;
  const toX = plot.scale("x");
  const { show, hide } = crosshair(plot, options, scale);
  const positions = d3.sort(new Set(series.flatMap((curve) => curve.x)));
  let current = positions.length - 1;
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) * plot.viewBox.baseVal.width) / box.width;
    current = d3.bisectCenter(positions, toX.invert(pixel));
    show(positions[current], event.clientX, event.clientY);
  };
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
  const step = (event) => {
    if (event.key === "Escape") hide();
    if (!moves[event.key] || !positions.length) return;
    event.preventDefault();
    current = Math.max(0, Math.min(positions.length - 1, current + moves[event.key]));
    const box = plot.getBoundingClientRect();
    show(positions[current], box.left + toX.apply(positions[current]), box.top + HEIGHT / 3);
  };
  const description = series.map((curve) => describeCurve(curve, options.unit)).join("; ");
  plot.setAttribute("tabindex", "0");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${oneLine(title)}: ${description}. Arrow keys show values.`);
  for (const name of ["pointermove", "pointerdown"]) plot.addEventListener(name, nearest);
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, hide);
  plot.addEventListener("keydown", step);
  return plot;
}

/** A vertical line with dots and a tooltip: {show(position, clientX, clientY), hide()}. */
function crosshair(plot, options, scale) {
  const { series, axis, marks = [] } = options;
  const [toX, toY] = [plot.scale("x"), plot.scale("y")];
  const layer = d3.select(plot).append("g").attr("pointer-events", "none").attr("display", "none");
  const line = layer.append("line").attr("stroke", "var(--muted)");
  line.attr("y1", 8).attr("y2", HEIGHT - 26);
  const dots = series.map((curve) =>
    layer.append("circle").attr("r", 3.5).attr("fill", curve.color).attr("stroke", "var(--panel)"),
  );
  const read = (curve, i, position, pixel) => {
    const point = curve.points[d3.bisectCenter(curve.x, position)];
    const near = point && Math.abs(toX.apply(point.x) - pixel) <= MAX_POINTER_DISTANCE;
    dots[i].attr("display", near && Number.isFinite(point.y) ? null : "none");
    if (!near) return null;
    if (Number.isFinite(point.y)) {
      dots[i].attr("cx", toX.apply(point.x)).attr("cy", toY.apply(point.y * scale));
    }
    return valueRow(curve, point, options.unit);
  };
  const show = (position, clientX, clientY) => {
    const pixel = toX.apply(position);
    layer.attr("display", null);
    line.attr("x1", pixel).attr("x2", pixel);
    const rows = series.map((curve, i) => read(curve, i, position, pixel));
    const isNear = (mark) => Math.abs(toX.apply(mark.x) - pixel) <= MAX_POINTER_DISTANCE;
    const near = marks.filter(isNear).slice(0, 3);
    const alarmLines = near.map((m) => el("p", { class: "alarm-text" }, `▲ ${oneLine(m.text, 160)}`));
    const values = el("table", {}, el("tbody", {}, rows));
    const heading = el("p", { class: "faint" }, axis.format(position));
    showTooltip([heading, values, ...alarmLines], clientX, clientY);
  };
  const hide = () => {
    layer.attr("display", "none");
    hideTooltip();
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

function describeCurve(curve, unit) {
  const [first, last] = [curve.points[0], curve.points[curve.points.length - 1]];
  return last
    ? `${oneLine(curve.title)} from ${withUnit(first.y, unit)} to ${withUnit(last.y, unit)}`
    : oneLine(curve.title);
}
