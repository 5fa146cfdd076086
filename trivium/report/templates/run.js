// Report of one run: summary, alarms, curves, evaluations, cost, samples and configuration.
"use strict";

const COMMAND_NAMES = {
  grpo: "GRPO",
  ppo: "PPO",
  dpo: "DPO",
  sft: "supervised fine-tuning",
  "reward-model": "reward model",
};
const state = { x: "step", smooth: false, open: {} };

// --- Outcome ------------------------------------------------------------------------------------

const summarySection = {
  id: "outcome",
  title: "Outcome",
  data: ({ headline, name, written, axes }) => ({
    headline,
    name,
    written,
    reached: axes.step.at(-1),
  }),
  build: ({ headline, name, written }) =>
    el(
      "section",
      { id: "outcome", "aria-labelledby": "outcome-title" },
      el("p", { class: "kicker" }, kicker(headline)),
      el("h1", { id: "outcome-title" }, oneLine(name, 120)),
      el("p", { class: "lead" }, outcomeText(headline)),
      el("p", { class: "note" }, stateOf(headline, written)),
      el("dl", { class: "tiles" }, tiles(headline)),
    ),
};

function kicker(headline) {
  const method = COMMAND_NAMES[headline.kind] ?? oneLine(headline.kind, 40);
  const from = headline.base === null ? "" : ` from ${oneLine(headline.base, 160)}`;
  const seed = headline.seed === null ? "" : ` · seed ${oneLine(headline.seed)}`;
  return `${method}${from}${seed}`;
}

function outcomeText({ quality, training }) {
  if (quality && quality.first) {
    const [from, to] = [plain(quality.first.value), plain(quality.last.value)];
    const how = `(${quality.decoding}${quality.n ? `, ${count(quality.n, "prompt")}` : ""})`;
    if (quality.change === "unclear")
      return `Held-out reward shows no clear change: ${from} at first, ${to} at the end ${how}.`;
    return `Held-out reward ${quality.change} from ${from} to ${to} ${how}.`;
  }
  if (quality)
    return `Held-out reward is ${plain(quality.last.value)} at step ${quality.last.step} (${quality.decoding}); it was measured only once.`;
  if (training && training.first !== null) {
    const how = training.held_out ? "" : ", on the training data";
    return `${headingOf(training)} went from ${plain(training.first)} to ${plain(training.last)}${how}.`;
  }
  return "Nothing was measured yet.";
}

function stateOf(headline, written) {
  const at =
    headline.step === null
      ? "before the first step"
      : `step ${headline.step}${headline.steps ? ` of ${headline.steps}` : ""}`;
  const reason = headline.state.reason ? `: ${oneLine(headline.state.reason, 300)}` : ".";
  const words = {
    finished: `Finished at ${at}.`,
    stopped: `Stopped at ${at}${reason}`,
    interrupted: `Interrupted at ${at}${reason}`,
    failed: `Failed at ${at}${reason}`,
    open: `In progress, or ended without an event: ${at}.`,
  }[headline.state.kind];
  const started = headline.started ? ` Started ${date(headline.started)}` : "";
  return `${words}${started}; this page was written ${date(written)}.`;
}

function tiles(headline) {
  const { quality, win_rate: winRate, kl, length, alarms } = headline;
  const range = (m, scale = 1) =>
    m.low === null ? null : `95 %: ${fixedDigits(m.low * scale)} to ${fixedDigits(m.high * scale)}`;
  const first = (text) => (text ? `at first ${text}` : null);
  return [
    quality &&
      tile("Held-out reward", fixedDigits(quality.last.value), "", [
        range(quality.last),
        first(quality.first && interval(quality.first)),
        quality.best &&
          quality.best.step !== quality.last.step &&
          `best ${fixedDigits(quality.best.value)} at step ${quality.best.step}`,
      ]),
    winRate &&
      tile("Win rate against the base", plain(winRate.value * 100), "%", [range(winRate, 100)]),
    kl && tile("KL to the reference", plain(kl.value), "nats", [range(kl), "per response"]),
    length &&
      tile("Response length", plain(length.last), "tokens", [
        first(length.first !== null && `${plain(length.first)} (${relative(length)})`),
      ]),
    tile("Alarms", alarms ? String(alarms) : "none", "", [], alarms > 0),
    headline.seconds !== null &&
      tile("Time", ...timeWithUnit(headline.seconds), [
        headline.flops && `${plain(headline.flops)} FLOPs`,
      ]),
    (headline.generated || headline.trained) &&
      tile("Tokens", plain(headline.generated || headline.trained), "", tokenDetails(headline)),
  ].filter(Boolean);
}

