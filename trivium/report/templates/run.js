// The report of one run: what came of it, its alarms, curves, evaluations, cost, samples, settings.
"use strict";

const METHODS = { grpo: "GRPO", ppo: "PPO", dpo: "DPO", sft: "supervised fine-tuning", "reward-model": "reward model" };
const AXES = { step: "step", elapsed: "time", generated: "generated tokens", trained: "trained tokens" };
const state = { x: "step", smooth: false, open: {} };

// --- Outcome ------------------------------------------------------------------------------------

const outcomePart = {
  id: "outcome",
  title: "Outcome",
  data: ({ headline, name, written, axes }) => ({ headline, name, written, reached: axes.step.at(-1) }),
  build: ({ headline, name, written }) =>
    el("section", { id: "outcome", "aria-labelledby": "outcome-title" },
      el("p", { class: "kicker" }, kicker(headline)),
      el("h1", { id: "outcome-title" }, oneLine(name, 120)),
      el("p", { class: "lead" }, outcome(headline)),
      el("p", { class: "note" }, stateOf(headline, written)),
      el("dl", { class: "tiles" }, tiles(headline))),
};

function kicker(headline) {
  const method = METHODS[headline.kind] ?? oneLine(headline.kind, 40);
  const from = headline.base === null ? "" : ` from ${oneLine(headline.base, 160)}`;
  return `${method}${from}`;
}

function outcome({ quality, training }) {
  if (quality && quality.first) {
    const [from, to] = [plain(quality.first.value), plain(quality.last.value)];
    const how = `(${quality.drawn}${quality.n ? `, ${count(quality.n, "prompt")}` : ""})`;
    if (quality.change === "unclear") return `Held-out reward shows no clear change: ${from} at first, ${to} at last ${how}.`;
    return `Held-out reward ${quality.change} from ${from} to ${to} ${how}.`;
  }
  if (quality) return `Held-out reward is ${plain(quality.last.value)} at step ${quality.last.step} (${quality.drawn}); it was measured once, so there is no change to tell.`;
  if (training && training.first !== null) return `${training.name} went from ${plain(training.first)} to ${plain(training.last)} in training; nothing was measured on held-out prompts.`;
  return "Nothing was measured yet.";
}

function stateOf(headline, written) {
  const at = headline.step === null ? "before the first step" : `step ${headline.step}${headline.steps ? ` of ${headline.steps}` : ""}`;
  const words = {
    finished: `Finished at ${at}.`,
    stopped: `Stopped at ${at}${headline.state.reason ? `: ${oneLine(headline.state.reason, 300)}` : "."}`,
    open: `Still running, or broken off: ${at}.`,
  }[headline.state.kind];
  const started = headline.started ? ` Started ${date(headline.started)}` : "";
  return `${words}${started}; this page is of ${date(written)}.`;
}

function tiles(headline) {
  const { quality, win_rate: won, kl, length, alarms } = headline;
  const tile = (name, value, detail, alert = false) =>
    el("div", { class: alert ? "tile alert" : "tile" }, el("dt", {}, name), el("dd", {}, el("span", { class: "value" }, value), detail ? el("span", { class: "detail" }, detail) : null));
  const range = (m) => (m.low === null ? null : `95 %: ${plain(m.low)} to ${plain(m.high)}`);
  const share = (m) => (m.low === null ? null : `95 %: ${plain(m.low * 100)} to ${plain(m.high * 100)} %`);
  return [
    quality ? tile("Held-out reward", plain(quality.last.value), [range(quality.last), quality.first ? `at first ${interval(quality.first)}` : null].filter(Boolean).join(" · ")) : null,
    won ? tile("Win rate against the base", withUnit(won.value, "share"), share(won)) : null,
    kl ? tile("KL to the reference", `${plain(kl.value)} nats`, range(kl) ?? "per response") : null,
    length ? tile("Response length", `${plain(length.last)} tokens`, length.first === null ? null : `at first ${plain(length.first)} (${relative(length)})`) : null,
    tile("Alarms", alarms ? String(alarms) : "none", alarms ? "see below" : null, alarms > 0),
    headline.seconds === null ? null : tile("Time", duration(headline.seconds), headline.flops ? `${plain(headline.flops)} FLOPs` : null),
    headline.generated || headline.trained ? tile("Tokens", plain(headline.generated || headline.trained), tokenWords(headline)) : null,
  ];
}

