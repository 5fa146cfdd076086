// Curves of a run: on held-out prompts and in training, by step, time or tokens.
"use strict";

const AXES = {
  step: "step",
  elapsed: "time",
  generated: "generated tokens",
  trained: "trained tokens",
};

const curvesSection = {
  id: "curves",
  title: "Curves",
  data: ({ axes, held_out, curves, alarms, thinned }) =>
    curves.length || held_out.length
      ? { axes, held_out, curves, alarms: alarms.shown, thinned }
      : null,
  build: (slice, page, redraw) => {
    const kinds = Object.entries(AXES).filter(([kind]) => slice.axes[kind]);
    if (!slice.axes[state.x]) state.x = "step";
    const choose = (kind) => ((state.x = kind), redraw());
    const smooth = el("input", {
      type: "checkbox",
      checked: state.smooth,
      "data-key": "smooth",
      onchange: (event) => ((state.smooth = event.target.checked), redraw()),
    });
    const heldOutCharts = heldOut(slice);
    const { label } = xAxis(state.x, slice.axes[state.x].at(-1));
    const long = slice.curves.some((chart) =>
      chart.series.some((curve) => curve.steps.length >= MIN_SMOOTHED_POINTS),
    );
    return section(
      "curves",
      "Curves",
      slice.thinned
        ? `of up to ${slice.thinned.toLocaleString("en")} steps; each interval keeps its smallest and largest value`
        : null,
      el(
        "div",
        { class: "controls" },
        choice("x", "Horizontal axis", kinds, state.x, choose),
        long ? el("label", { class: "check" }, smooth, "moving average") : null,
      ),
      heldOutCharts.length
        ? [
            el("h3", { class: "group" }, `On held-out prompts, by ${label}`),
            el(
              "div",
              { class: "grid" },
              heldOutCharts.map((chart) => draw(chart, slice)),
            ),
          ]
        : null,
      slice.curves.length
        ? [
            el("h3", { class: "group" }, `In training, by ${label}`),
            el(
              "div",
              { class: "grid" },
              slice.curves.map((chart) => draw(chart, slice)),
            ),
          ]
        : null,
    );
  },
};

/** Held-out charts; the chart of the held-out reward also has the training reward. */
function heldOut({ held_out: charts, curves }) {
  const reward = curves
    .flatMap((chart) => chart.series)
    .find((curve) => curve.name === "reward/mean");
  return charts.map((chart) =>
    chart.panel === "Quality" && reward
      ? {
          ...chart,
          series: [
            ...chart.series,
            { ...reward, title: "training reward", secondary: true, color: "var(--muted)" },
          ],
        }
      : chart,
  );
}

function draw(chart, { axes, alarms }) {
  const position = (step) => interpolate(axes.step, axes[state.x], step);
  const maximum = axes[state.x].at(-1) ?? 1;
  const names = new Set(chart.series.map((curve) => curve.name));
  const marks = alarms
    .filter((alarm) => Number.isFinite(alarm.step))
    .map((alarm) => ({
      x: position(alarm.step),
      text: `${alarm.monitor ?? "alarm"}: ${alarm.seen ?? alarm.message ?? ""}`,
      strong: names.has(alarm.metric),
    }));
  return curvePanel({
    title: chart.panel,
    unit: chart.unit,
    series: chart.series.map((curve) => ({ ...curve, x: curve.steps.map(position), y: curve.values })),
    axis: xAxis(state.x, maximum),
    domain: [0, maximum || 1],
    marks,
    rule: chart.panel === "Win rate" ? 0.5 : null,
    smooth: state.smooth,
  });
}
