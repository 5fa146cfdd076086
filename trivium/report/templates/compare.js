// Report of a comparison: the verdict, and all numbers behind it.
"use strict";

const state = { decoding: "greedy", currency: null, open: {} };
const CURRENCIES = {
  seconds: "seconds of training",
  generated_tokens: "generated tokens",
  trained_tokens: "trained tokens",
  flops: "FLOPs",
};

// --- Verdict ------------------------------------------------------------------------------------

const verdictSection = {
  id: "verdict",
  title: "Verdict",
  data: ({ title, verdict, base, seeds, n }) => ({ title, verdict, base, seeds, n }),
  build: ({ title, verdict, base, seeds, n }) => {
    const list = (items) => el("ul", { class: "words" }, items.map((s) => el("li", {}, oneLine(s, 600))));
    return el(
      "section",
      { id: "verdict", "aria-labelledby": "verdict-title" },
      el("p", { class: "kicker" }, `${oneLine(title, 120)} · from ${oneLine(base, 160)}`),
      el("h1", { id: "verdict-title" }, oneLine(verdict.headline, 240)),
      el("p", { class: "note" },
        `${oneLine(verdict.budget, 240)} · ${count(n, "held-out prompt")} · ${count(seeds.length, "seed")}`),
      el("div", { class: "lead" }, verdict.sentences.map((s) => el("p", {}, oneLine(s, 600)))),
      verdict.would_change.length
        ? [el("h3", { class: "group" }, "What would change it"), list(verdict.would_change)]
        : null,
      folded(state, "rules", "The rules behind the verdict", list(verdict.rules)),
    );
  },
};

// --- Quality ------------------------------------------------------------------------------------

const qualitySection = {
  id: "quality",
  title: "Quality",
  data: ({ methods, bases, unit }) => ({ methods, bases, unit }),
  build: ({ methods, bases, unit }, page, redraw) =>
    section(
      "quality",
      "Held-out quality",
      `with 95 % intervals over ${methods[0].greedy.over}; ` +
        (methods[0].runs.length > 1 ? "small dots are seeds, thin lines their range; " : "") +
        "the dashed line is the base",
      decodingChoice(redraw),
      el("figure", { class: "panel" }, sized(() => 40 + 34 * methods.length, (width, height) =>
        qualityChart(methods, bases, unit, width, height))),
    ),
};

function decodingChoice(redraw) {
  const options = [["greedy", "greedy"], ["sampled", "sampled"]];
  const choose = (decoding) => ((state.decoding = decoding), redraw());
  return el("div", { class: "controls" }, choice("decoding", "Decoding", options, state.decoding, choose));
}

// --- Frontier and cost --------------------------------------------------------------------------

const frontierSection = {
  id: "frontier",
  title: "Frontier",
  data: ({ methods, bases, unit }) =>
    methods.some((m) => m.runs.some((run) => run.final.kl !== null)) ? { methods, bases, unit } : null,
  build: ({ methods, bases, unit }) =>
    section(
      "frontier",
      "Reward–KL frontier",
      "sampled quality against the KL divergence from the base; faint lines show the course of training",
      el("figure", { class: "panel" },
        methodLegend(methods),
        sized((width) => (width < 500 ? 300 : 380), (width, height) =>
          frontierChart(methods, bases, unit, width, height))),
      methods.some((m) => m.varied.length) ? variedTable(methods, unit) : null,
      methods.some((m) => m.best_of)
        ? el("p", { class: "note" }, "Best-of-n has no training; its KL is the bound log n − (n − 1)/n.")
        : null,
    ),
};

function variedTable(methods, unit) {
  const rows = methods.flatMap((method) => method.varied.map((run) => ({ method, run })));
  return folded(state, "varied", `${rows.length} runs with varied settings`, table(
    "Varied settings",
    [
      { title: "method", text: true, cell: ({ method }) => oneLine(method.name, 60) },
      { title: "setting", text: true, cell: ({ run }) => oneLine(`${run.setting} = ${JSON.stringify(run.value)}`, 60) },
      { title: "sampled", cell: ({ run }) => interval(measureOf(run.final, "sampled"), unit) },
      { title: "greedy", cell: ({ run }) => interval(measureOf(run.final, "greedy"), unit) },
      { title: "KL", cell: ({ run }) => plain(run.final.kl) },
      { title: "length", cell: ({ run }) => plain(run.final.length) },
    ],
    rows,
  ));
}

const costSection = {
  id: "cost",
  title: "By cost",
  data: ({ methods, unit, budget }) =>
    methods.some((m) => m.runs.some((run) => run.curve.length)) ? { methods, unit, budget } : null,
  build: ({ methods, unit, budget }, page, redraw) => {
    const spent = (c) => methods.some((m) => m.runs.some((run) => run.curve.some((p) => p[c] > 0)));
    const kinds = Object.entries(CURRENCIES).filter(([c]) => spent(c));
    state.currency ??= budget ? budget.currency : "seconds";
    const choose = (currency) => ((state.currency = currency), redraw());
    return section(
      "cost",
      "Quality by cost",
      "mean over seeds, with bands from the lowest to the highest seed; flat during the earlier stages",
      decodingChoice(redraw),
      el("div", { class: "controls" }, choice("currency", "Currency", kinds, state.currency, choose)),
      costChart(methods, unit, state.currency, CURRENCIES[state.currency]),
      spentTable(methods, budget),
    );
  },
};

