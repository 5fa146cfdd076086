// The sample browser: one prompt through training, before beside after, or all responses in order.
"use strict";

const CLIPPED = 1200;
const ROWS_AT_ONCE = 12;
const browsing = {
  view: "prompt",
  drawn: "all",
  prompt: null,
  search: "",
  sort: "step",
  color: "none",
  most: ROWS_AT_ONCE,
};

const DRAWN = { greedy: "greedy", sampled: "sampled", training: "training" };
const FINISH_REASONS = {
  eos: ["ended by itself", "The model wrote its end-of-sequence token."],
  stop: ["ended at a stop text", "A stop text or token of the configuration was reached."],
  length: ["cut off", "The response ran into the length limit."],
};
const SORTS = {
  step: ["training order", (row) => row.step],
  reward: ["reward", (row) => numeric(row.reward)],
  kl: ["KL", (row) => numeric(row.kl)],
  length: ["length", (row) => numeric(row.length)],
};
const samplesPart = {
  id: "samples",
  title: "Samples",
  data: (page) => (page.samples.rows.length ? page.samples : null),
  build: (samples, page, redraw) => {
    const found = matching(samples);
    const update = (change) => () => (change(), (browsing.most = ROWS_AT_ONCE), redraw());
    const shown = browsing.view === "pair" ? pairs(samples, found) : list(samples, found, redraw);
    return section(
      "samples",
      "Samples",
      leftOut(samples),
      controls(samples, found, update),
      browsing.view === "all" ? null : prompts(samples, found, update),
      browsing.color === "none" ? null : colorLegend(samples),
      shown,
    );
  },
};

function leftOut({ rows, total }) {
  if (rows.length === total) return count(total, "response");
  return `${count(rows.length, "response")} of ${total.toLocaleString("en")}: the first and last steps and evenly between; the rest is in samples.jsonl`;
}

// --- What is chosen -----------------------------------------------------------------------------

/** The rows that pass filter and search, in the chosen order. */
function matching(samples) {
  const wanted = browsing.search.toLowerCase();
  const asked = samples.prompts.map((prompt) =>
    prompt.turns.some(([, text]) => text.toLowerCase().includes(wanted)),
  );
  const passes = (row) =>
    (browsing.drawn === "all" || row.drawn === browsing.drawn) &&
    (asked[row.prompt] || row.response.toLowerCase().includes(wanted));
  const [field, direction] = browsing.sort.split(":");
  const order = SORTS[field][1];
  const key = (row) => (Number.isFinite(order(row)) ? order(row) : null);
  return d3.sort(samples.rows.filter(passes), (a, b) =>
    direction === "down"
      ? d3.descending(key(a) ?? -Infinity, key(b) ?? -Infinity)
      : d3.ascending(key(a) ?? Infinity, key(b) ?? Infinity),
  );
}

/** The prompt that is looked at: the chosen one, or the first that has a matching response. */
function promptOf(found) {
  const places = found.map((row) => row.prompt);
  return places.includes(browsing.prompt) ? browsing.prompt : d3.min(places);
}

function controls(samples, found, update) {
  const kinds = Object.keys(DRAWN).filter((kind) => samples.rows.some((row) => row.drawn === kind));
  const colorings = Object.entries(COLORINGS).filter(([name]) =>
    samples.rows.some((row) => row[name]),
  );
  const set = (name) => (value) => update(() => (browsing[name] = value))();
  const views = [
    ["prompt", "One prompt"],
    ["pair", "Before and after"],
    ["all", "All"],
  ];
  return el(
    "div",
    { class: "controls" },
    choice("view", "View", views, browsing.view, set("view")),
    kinds.length > 1
      ? choice(
          "drawn",
          "How it was drawn",
          [["all", "any"], ...kinds.map((k) => [k, DRAWN[k]])],
          browsing.drawn,
          set("drawn"),
        )
      : null,
    colorings.length
      ? choice(
          "color",
          "Color tokens by",
          [["none", "plain"], ...colorings.map(([name, [short]]) => [name, short])],
          browsing.color,
          set("color"),
        )
      : null,
    browsing.view === "pair" ? null : sorter(samples, set("sort")),
    searchField(found, set("search")),
  );
}

function sorter(samples, choose) {
  const has = ([name, [, value]]) =>
    name === "step" || samples.rows.some((row) => Number.isFinite(value(row)));
  const options = Object.entries(SORTS)
    .filter(has)
    .flatMap(([name, [words]]) =>
      name === "step"
        ? [
            ["step", "first to last step"],
            ["step:down", "last to first step"],
          ]
        : [
            [`${name}:down`, `highest ${words}`],
            [name, `lowest ${words}`],
          ],
    );
  const options_ = options.map(([value, words]) =>
    el("option", { value, selected: value === browsing.sort }, words),
  );
  return el(
    "label",
    { class: "field" },
    el("span", {}, "Order"),
    el("select", { "data-key": "sort", onchange: (event) => choose(event.target.value) }, options_),
  );
}

function searchField(found, choose) {
  let timer = 0;
  const oninput = (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => choose(event.target.value), 200);
  };
  const input = el("input", {
    type: "search",
    "data-key": "search",
    placeholder: "Search prompts and responses",
    "aria-label": "Search prompts and responses",
    oninput,
  });
  input.value = browsing.search;
  const told = browsing.search
    ? el("span", { class: "note", role: "status" }, `${count(found.length, "response")} found`)
    : null;
  return el("span", { class: "field grow" }, input, told);
}

