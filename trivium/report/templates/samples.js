// Sample browser: one prompt through training, before and after training, or all responses in order.
"use strict";

const MAX_SHOWN_CHARACTERS = 1200;
const ROWS_PER_PAGE = 12;
const browsing = {
  view: "prompt",
  drawn: "all",
  prompt: null,
  search: "",
  sort: "step",
  color: "none",
  limit: ROWS_PER_PAGE,
};

const DECODING_NAMES = { greedy: "greedy", sampled: "sampled", training: "training" };
const FINISH_REASONS = {
  eos: ["finished", "The model sampled its end-of-sequence token."],
  stop: ["stopped", "A stop string or stop token of the configuration was sampled."],
  length: ["truncated", "The response reached the length limit."],
};
const SORTS = {
  step: ["training order", (row) => row.step],
  reward: ["reward", (row) => numeric(row.reward)],
  kl: ["KL", (row) => numeric(row.kl)],
  length: ["length", (row) => numeric(row.length)],
};
const samplesSection = {
  id: "samples",
  title: "Samples",
  data: (page) => (page.samples.rows.length ? page.samples : null),
  build: (samples, page, redraw) => {
    const found = matching(samples);
    const update = (change) => () => (change(), (browsing.limit = ROWS_PER_PAGE), redraw());
    const shown = browsing.view === "pair" ? pairs(samples, found) : list(samples, found, redraw);
    return section(
      "samples",
      "Samples",
      coverageText(samples),
      controls(samples, found, update),
      browsing.view === "all" ? null : prompts(samples, found, update),
      browsing.color === "none" ? null : colorLegend(samples),
      shown,
    );
  },
};

function coverageText({ rows, total }) {
  if (rows.length === total) return count(total, "response");
  return `${count(rows.length, "response")} of ${total.toLocaleString("en")}: the first and last steps and evenly spaced steps between them; the rest is in samples.jsonl`;
}

// --- Selection ----------------------------------------------------------------------------------

/** Rows that match the filter and the search, in the chosen order. */
function matching(samples) {
  const wanted = browsing.search.toLowerCase();
  const promptMatches = samples.prompts.map((prompt) =>
    prompt.turns.some(([, text]) => text.toLowerCase().includes(wanted)),
  );
  const passes = (row) =>
    (browsing.drawn === "all" || row.drawn === browsing.drawn) &&
    (promptMatches[row.prompt] || row.response.toLowerCase().includes(wanted));
  const [field, direction] = browsing.sort.split(":");
  const order = SORTS[field][1];
  const key = (row) => (Number.isFinite(order(row)) ? order(row) : null);
  return d3.sort(samples.rows.filter(passes), (a, b) =>
    direction === "down"
      ? d3.descending(key(a) ?? -Infinity, key(b) ?? -Infinity)
      : d3.ascending(key(a) ?? Infinity, key(b) ?? Infinity),
  );
}

/** The chosen prompt, or the first prompt with a matching response. */
function promptOf(found) {
  const indices = found.map((row) => row.prompt);
  return indices.includes(browsing.prompt) ? browsing.prompt : d3.min(indices);
}

function controls(samples, found, update) {
  const kinds = Object.keys(DECODING_NAMES).filter((kind) =>
    samples.rows.some((row) => row.drawn === kind),
  );
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
          "Decoding",
          [["all", "any"], ...kinds.map((k) => [k, DECODING_NAMES[k]])],
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
  const optionElements = options.map(([value, words]) =>
    el("option", { value, selected: value === browsing.sort }, words),
  );
  return el(
    "label",
    { class: "field" },
    el("span", {}, "Order"),
    el(
      "select",
      { "data-key": "sort", onchange: (event) => choose(event.target.value) },
      optionElements,
    ),
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
  const resultCount = browsing.search
    ? el("span", { class: "note", role: "status" }, `${count(found.length, "response")} found`)
    : null;
  return el("span", { class: "field grow" }, input, resultCount);
}

function prompts(samples, found, update) {
  const indices = d3.sort(new Set(found.map((row) => row.prompt)));
  if (!indices.length) return el("p", { class: "note" }, "No response matches.");
  const chosen = promptOf(found);
  const choose = (index) => update(() => (browsing.prompt = index))();
  const at = indices.indexOf(chosen);
  const arrow = (sign, words, to) =>
    el(
      "button",
      {
        type: "button",
        class: "plain",
        "data-key": words,
        "aria-label": words,
        disabled: to < 0 || to >= indices.length,
        onclick: () => choose(indices[to]),
      },
      sign,
    );
  const options = indices.map((index) =>
    el("option", { value: index, selected: index === chosen }, promptTitle(samples.prompts[index])),
  );
  const select = el(
    "select",
    {
      "data-key": "prompt",
      "aria-label": "Prompt",
      onchange: (event) => choose(Number(event.target.value)),
    },
    options,
  );
  return el(
    "div",
    { class: "prompt-bar" },
    arrow("←", "Previous prompt", at - 1),
    select,
    arrow("→", "Next prompt", at + 1),
    el("span", { class: "note" }, `${at + 1} of ${indices.length}`),
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

// --- Cards --------------------------------------------------------------------------------------

function list(samples, found, redraw) {
  const singlePrompt = browsing.view === "prompt";
  const rows = singlePrompt ? found.filter((row) => row.prompt === promptOf(found)) : found;
  const cards = rows.slice(0, browsing.limit).map((row) => card(row, samples, !singlePrompt));
  const more = () => ((browsing.limit += 4 * ROWS_PER_PAGE), redraw());
  const rest = rows.length - cards.length;
  return el(
    "div",
    { class: "cards" },
    singlePrompt && rows.length ? promptCard(samples.prompts[rows[0].prompt]) : null,
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
  const comparisons = kinds.map(([, group]) => {
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
  return el("div", { class: "cards" }, promptCard(samples.prompts[rows[0].prompt]), comparisons);
}

function promptCard(prompt) {
  const turns = prompt.turns.map(([role, text]) => [
    el("p", { class: "role" }, oneLine(role ?? "prompt", 40)),
    passage(text),
  ]);
  return el("div", { class: "prompt-card" }, turns);
}

function card(row, samples, withPrompt) {
  const [reason, explanation] = FINISH_REASONS[row.finish_reason] ?? [
    oneLine(row.finish_reason, 30),
    "",
  ];
  const reasonClass = row.finish_reason === "length" ? "fact truncated" : "fact";
  const label = [
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
    reason
      ? el("span", { class: reasonClass, title: explanation }, reason)
      : null,
  ];
  return el(
    "article",
    { class: "card" },
    el("header", {}, el("strong", {}, label), facts),
    withPrompt ? el("p", { class: "prompt-title" }, promptTitle(samples.prompts[row.prompt])) : null,
    row[browsing.color] ? tokens(row, samples) : passage(row.response),
    row.full_length
      ? el(
          "p",
          { class: "note" },
          `The page has ${row.response.length.toLocaleString("en")} of ${row.full_length.toLocaleString("en")} characters.`,
        )
      : null,
    row.tokens_omitted && browsing.color !== "none"
      ? el("p", { class: "note" }, "The page does not have the values of its tokens.")
      : null,
  );
}

/** Text with visible escapes for hidden characters; a button shows all of a long text. */
function passage(text) {
  const block = el("p", { class: "text", dir: "auto" });
  if (text.length <= MAX_SHOWN_CHARACTERS * 1.2) {
    block.append(text ? visible(text) : el("span", { class: "faint" }, "(empty)"));
    return block;
  }
  block.append(visible(text.slice(0, MAX_SHOWN_CHARACTERS)), "…");
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
