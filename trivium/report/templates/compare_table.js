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

/** Groups of rows as tables with the same columns; below quality, rows equal for all methods are folded. */
function sideBySide(methods, unit, bases) {
  const quality = qualityRows(methods, unit, bases);
  const groups = [
    ["Quality", quality],
    ["Cost", COST_ROWS],
    ["How each method learns", LEARNING_ROWS],
    ["Settings of the last stage", settingRows(methods)],
  ];
  const equal = [];
  const tables = groups.map(([title, rows]) => {
    const differing = rows === quality ? rows : rows.filter((row) => !isEqual(row, methods, equal));
    return differing.length ? [el("h3", { class: "group" }, title), methodTable(title, methods, differing)] : null;
  });
  return [
    tables,
    equal.length
      ? folded(state, "equal", `${count(equal.length, "row")} equal for all methods`,
          table("Equal for all methods", [
            { title: "", text: true, cell: ([name]) => el("strong", {}, name) },
            { title: "all methods", text: true, cell: ([, value]) => value(methods[0]) },
          ], equal))
      : null,
    folded(state, "stages", "Memory, earlier stages and runs", methodTable("Memory, earlier stages and runs", methods, [
      ["Models and memory", (m) => memory(m)],
      ["Settings of earlier stages", (m) => steps(m.stages.slice(0, -1), settings)],
      ["Runs", (m) => m.runs.map((run) => el("div", { class: "faint" }, run.path === null ? "–" : oneLine(run.path, 120)))],
    ])),
  ];
}

/** Whether all methods have the same cell; such a row is added to `equal`. */
function isEqual(row, methods, equal) {
  const [first, ...others] = methods.map((method) => el("div", {}, row[1](method)).textContent);
  const same = others.length > 0 && others.every((text) => text === first);
  if (same) equal.push(row);
  return same;
}

function methodTable(caption, methods, rows) {
  const columns = [
    { title: "", text: true, cell: ([name]) => el("strong", {}, name) },
    ...methods.map((method) => ({ title: oneLine(method.name, 60), text: true, cell: ([, value]) => value(method) })),
  ];
  const grid = table(caption, columns, rows);
  grid.classList.add("wide");
  grid.style.setProperty("--columns", methods.length);
  return grid;
}

const over = (method, value) => d3.mean(method.runs, value);

function qualityRows(methods, unit, bases) {
  const baseLength = d3.mean(Object.values(bases), (b) => b.length);
  return [
    ["Quality, greedy", (m) => interval(meanInterval(m.greedy), unit)],
    ["Quality, sampled", (m) => interval(meanInterval(m.sampled), unit)],
    ...(methods[0].runs.length > 1
      ? [["Greedy quality of each seed", (m) => m.runs.map((run) => withUnit(run.final.greedy, unit)).join(", ")]]
      : []),
    ["Win rate against the base", (m) => winRate(m)],
    ["KL to the base", (m) => plain(over(m, (run) => run.final.kl ?? NaN)) + (m.best_of ? " (bound)" : "")],
    ["Length", (m) => `${plain(over(m, (run) => run.final.length))} (${signed(over(m, (run) => run.final.length) - baseLength, 2)})`],
    ["Alarms", (m) => alarms(m)],
  ];
}

const COST_ROWS = [
  ["Training time", (m) => (m.best_of ? "–" : duration(over(m, (run) => run.spent.seconds)))],
  ["Time per stage", (m) => steps(m.stages, (s) => `${oneLine(s.name, 40)} ${duration(s.spent.seconds)}`)],
  ["Generated tokens", (m) => (m.best_of ? `${plain(over(m, (run) => run.tokens_per_prompt))} per prompt` : plain(over(m, (run) => run.spent.generated_tokens)))],
  ["Trained tokens", (m) => plain(over(m, (run) => run.spent.trained_tokens))],
  ["FLOPs", (m) => plain(over(m, (run) => run.spent.flops))],
];

const LEARNING_ROWS = [
  ["Pipeline", (m) => (m.best_of ? `best of ${m.best_of} of the base` : steps(m.stages, (s) => oneLine(s.name, 40)))],
  ["Signal", (m) => (m.best_of ? "the training reward, at inference" : steps(m.stages, (s) => oneLine(s.signal, 160)))],
  ["Sampling", (m) => (m.best_of ? `${m.best_of} per prompt` : steps(m.stages, (s) => oneLine(s.sampling, 80)))],
  ["Advantage", (m) => lastOf(m, (s) => oneLine(s.advantage ?? "none", 160))],
  ["Standard deviation of the advantage", (m) => advantageStd(m)],
];

/** One row for every setting that a configuration names. */
function settingRows(methods) {
  const last = (m) => m.stages.at(-1)?.hyperparameters ?? {};
  const names = new Set(methods.flatMap((m) => Object.keys(last(m)).filter((name) => last(m)[name] !== null)));
  return [...names].map((name) => [name, (m) => settingText(last(m)[name])]);
}

const settingText = (value) =>
  value === null || value === undefined ? "–" : typeof value === "number" ? plain(value) : oneLine(value, 60);

const meanInterval = ({ mean, low, high }) => ({ value: mean, low, high });
/** One line for each stage; equal lines once. */
const steps = (stages, text) => [...new Set(stages.map(text))].map((line) => el("div", {}, line));
const lastOf = (method, text) => (method.stages.length ? text(method.stages.at(-1)) : "–");

function advantageStd(method) {
  const known = method.runs.map((run) => run.training["advantage/std"]).filter(Boolean);
  if (!known.length) return "–";
  return `${plain(d3.mean(known, (k) => k.first))} → ${plain(d3.mean(known, (k) => k.last))}`;
}

function settings(stage) {
  const known = Object.entries(stage.hyperparameters).filter(([, value]) => value !== null);
  const words = known.map(([name, value]) => `${name} ${settingText(value)}`);
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
    const { predicted, predicted_bytes, measured_bytes, accuracy, reason } = stage.memory;
    const lines = [el("div", {}, `${oneLine(stage.name, 40)}: ${bytes(measured_bytes)} measured` +
      (predicted ? `, ${bytes(predicted_bytes)} predicted (${oneLine(accuracy, 120)})` : `; not predicted: ${oneLine(reason ?? "", 120)}`))];
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
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = size < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(size) / 10));
  return `${plain(size / 1024 ** power)} ${units[power]}`;
}
