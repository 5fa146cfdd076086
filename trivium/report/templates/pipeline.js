// Report of a pipeline: its stages in one table, and the course of each.
"use strict";

const state = { x: "step", smooth: false, open: {} };
const STATES = {
  finished: "finished",
  changed: "to run again",
  stopped: "stopped",
  new: "not run yet",
};

const overviewSection = {
  id: "stages",
  title: "Stages",
  data: ({ title, seed, directory, written, stages }) => ({
    title, seed, directory, written, stages: stages.map(({ curves, held_out, axes, ...rest }) => rest),
  }),
  build: ({ title, seed, directory, written, stages }) => {
    const done = stages.filter((stage) => stage.state === "finished").length;
    const seconds = d3.sum(stages, (stage) => stage.seconds);
    return el(
      "section",
      { id: "stages", "aria-labelledby": "stages-title" },
      el("p", { class: "kicker" }, `${oneLine(directory, 160)} · seed ${seed}`),
      el("h1", { id: "stages-title" }, oneLine(title, 120)),
      el("p", { class: "lead" }, outcome(stages)),
      el("p", { class: "note" },
        `${done} of ${count(stages.length, "stage")} finished, ${duration(seconds)}; this page was written ${date(written)}.`),
      stageTable(stages),
    );
  },
};

/** The first and the last measured quality of the stages. */
function outcome(stages) {
  const measured = stages.filter((stage) => stage.evaluation);
  if (!measured.length) return "Nothing was measured on held-out prompts yet.";
  const [first, last] = [measured[0], measured.at(-1)];
  const quality = (stage) => interval(measureOf(stage.evaluation, "greedy"));
  if (first === last) return `Held-out reward after ${oneLine(first.name, 40)}: ${quality(first)} (greedy).`;
  return `Held-out reward: ${quality(first)} after ${oneLine(first.name, 40)}, ${quality(last)} after ${oneLine(last.name, 40)} (greedy, with 95 % intervals).`;
}

const measureOf = (record, name) => ({
  value: record[name], low: record[`${name}_low`], high: record[`${name}_high`],
});

function stageTable(stages) {
  const measure = (name) => (stage) => stage.evaluation ? interval(measureOf(stage.evaluation, name)) : "–";
  const spent = (currency) => (stage) => stage.spent[currency] ? plain(stage.spent[currency]) : "–";
  return table(
    "Stages",
    [
      { title: "stage", text: true, cell: (s) => s.report
          ? el("a", { href: s.report }, oneLine(s.name, 40)) : oneLine(s.name, 40) },
      { title: "command", text: true, cell: (s) => oneLine(s.command, 40) },
      { title: "uses", text: true, cell: (s) => oneLine(s.uses.join(", ") || "–", 120) },
      { title: "learns from", text: true, cell: (s) => oneLine(s.signal, 160) },
      { title: "state", text: true, cell: (s) => STATES[s.state] ?? oneLine(s.state) },
      { title: "time", cell: (s) => (s.seconds ? duration(s.seconds) : "–") },
      { title: "steps", cell: (s) => (s.steps === null ? "–" : s.steps.toLocaleString("en")) },
      { title: "held-out reward, greedy", cell: measure("greedy") },
      { title: "sampled", cell: measure("sampled") },
      { title: "KL", cell: measure("kl") },
      { title: "length", cell: measure("length") },
      { title: "generated tokens", cell: spent("generated_tokens") },
      { title: "trained tokens", cell: spent("trained_tokens") },
      { title: "FLOPs", cell: spent("flops") },
      { title: "alarms", cell: (s) => String(s.alarms.length) },
    ],
    stages,
  );
}

const detailsSection = {
  id: "course",
  title: "Course",
  data: ({ stages }) => ({ stages }),
  build: ({ stages }, page, redraw) => section("course", "Course of every stage", null, stages.map(details)),
};

function details(stage) {
  const known = Object.entries(stage.hyperparameters).filter(([, value]) => value !== null);
  const words = known.map(([name, value]) => `${name} ${typeof value === "number" ? plain(value) : value}`);
  const counts = Object.entries(stage.counts).map(([name, number]) => `${number.toLocaleString("en")} ${name}`);
  const facts = [stage.advantage, stage.sampling === "none" ? null : stage.sampling, ...words, ...counts];
  const slice = { axes: stage.axes, alarms: stage.alarms };
  const grid = (charts) => el("div", { class: "grid" }, charts.map((chart) => draw(chart, slice)));
  return [
    el("h3", { class: "group" }, `${oneLine(stage.name, 60)}: ${oneLine(stage.signal, 160)}`),
    el("p", { class: "note" }, oneLine(facts.filter(Boolean).join(", ") || "defaults", 600)),
    el("p", { class: "note" }, `configuration: ${oneLine(stage.config, 80)}; output: ${oneLine(stage.product, 120)}`),
    stage.alarms.map((alarm) =>
      el("p", { class: "quiet" }, `▲ ${oneLine(alarm.monitor ?? "alarm", 60)}, step ${alarm.step ?? "–"}: ${oneLine(alarm.seen ?? alarm.message ?? "", 240)}`)),
    stage.held_out.length ? grid(stage.held_out) : null,
    stage.curves.length
      ? folded(state, `curves-${stage.name}`, `Curves of ${oneLine(stage.name, 60)} in training`, grid(stage.curves))
      : null,
  ];
}

start([overviewSection, detailsSection]);
