// Time of a run by stage, in total and over the steps.
"use strict";

const STAGES = {
  rollout: "var(--c1)",
  scoring: "var(--c2)",
  "log-probs": "var(--c3)",
  update: "var(--c4)",
};

const costSection = {
  id: "cost",
  title: "Cost",
  data: ({ cost }) => cost,
  build: (cost) => {
    const total = d3.sum(cost.stages, (stage) => stage.seconds);
    const stages = cost.stages.map((stage) => ({
      ...stage,
      share: total ? stage.seconds / total : 0,
      color: STAGES[stage.name] ?? "var(--rest)",
    }));
    const flops = cost.flops
      ? ` · ${plain(cost.flops)} FLOPs, ${plain(cost.flops / total)} a second`
      : "";
    return section(
      "cost",
      "Cost by stage",
      `${duration(total)} in steps${flops}`,
      el(
        "div",
        { class: "split" },
        el("div", {}, shareBar(stages), stageTable(stages, total, cost)),
        stackedPanel(cost, stages),
      ),
    );
  },
};

function shareBar(stages) {
  const part = (stage) =>
    el("i", { style: { "flex-grow": String(stage.share), background: stage.color } });
  return el(
    "div",
    {
      class: "share-bar",
      role: "img",
      "aria-label": stages.map((s) => `${s.name} ${withUnit(s.share, "share")}`).join(", "),
    },
    stages.filter((s) => s.share > 0).map(part),
  );
}

function stageTable(stages, total, cost) {
  const stageName = (stage) => [
    el("i", { class: "swatch", style: { "--color": stage.color } }),
    withTooltip(el("button", { type: "button", class: "term" }, stage.name), () => [
      el("strong", {}, stage.name),
      el("p", {}, stage.meaning),
    ]),
  ];
  const sum = { name: "all", seconds: total, share: 1, tokens: null, all: true };
  return table(
    "Time by stage",
    [
      { title: "stage", text: true, cell: (stage) => (stage.all ? "all" : stageName(stage)) },
      { title: "time", cell: (stage) => duration(stage.seconds) },
      { title: "share", cell: (stage) => withUnit(stage.share, "share", 2) },
      {
        title: "tokens/s",
        cell: (stage) =>
          stage.tokens && stage.seconds
            ? plain(stage.tokens / stage.seconds)
            : stage.all && cost.trained
              ? plain(cost.trained / total)
              : "–",
      },
    ],
    [...stages.filter((stage) => stage.seconds > 0), sum],
  );
}

function stackedPanel(cost, stages) {
  const bars = cost.bins.flatMap((bin) => {
    const sum = d3.sum(bin.seconds) || 1;
    let from = 0;
    return bin.seconds.map((seconds, i) => ({
      bin,
      color: stages[i].color,
      y1: from,
      y2: (from += (100 * seconds) / sum),
    }));
  });
  const target = el("div", { class: "chart" });
  const figure = el(
    "figure",
    { class: "panel" },
    el(
      "figcaption",
      {},
      el("h4", {}, "Share of a step's time", el("span", { class: "unit" }, " %")),
    ),
    target,
  );
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(target.clientWidth);
    if (!now || now === width) return;
    width = now;
    target.replaceChildren(stacked(bars, stages, width));
  }).observe(target);
  return figure;
}

function stacked(bars, stages, width) {
  const axis = xAxis("step", bars.at(-1).bin.last);
  const plot = Plot.plot({
    width,
    height: 200,
    marginLeft: 46,
    marginRight: 10,
    marginTop: 8,
    marginBottom: 26,
    style: { background: "none", color: "var(--muted)", fontSize: "11px", overflow: "visible" },
    x: { label: null, domain: [bars[0].bin.first - 1, bars.at(-1).bin.last] },
    y: { label: null, domain: [0, 100] },
    color: { type: "identity" },
    marks: [
      Plot.rect(bars, {
        x1: (b) => b.bin.first - 1,
        x2: (b) => b.bin.last,
        y1: "y1",
        y2: "y2",
        fill: "color",
        fillOpacity: 0.85,
        shapeRendering: "crispEdges",
      }),
      Plot.axisY({ ticks: 4, tickSize: 0, color: "var(--muted)" }),
      Plot.axisX({
        ticks: axis.ticks(6),
        tickSize: 0,
        tickFormat: axis.tick,
        color: "var(--muted)",
      }),
    ],
  });
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", "Share of each stage over the steps; the table has the totals");
  const bins = [...new Set(bars.map((bar) => bar.bin))];
  plot.addEventListener("pointermove", (event) => {
    const step = plot.scale("x").invert(event.clientX - plot.getBoundingClientRect().left);
    const bin = bins.find((candidate) => step <= candidate.last) ?? bins.at(-1);
    const sum = d3.sum(bin.seconds) || 1;
    const line = (stage, i) =>
      el(
        "tr",
        {},
        el("td", {}, el("i", { class: "swatch", style: { "--color": stage.color } }), stage.name),
        el("td", { class: "number" }, withUnit(bin.seconds[i] / sum, "share", 2)),
        el("td", { class: "number" }, duration(bin.seconds[i])),
      );
    const steps =
      bin.first === bin.last ? `step ${bin.first}` : `steps ${bin.first} to ${bin.last}`;
    showTooltip(
      [el("p", { class: "faint" }, steps), el("table", {}, el("tbody", {}, stages.map(line)))],
      event.clientX,
      event.clientY,
    );
  });
  plot.addEventListener("pointerleave", hideTooltip);
  return plot;
}