function spentTable(methods, budget) {
  const mean = (method, c) => d3.mean(method.runs, (run) => run.spent[c]);
  const against = budget
    ? [{ title: "of the budget", cell: (method) => (method.best_of ? "–" : withUnit(mean(method, budget.currency) / budget.amount, "share")) }]
    : [];
  return table(
    "Cost of each method, mean over seeds",
    [
      { title: "method", text: true, cell: (method) => oneLine(method.name, 60) },
      ...against,
      { title: "training", cell: (method) => duration(mean(method, "seconds")) },
      { title: "generated tokens", cell: (method) => plain(mean(method, "generated_tokens")) },
      { title: "trained tokens", cell: (method) => plain(mean(method, "trained_tokens")) },
      { title: "FLOPs", cell: (method) => plain(mean(method, "flops")) },
    ],
    methods,
  );
}

// --- Credit -------------------------------------------------------------------------------------

const creditSection = {
  id: "credit",
  title: "Credit",
  data: ({ credit, methods }) => (credit && credit.length ? { credit, methods } : null),
  build: ({ credit, methods }) => {
    const best = d3.max(credit, (c) => c.snr);
    return section(
      "credit",
      "Credit assignment",
      "signal-to-noise of each method's first gradient, on the same responses of the base",
      el("figure", { class: "panel" }, sized(() => 40 + 34 * credit.length, (width, height) =>
        creditChart(credit, methods, width, height))),
      table(
        "Signal-to-noise of gradients",
        [
          { title: "method", text: true, cell: (c) => oneLine(c.method, 60) },
          { title: "SNR of a batch", cell: (c) => interval({ value: c.snr, low: c.snr_low, high: c.snr_high }) },
          { title: "cosine of two batches", cell: (c) => plain(c.cosine) },
          { title: "responses for the SNR of the best", cell: (c) => (c.snr > 0 ? `${plain(best / c.snr)} ×` : "–") },
          { title: "batches", cell: (c) => (c.empty ? `${c.batches}, ${c.empty} without a gradient` : String(c.batches)) },
        ],
        credit,
      ),
      el("p", { class: "note" },
        "A gradient with twice the ratio needs half the responses for the same certainty. A certain " +
        "gradient is not always useful: imitation has a steady gradient towards the base's best responses."),
    );
  },
};

// --- Risk ---------------------------------------------------------------------------------------

const riskSection = {
  id: "risk",
  title: "Risk",
  data: ({ methods, risk, meanings, unit }) => ({ methods, risk: risk ?? null, meanings, unit }),
  build: ({ methods, risk, meanings }) =>
    section(
      "risk",
      "Risk",
      null,
      el("h3", { class: "group" }, "Alarms"),
      alarmTable(methods),
      el("h3", { class: "group" }, "Key metrics in the first and the last tenth of training"),
      trainingTable(methods, meanings),
      risk && risk.coverage.length
        ? [
            el("h3", { class: "group" }, "Preference coverage: similarity of responses to the nearest response in the pairs (1: equal)"),
            table("Preference coverage", [
              { title: "method", text: true, cell: (c) => oneLine(c.method, 60) },
              { title: "the base's responses", cell: (c) => plain(c.base) },
              { title: "the trained policy's", cell: (c) => plain(c.final) },
              { title: "responses", cell: (c) => String(c.responses) },
            ], risk.coverage),
          ]
        : null,
      risk && risk.reward_model.length
        ? [
            el("h3", { class: "group" }, "Learned rewards: share of the policy's response pairs that are ranked like quality"),
            table("Learned rewards", [
              { title: "method", text: true, cell: (r) => oneLine(r.method, 60) },
              { title: "on the base", cell: (r) => interval(accuracyOf(r.points[0]), "share") },
              { title: "on the trained policy", cell: (r) => interval(accuracyOf(r.points.at(-1)), "share") },
              { title: "without its updates", cell: (r) => interval(accuracyOf(r.without_updates), "share") },
              { title: "updates", cell: (r) => String(r.updates.length) },
            ], risk.reward_model),
          ]
        : null,
    ),
};

const accuracyOf = (point) => ({ value: point.accuracy, low: point.low, high: point.high });

function alarmTable(methods) {
  const rows = methods.flatMap((method) =>
    method.runs.flatMap((run) => run.alarms.map((alarm) => ({ method, run, alarm }))));
  if (!rows.length) return el("p", { class: "note" }, "No alarm was raised.");
  return table(
    "Alarms",
    [
      { title: "method", text: true, cell: ({ method }) => oneLine(method.name, 60) },
      { title: "seed", cell: ({ run }) => String(run.seed) },
      { title: "monitor", text: true, cell: ({ alarm }) => oneLine(alarm.monitor, 40) },
      { title: "step", cell: ({ alarm }) => String(alarm.step) },
      { title: "seen", text: true, cell: ({ alarm }) => oneLine(alarm.seen ?? alarm.message ?? "", 240) },
    ],
    rows.slice(0, 100),
  );
}

function trainingTable(methods, meanings) {
  const names = Object.keys(meanings).filter((name) => methods.some((m) => m.runs.some((run) => run.training[name])));
  const cell = (name) => (method) => {
    const known = method.runs.map((run) => run.training[name]).filter(Boolean);
    if (!known.length) return "–";
    return `${plain(d3.mean(known, (k) => k.first))} → ${plain(d3.mean(known, (k) => k.last))}`;
  };
  return table(
    "Key metrics",
    [
      { title: "method", text: true, cell: (method) => oneLine(method.name, 60) },
      ...names.map((name) => ({
        title: oneLine(meanings[name].title, 40),
        hint: () => meaning({ ...meanings[name], name }),
        cell: cell(name),
      })),
    ],
    methods.filter((method) => !method.best_of),
  );
}

start([verdictSection, qualitySection, tableSection, frontierSection, costSection, creditSection, riskSection]);