function relative({ first, last }) {
  if (!first) return "was 0";
  const change = (100 * (last - first)) / Math.abs(first);
  return `${Math.abs(change) < 0.5 ? "±0" : signed(change, 2)} %`;
}

function tokenWords({ generated, trained }) {
  if (generated && trained) return `generated · ${plain(trained)} trained`;
  return generated ? "generated" : "trained";
}

// --- Alarms and events --------------------------------------------------------------------------

const alarmsPart = {
  id: "alarms",
  title: "Alarms",
  data: ({ alarms, events }) => ({ alarms, events }),
  build: ({ alarms, events }) => {
    const groups = d3.groups(alarms.shown, (alarm) => `${alarm.monitor}\n${alarm.metric}`);
    const note = alarms.shown.length < alarms.total ? `the first and last ${alarms.shown.length} of ${alarms.total}` : null;
    return section("alarms", "Alarms", note,
      groups.length ? el("ol", { class: "alarms" }, groups.map(([, group]) => alarm(group))) : el("p", { class: "quiet" }, "No monitor spoke up."),
      events.shown.length ? folded(state, "events", `Other events (${events.total})`, eventTable(events)) : null);
  },
};

/** One monitor's alarms: the first in full, and when it came again. */
function alarm(group) {
  const [first] = group;
  const steps = group.map((one) => one.step).filter((step) => step !== undefined);
  const again = steps.length > 1 ? ` and again at ${steps.slice(1, 9).join(", ")}${steps.length > 9 ? ` and ${steps.length - 9} more` : ""}` : "";
  const said = (name, text) => (text ? [el("dt", {}, name), el("dd", {}, visible(String(text)))] : null);
  return el("li", {},
    el("h3", {}, el("span", { class: "sign", "aria-hidden": "true" }, "▲"), oneLine(first.monitor ?? "alarm", 80).replaceAll("_", " "),
      group.some((one) => one.stops) ? el("span", { class: "chip" }, "stopped the run") : null,
      el("span", { class: "note" }, `step ${steps[0] ?? "–"}${again}`)),
    el("dl", {}, said("Seen", first.seen ?? first.message), said("Why it matters", first.why), said("What to try", first.remedy)));
}

function eventTable(events) {
  const known = new Set(["time", "kind", "message"]);
  const rest = (event) => Object.entries(event).filter(([name]) => !known.has(name)).map(([name, value]) => `${name} ${typeof value === "number" ? plain(value) : oneLine(typeof value === "string" ? value : JSON.stringify(value), 200)}`);
  const note = events.shown.length < events.total ? el("p", { class: "note" }, `The first and last ${events.shown.length} are shown.`) : null;
  return [note, table("Events", [
    { title: "time", text: true, cell: (event) => date(event.time) },
    { title: "event", text: true, cell: (event) => oneLine(event.kind ?? "–", 60).replaceAll("_", " ") },
    { title: "what", text: true, cell: (event) => [oneLine(event.message ?? "", 300), ...rest(event).map((fact) => oneLine(fact, 240))].filter(Boolean).join(" · ") },
  ], events.shown)];
}

// --- Curves -------------------------------------------------------------------------------------

const curvesPart = {
  id: "curves",
  title: "Curves",
  data: ({ axes, held_out, curves, alarms, thinned }) => (curves.length || held_out.length ? { axes, held_out, curves, alarms: alarms.shown, thinned } : null),
  build: (slice, page, redraw) => {
    const kinds = Object.entries(AXES).filter(([kind]) => slice.axes[kind]);
    if (!slice.axes[state.x]) state.x = "step";
    const choose = (kind) => ((state.x = kind), redraw());
    const smooth = el("input", { type: "checkbox", checked: state.smooth, "data-key": "smooth", onchange: (event) => ((state.smooth = event.target.checked), redraw()) });
    const held = heldOut(slice);
    return section("curves", "Curves", slice.thinned ? `of up to ${slice.thinned.toLocaleString("en")} steps; each stretch keeps its smallest and largest value` : null,
      el("div", { class: "controls" }, choice("x", "Horizontal axis", kinds, state.x, choose), el("label", { class: "check" }, smooth, "moving average")),
      held.length ? [el("h3", { class: "group" }, "On held-out prompts"), el("div", { class: "grid" }, held.map((chart) => draw(chart, slice)))] : null,
      slice.curves.length ? [el("h3", { class: "group" }, "In training"), el("div", { class: "grid" }, slice.curves.map((chart) => draw(chart, slice)))] : null);
  },
};