function tile(name, value, unit, details, alert = false) {
  const number = el(
    "span",
    { class: "value" },
    value,
    unit ? el("span", { class: "unit" }, ` ${unit}`) : null,
  );
  return el(
    "div",
    { class: alert ? "tile alert" : "tile" },
    el("dt", {}, name),
    el(
      "dd",
      {},
      number,
      details.filter(Boolean).map((text) => el("span", { class: "detail" }, text)),
    ),
  );
}

function timeWithUnit(seconds) {
  const [size, unit] =
    seconds < 120
      ? [1, "s"]
      : seconds < 7200
        ? [60, "min"]
        : seconds < 172800
          ? [3600, "h"]
          : [86400, "days"];
  return [plain(seconds / size), unit];
}

function relative({ first, last }) {
  if (!first) return "was 0";
  const change = (100 * (last - first)) / Math.abs(first);
  return `${Math.abs(change) < 0.5 ? "±0" : signed(change, 2)} %`;
}

function tokenDetails({ generated, trained }) {
  return generated ? ["generated", trained && `${plain(trained)} trained`] : ["trained"];
}

// --- Alarms and events --------------------------------------------------------------------------

const alarmsSection = {
  id: "alarms",
  title: "Alarms",
  data: ({ alarms, events }) => ({ alarms, events }),
  build: ({ alarms, events }) => {
    const groups = d3.groups(alarms.shown, (alarm) => `${alarm.monitor}\n${alarm.metric}`);
    const note =
      alarms.shown.length < alarms.total
        ? `the first and last ${alarms.shown.length} of ${alarms.total}`
        : null;
    return section(
      "alarms",
      "Alarms",
      note,
      groups.length
        ? el(
            "ol",
            { class: "alarms" },
            groups.map(([, group]) => alarm(group)),
          )
        : el("p", { class: "quiet" }, "No monitor raised an alarm."),
      events.shown.length
        ? folded(state, "events", `Other events (${events.total})`, eventTable(events))
        : null,
    );
  },
};

/** Alarms of one monitor: the first in full, and the steps of the others. */
function alarm(group) {
  const [first] = group;
  const steps = group.map((event) => event.step).filter((step) => step !== undefined);
  const again =
    steps.length > 1
      ? ` and again at ${steps.slice(1, 9).join(", ")}${steps.length > 9 ? ` and ${steps.length - 9} more` : ""}`
      : "";
  const fact = (name, text) =>
    text ? [el("dt", {}, name), el("dd", {}, visible(String(text)))] : null;
  return el(
    "li",
    {},
    el(
      "h3",
      {},
      el("span", { class: "sign", "aria-hidden": "true" }, "▲"),
      oneLine(first.monitor ?? "alarm", 80).replaceAll("_", " "),
      group.some((event) => event.stops) ? el("span", { class: "chip" }, "stopped the run") : null,
      el("span", { class: "note" }, `step ${steps[0] ?? "–"}${again}`),
    ),
    el(
      "dl",
      {},
      fact("Seen", first.seen ?? first.message),
      fact("Why it matters", first.why),
      fact("What to try", first.remedy),
    ),
  );
}

