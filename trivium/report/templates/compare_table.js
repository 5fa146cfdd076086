// Comparison table: one column per method.
"use strict";

const tableSection = {
  id: "table",
  title: "Table",
  data: ({ methods, unit, bases }) => ({ methods, unit, bases }),
  build: ({ methods, unit, bases }) =>
    section("table", "Comparison of the methods", "measured, or read from the configurations",
      sideBySide(methods, unit, bases)),
};

function sideBySide(methods, unit, bases) {
  const baseLength = d3.mean(Object.values(bases), (b) => b.length);
  const over = (method, value) => d3.mean(method.runs, value);
  const rows = [
    ["Pipeline", (m) => (m.best_of ? `best of ${m.best_of} of the base` : steps(m.stages, (s) => oneLine(s.name, 40)))],
    ["Signal", (m) => (m.best_of ? "the training reward, at inference" : steps(m.stages, (s) => oneLine(s.signal, 160)))],
    ["Sampling", (m) => (m.best_of ? `${m.best_of} per prompt` : steps(m.stages, (s) => oneLine(s.sampling, 80)))],
    ["Advantage", (m) => lastOf(m, (s) => oneLine(s.advantage ?? "none", 160))],
    ["Standard deviation of the advantage", (m) => advantageStd(m)],
    ["Settings", (m) => steps(m.stages, settings)],
    ["Models and memory", (m) => memory(m)],
    ["Time per stage", (m) => steps(m.stages, (s) => `${oneLine(s.name, 40)} ${duration(s.spent.seconds)}`)],
    ["Generated tokens", (m) => (m.best_of ? `${plain(over(m, (run) => run.tokens_per_prompt))} per prompt` : plain(over(m, (run) => run.spent.generated_tokens)))],
    ["Trained tokens", (m) => plain(over(m, (run) => run.spent.trained_tokens))],
    ["FLOPs", (m) => plain(over(m, (run) => run.spent.flops))],
    ["Quality, greedy", (m) => interval(meanInterval(m.greedy), unit)],
    ["Quality, sampled", (m) => interval(meanInterval(m.sampled), unit)],
    ["Win rate against the base", (m) => winRate(m)],
    ["KL to the base", (m) => plain(over(m, (run) => run.final.kl ?? NaN)) + (m.best_of ? " (bound)" : "")],
    ["Length", (m) => `${plain(over(m, (run) => run.final.length))} (${signed(over(m, (run) => run.final.length) - baseLength, 2)})`],
    ["Alarms", (m) => alarms(m)],
    ["Runs", (m) => m.runs.map((run) => el("div", { class: "faint" }, run.path === null ? "–" : oneLine(run.path, 120)))],
  ];
  const columns = [
    { title: "", text: true, cell: ([name]) => el("strong", {}, name) },
    ...methods.map((method) => ({ title: oneLine(method.name, 60), text: true, cell: ([, value]) => value(method) })),
  ];
  const grid = table("Comparison of the methods", columns, rows);
  grid.classList.add("wide");
  return grid;
}

const meanInterval = ({ mean, low, high }) => ({ value: mean, low, high });
const steps = (stages, text) => stages.map((stage) => el("div", {}, text(stage)));
const lastOf = (method, text) => (method.stages.length ? text(method.stages.at(-1)) : "–");

function advantageStd(method) {
  const known = method.runs.map((run) => run.training["advantage/std"]).filter(Boolean);
  if (!known.length) return "–";
  return `${plain(d3.mean(known, (k) => k.first))} → ${plain(d3.mean(known, (k) => k.last))}`;
}

function settings(stage) {
  const known = Object.entries(stage.hyperparameters).filter(([, value]) => value !== null);
  const words = known.map(([name, value]) => `${name} ${typeof value === "number" ? plain(value) : value}`);
  return `${oneLine(stage.name, 40)}: ${oneLine(words.join(", ") || "defaults", 400)}`;
}

function winRate(method) {
  const mean = d3.mean(method.runs, (run) => run.win_rate.mean);
  if (method.runs.length > 1) return withUnit(mean, "share");
  const { low, high } = method.runs[0].win_rate;
  return interval({ value: mean, low, high }, "share");
}

function alarms(method) {
  const raised = method.runs.flatMap((run) => run.alarms.map((alarm) => oneLine(alarm.monitor, 40)));
  if (!raised.length) return "none";
  const counted = d3.rollups(raised, (all) => all.length, (name) => name);
  return counted.map(([name, times]) => el("div", { class: "alarm-text" }, `${name}${times > 1 ? ` × ${times}` : ""}`));
}

// --- Memory -------------------------------------------------------------------------------------

const KINDS = ["parameters", "gradients", "optimizer", "activations", "cache"];

/** For every stage: the measured and the predicted peak, and the models at the predicted peak. */
function memory(method) {
  const known = method.stages.filter((stage) => stage.memory);
  if (!known.length) return method.best_of ? "the base" : "not measured";
  return known.map((stage) => {
    const { predicted, predicted_bytes, measured_bytes, reason } = stage.memory;
    const lines = [el("div", {}, `${oneLine(stage.name, 40)}: ${bytes(measured_bytes)} measured` +
      (predicted ? `, ${bytes(predicted_bytes)} predicted` : `; not predicted: ${oneLine(reason ?? "", 120)}`))];
    if (!predicted) return lines;
    const total = (s) => d3.sum(s.models, (m) => d3.sum(KINDS, (kind) => m[kind]));
    const peak = d3.greatest(predicted.stages, total);
    return [...lines, ...peak.models.map((model) => {
      const parts = KINDS.filter((kind) => model[kind] > 0).map((kind) => `${kind} ${bytes(model[kind])}`);
      return el("div", { class: "faint" }, `${oneLine(model.role, 40)}: ${parts.join(", ")}`);
    })];
  });
}

function bytes(size) {
  const mebi = size / 1048576;
  return mebi < 1024 ? `${plain(mebi)} MiB` : `${plain(mebi / 1024)} GiB`;
}