/** The held-out charts, with the training reward beside the held-out one. */
function heldOut({ held_out: charts, curves }) {
  const reward = curves.flatMap((chart) => chart.series).find((curve) => curve.name === "reward/mean");
  return charts.map((chart) => (chart.panel === "Quality" && reward ? { ...chart, series: [...chart.series, { ...reward, title: "training reward", dashed: true, colour: "var(--muted)" }] } : chart));
}

function draw(chart, { axes, alarms }) {
  const place = (step) => along(axes.step, axes[state.x], step);
  const most = axes[state.x].at(-1) ?? 1;
  const names = new Set(chart.series.map((curve) => curve.name));
  const marks = alarms.filter((one) => Number.isFinite(one.step)).map((one) => ({ x: place(one.step), text: `${one.monitor ?? "alarm"}: ${one.seen ?? one.message ?? ""}`, strong: names.has(one.metric) }));
  return curvePanel({
    title: chart.panel,
    unit: chart.unit,
    series: chart.series.map((curve) => ({ ...curve, x: curve.steps.map(place), y: curve.values })),
    axis: xAxis(state.x, most),
    domain: [0, most || 1],
    marks,
    rule: chart.panel === "Win rate" ? 0.5 : null,
    smooth: state.smooth,
  });
}

// --- Evaluations --------------------------------------------------------------------------------

const evaluationPart = {
  id: "evaluation",
  title: "Evaluation",
  data: ({ evaluation }) => (evaluation.rows.length ? evaluation : null),
  build: ({ columns, rows }) => {
    const measured = (column) => ({
      title: column.title.replace("held-out reward, ", ""),
      hint: () => meaning(column),
      cell: (row) => interval({ value: row[column.name] ?? null, low: row[`${column.name}_low`], high: row[`${column.name}_high`] }, column.unit),
    });
    return section("evaluation", "Evaluation", "on held-out prompts; 95 % intervals in brackets",
      table("Evaluations on held-out prompts", [
        { title: "step", cell: (row) => String(row.step) },
        { title: "time", cell: (row) => (row.elapsed === undefined ? "–" : duration(row.elapsed)) },
        { title: "prompts", cell: (row) => plain(row.n ?? null, 6) },
        ...columns.map(measured),
      ], rows));
  },
};

// --- Cost ---------------------------------------------------------------------------------------

const STAGES = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)"];

const costPart = {
  id: "cost",
  title: "Cost",
  data: ({ cost }) => cost,
  build: (cost) => {
    const total = d3.sum(cost.stages, (stage) => stage.seconds);
    const stages = cost.stages.map((stage, i) => ({ ...stage, share: total ? stage.seconds / total : 0, colour: i === cost.stages.length - 1 ? "var(--rest)" : STAGES[i % STAGES.length] }));
    const flops = cost.flops ? ` · ${plain(cost.flops)} FLOPs, ${plain(cost.flops / total)} a second` : "";
    return section("cost", "Cost by stage", `${duration(total)} in steps${flops}`,
      el("div", { class: "split" },
        el("div", {}, shareBar(stages), stageTable(stages, total, cost)),
        stackedPanel(cost, stages)));
  },
};

function shareBar(stages) {
  const part = (stage) => el("i", { style: { "flex-grow": String(stage.share), background: stage.colour } });
  return el("div", { class: "share-bar", role: "img", "aria-label": stages.map((s) => `${s.name} ${withUnit(s.share, "share")}`).join(", ") }, stages.filter((s) => s.share > 0).map(part));
}