function prompts(samples, found, update) {
  const places = d3.sort(new Set(found.map((row) => row.prompt)));
  if (!places.length) return el("p", { class: "note" }, "No response matches.");
  const chosen = promptOf(found);
  const go = (place) => update(() => (browsing.prompt = place))();
  const at = places.indexOf(chosen);
  const arrow = (sign, words, to) =>
    el(
      "button",
      {
        type: "button",
        class: "plain",
        "data-key": words,
        "aria-label": words,
        disabled: to < 0 || to >= places.length,
        onclick: () => go(places[to]),
      },
      sign,
    );
  const options = places.map((place) =>
    el("option", { value: place, selected: place === chosen }, promptTitle(samples.prompts[place])),
  );
  const select = el(
    "select",
    {
      "data-key": "prompt",
      "aria-label": "Prompt",
      onchange: (event) => go(Number(event.target.value)),
    },
    options,
  );
  return el(
    "div",
    { class: "prompt-bar" },
    arrow("←", "Previous prompt", at - 1),
    select,
    arrow("→", "Next prompt", at + 1),
    el("span", { class: "note" }, `${at + 1} of ${places.length}`),
  );
}

function promptTitle(prompt) {
  const text = prompt.turns
    .filter(([role]) => role !== "system")
    .map(([, words]) => words)
    .join(" ");
  const index = prompt.index === null ? "" : `#${prompt.index} `;
  return `${index}${prompt.set === "training" ? "(training) " : ""}${oneLine(text, 70)}`;
}

// --- What is shown ------------------------------------------------------------------------------

function list(samples, found, redraw) {
  const one = browsing.view === "prompt";
  const rows = one ? found.filter((row) => row.prompt === promptOf(found)) : found;
  const cards = rows.slice(0, browsing.most).map((row) => card(row, samples, !one));
  const more = () => ((browsing.most += 4 * ROWS_AT_ONCE), redraw());
  const rest = rows.length - cards.length;
  return el(
    "div",
    { class: "cards" },
    one && rows.length ? promptCard(samples.prompts[rows[0].prompt]) : null,
    cards,
    rest > 0
      ? el(
          "button",
          { type: "button", class: "plain", "data-key": "more", onclick: more },
          `Show more (${count(rest, "response")} left)`,
        )
      : null,
  );
}

function pairs(samples, found) {
  const rows = found.filter((row) => row.prompt === promptOf(found));
  if (!rows.length) return el("div", { class: "cards" });
  const kinds = d3.groups(rows, (row) => `${row.drawn} ${row.sample ?? ""}`);
  const both = kinds.map(([, group]) => {
    const [first, last] = [
      d3.least(group, (row) => row.step),
      d3.greatest(group, (row) => row.step),
    ];
    const after =
      first.step === last.step
        ? el("p", { class: "note" }, "No later response to this prompt.")
        : card(last, samples, false);
    return el("div", { class: "pair" }, card(first, samples, false), after);
  });
  return el("div", { class: "cards" }, promptCard(samples.prompts[rows[0].prompt]), both);
}

function promptCard(prompt) {
  const turns = prompt.turns.map(([role, text]) => [
    el("p", { class: "role" }, oneLine(role ?? "prompt", 40)),
    passage(text),
  ]);
  return el("div", { class: "prompt-card" }, turns);
}

function card(row, samples, withPrompt) {
  const [ended, why] = FINISH_REASONS[row.finish_reason] ?? [oneLine(row.finish_reason, 30), ""];
  const who = [
    row.step === null ? null : `step ${row.step}`,
    oneLine(row.drawn, 20),
    row.sample ? `no. ${row.sample + 1}` : null,
  ]
    .filter(Boolean)
    .join(" · ");
  const fact = (name, value) =>
    el("span", { class: "fact" }, el("span", { class: "faint" }, name), " ", value);
  const parts =
    row.rewards.length > 1 || (row.rewards.length && row.rewards[0][1] !== row.reward)
      ? row.rewards
      : [];
  const facts = [
    numeric(row.reward) === null ? null : fact("reward", plain(row.reward)),
    parts.map(([name, value]) => fact(oneLine(name, 40), plain(value))),
    numeric(row.kl) === null ? null : fact("KL", plain(row.kl)),
    numeric(row.length) === null ? null : fact("tokens", plain(row.length, 6)),
    ended
      ? el("span", { class: row.finish_reason === "length" ? "fact cut" : "fact", title: why }, ended)
      : null,
  ];
  return el(
    "article",
    { class: "card" },
    el("header", {}, el("strong", {}, who), facts),
    withPrompt ? el("p", { class: "asked" }, promptTitle(samples.prompts[row.prompt])) : null,
    row[browsing.color] ? tokens(row, samples) : passage(row.response),
    row.whole
      ? el(
          "p",
          { class: "note" },
          `The page carries ${row.response.length.toLocaleString("en")} of ${row.whole.toLocaleString("en")} characters.`,
        )
      : null,
    row.tokens_left_out && browsing.color !== "none"
      ? el("p", { class: "note" }, "Its tokens' numbers are not on the page.")
      : null,
  );
}

/** Text with its hidden signs shown; a long one is clipped until all of it is asked for. */
function passage(text) {
  const block = el("p", { class: "text", dir: "auto" });
  if (text.length <= CLIPPED * 1.2) {
    block.append(text ? visible(text) : el("span", { class: "faint" }, "(empty)"));
    return block;
  }
  block.append(visible(text.slice(0, CLIPPED)), "…");
  return [
    block,
    showAll(`Show all ${text.length.toLocaleString("en")} characters`, () =>
      block.replaceChildren(visible(text)),
    ),
  ];
}

function showAll(words, show) {
  const button = el("button", { type: "button", class: "plain" }, words);
  button.addEventListener("click", () => (show(), button.remove()));
  return button;
}