function eventTable(events) {
  const known = new Set(["time", "kind", "message"]);
  const rest = (event) =>
    Object.entries(event)
      .filter(([name]) => !known.has(name))
      .map(
        ([name, value]) =>
          `${name} ${typeof value === "number" ? plain(value) : oneLine(typeof value === "string" ? value : JSON.stringify(value), 200)}`,
      );
  const note =
    events.shown.length < events.total
      ? el("p", { class: "note" }, `The first and last ${events.shown.length} are shown.`)
      : null;
  return [
    note,
    table(
      "Events",
      [
        { title: "time", text: true, cell: (event) => date(event.time) },
        {
          title: "event",
          text: true,
          cell: (event) => oneLine(event.kind ?? "–", 60).replaceAll("_", " "),
        },
        {
          title: "what",
          text: true,
          cell: (event) =>
            [oneLine(event.message ?? "", 300), ...rest(event).map((fact) => oneLine(fact, 240))]
              .filter(Boolean)
              .join(" · "),
        },
      ],
      events.shown,
    ),
  ];
}

// --- Evaluations --------------------------------------------------------------------------------

const evaluationSection = {
  id: "evaluation",
  title: "Evaluation",
  data: ({ evaluation }) => (evaluation.rows.length ? evaluation : null),
  build: ({ columns, rows }) => {
    const measured = (column) => ({
      title: column.title.replace("held-out reward, ", ""),
      hint: () => meaning(column),
      cell: (row) =>
        measuredCell(
          {
            value: row[column.name] ?? null,
            low: row[`${column.name}_low`],
            high: row[`${column.name}_high`],
          },
          column.unit,
        ),
    });
    return section(
      "evaluation",
      "Evaluation",
      "on held-out prompts; 95 % intervals below the values",
      table(
        "Evaluations on held-out prompts",
        [
          { title: "step", cell: (row) => String(row.step) },
          ...columns.map(measured),
          {
            title: "time",
            cell: (row) => (row.elapsed === undefined ? "–" : duration(row.elapsed)),
          },
          { title: "prompts", cell: (row) => plain(row.n ?? null, 6) },
        ],
        rows,
      ),
    );
  },
};

/** A value with its interval below it, if it has one. */
function measuredCell(measure, unit) {
  const ends = intervalEnds(measure, unit);
  const range = ends ? el("span", { class: "range" }, ends.join(" to ")) : null;
  return [interval({ value: measure.value }, unit), range].filter(Boolean);
}

// --- Settings -----------------------------------------------------------------------------------

const configurationSection = {
  id: "configuration",
  title: "Configuration",
  data: ({ config, run }) => ({ config, run }),
  build: ({ config, run }) => {
    const left =
      config.characters > config.text.length
        ? el(
            "p",
            { class: "note" },
            `The first ${config.text.length.toLocaleString("en")} of ${config.characters.toLocaleString("en")} characters; the full text is in config.yaml.`,
          )
        : null;
    const packages = Object.entries(run.packages ?? {}).map(([name, version]) => [
      name,
      version ?? "not installed",
    ]);
    const facts = [
      ...packages,
      ["Python", run.python],
      ["platform", run.platform],
      ["started", run.started],
    ];
    const rows = facts.filter(([, value]) => value !== undefined && value !== null);
    return section(
      "configuration",
      "Configuration and versions",
      null,
      config.text
        ? folded(
            state,
            "config",
            "config.yaml, including defaults",
            el("pre", {}, visible(config.text)),
            left,
          )
        : el("p", { class: "quiet" }, "The run has no config.yaml."),
      el(
        "dl",
        { class: "versions" },
        rows.map(([name, value]) =>
          el("div", {}, el("dt", {}, oneLine(name, 60)), el("dd", {}, oneLine(value, 160))),
        ),
      ),
    );
  },
};

start([
  summarySection,
  alarmsSection,
  curvesSection,
  evaluationSection,
  costSection,
  samplesSection,
  configurationSection,
]);