function stageTable(stages, total, cost) {
  const named = (stage) => [el("i", { class: "swatch", style: { "--colour": stage.colour } }), hint(el("button", { type: "button", class: "term" }, stage.name), () => [el("strong", {}, stage.name), el("p", {}, stage.meaning)])];
  const sum = { name: "all", seconds: total, share: 1, tokens: null, all: true };
  return table("Time by stage", [
    { title: "stage", text: true, cell: (stage) => (stage.all ? "all" : named(stage)) },
    { title: "time", cell: (stage) => duration(stage.seconds) },
    { title: "share", cell: (stage) => withUnit(stage.share, "share", 2) },
    { title: "tokens/s", cell: (stage) => (stage.tokens && stage.seconds ? plain(stage.tokens / stage.seconds) : stage.all && cost.trained ? plain(cost.trained / total) : "–") },
  ], [...stages.filter((stage) => stage.seconds > 0), sum]);
}

function stackedPanel(cost, stages) {
  const bars = cost.bins.flatMap((bin) => {
    const sum = d3.sum(bin.seconds) || 1;
    let from = 0;
    return bin.seconds.map((seconds, i) => ({ bin, colour: stages[i].colour, y1: from, y2: (from += (100 * seconds) / sum) }));
  });
  const target = el("div", { class: "chart" });
  const figure = el("figure", { class: "panel" }, el("figcaption", {}, el("h4", {}, "Share of a step's time", el("span", { class: "unit" }, " %"))), target);
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
  const plot = Plot.plot({
    width, height: 200, marginLeft: 46, marginRight: 10, marginTop: 8, marginBottom: 26,
    style: { background: "none", color: "var(--muted)", fontSize: "11px", overflow: "visible" },
    x: { label: null, domain: [bars[0].bin.first - 1, bars.at(-1).bin.last] },
    y: { label: null, domain: [0, 100] },
    marks: [
      Plot.rect(bars, { x1: (b) => b.bin.first - 1, x2: (b) => b.bin.last, y1: "y1", y2: "y2", fill: "colour", insetLeft: 0.25, insetRight: 0.25 }),
      Plot.axisY({ ticks: 4, tickSize: 0, color: "var(--muted)" }),
      Plot.axisX({ ticks: Math.min(6, bars.at(-1).bin.last), tickSize: 0, tickFormat: xAxis("step").tick, color: "var(--muted)" }),
    ],
  });
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", "Share of each stage over the steps; the table holds the totals");
  const bins = [...new Set(bars.map((bar) => bar.bin))];
  plot.addEventListener("pointermove", (event) => {
    const step = plot.scale("x").invert(event.clientX - plot.getBoundingClientRect().left);
    const bin = bins.find((one) => step <= one.last) ?? bins.at(-1);
    const sum = d3.sum(bin.seconds) || 1;
    const line = (stage, i) => el("tr", {}, el("td", {}, el("i", { class: "swatch", style: { "--colour": stage.colour } }), stage.name), el("td", { class: "number" }, withUnit(bin.seconds[i] / sum, "share", 2)), el("td", { class: "number" }, duration(bin.seconds[i])));
    const steps = bin.first === bin.last ? `step ${bin.first}` : `steps ${bin.first} to ${bin.last}`;
    showTip([el("p", { class: "faint" }, steps), el("table", {}, el("tbody", {}, stages.map(line)))], event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", hideTip);
  return plot;
}

// --- Settings -----------------------------------------------------------------------------------

const configurationPart = {
  id: "configuration",
  title: "Configuration",
  data: ({ config, run }) => ({ config, run }),
  build: ({ config, run }) => {
    const left = config.characters > config.text.length ? el("p", { class: "note" }, `The first ${config.text.length.toLocaleString("en")} of ${config.characters.toLocaleString("en")} characters; all of it is in config.yaml.`) : null;
    const packages = Object.entries(run.packages ?? {}).map(([name, version]) => [name, version ?? "not installed"]);
    const facts = [...packages, ["Python", run.python], ["platform", run.platform], ["started", run.started]];
    const rows = facts.filter(([, value]) => value !== undefined && value !== null);
    return section("configuration", "Configuration and versions", null,
      config.text ? folded(state, "config", "config.yaml, defaults included", el("pre", {}, visible(config.text)), left) : el("p", { class: "quiet" }, "The run has no config.yaml."),
      el("dl", { class: "versions" }, rows.map(([name, value]) => el("div", {}, el("dt", {}, oneLine(name, 60)), el("dd", {}, oneLine(value, 160))))));
  },
};

start([outcomePart, alarmsPart, curvesPart, evaluationPart, costPart, samplesPart, configurationPart]);
