// Tokens colored by a value, with a legend and a tooltip.
"use strict";

const MAX_SHOWN_TOKENS = 400;
const COLORINGS = {
  log_ratio: [
    "log-ratio",
    "log π − log π_ref",
    "less likely than under the reference",
    "more likely",
  ],
  advantages: ["advantage", "advantage Â", "discouraged", "encouraged"],
};

/** Value with the full color: the 98th percentile of the page's values. */
function colorLimit(samples) {
  const sizes = samples.rows
    .flatMap((row) => row[browsing.color] ?? [])
    .map((v) => Math.abs(numeric(v)))
    .filter(Number.isFinite);
  return d3.quantile(sizes, 0.98) || d3.max(sizes) || 1;
}

function tint(value, limit) {
  if (value === null || Number.isNaN(value)) return null;
  const depth = Math.min(1, Math.abs(value) / limit);
  const color = value < 0 ? "--negative" : "--positive";
  return `color-mix(in srgb, var(${color}) ${Math.round(70 * depth)}%, transparent)`;
}

function pieces(row) {
  if (row.tokens) return row.tokens;
  const characters = Array.from(row.response);
  let from = 0;
  return row.token_lengths.map((length) => characters.slice(from, (from += length)).join(""));
}

function tokens(row, samples) {
  const texts = pieces(row);
  const limit = colorLimit(samples);
  const span = (text, i) =>
    el(
      "span",
      {
        "data-token": i,
        style: { "background-color": tint(numeric(row[browsing.color][i]), limit) },
      },
      text ? visible(text) : "·",
    );
  const block = el("p", {
    class: "text tokens",
    dir: "auto",
    tabindex: "0",
    "aria-label": "Tokens; arrow keys show their values",
  });
  const draw = (count) => block.replaceChildren(...texts.slice(0, count).map(span));
  draw(texts.length > MAX_SHOWN_TOKENS * 1.2 ? MAX_SHOWN_TOKENS : texts.length);
  readTokens(block, row, texts);
  if (block.childElementCount === texts.length) return block;
  return [
    block,
    showAll(`Show all ${texts.length.toLocaleString("en")} tokens`, () => draw(texts.length)),
  ];
}

/** Show a token's values for the pointer and the arrow keys. */
function readTokens(block, row, texts) {
  let current = -1;
  const mark = (index) => {
    block.children[current]?.classList.remove("read");
    current = index;
    block.children[current]?.classList.add("read");
  };
  const show = (index, x, y) => {
    mark(index);
    const line = ([name, [, words]]) =>
      row[name]
        ? el("tr", {}, el("td", {}, words), el("td", { class: "number" }, signed(row[name][index])))
        : null;
    const token = el("code", {}, oneLine(JSON.stringify(texts[index]), 60));
    showTooltip(
      [
        el(
          "p",
          {},
          token,
          el("span", { class: "faint" }, ` token ${index + 1} of ${texts.length}`),
        ),
        el("table", {}, el("tbody", {}, Object.entries(COLORINGS).map(line))),
      ],
      x,
      y,
    );
  };
  block.addEventListener("pointermove", (event) => {
    const token = event.target.closest("[data-token]");
    if (token) show(Number(token.dataset.token), event.clientX, event.clientY);
  });
  block.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hideTooltip();
    if (!move) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(block.childElementCount - 1, current + move));
    const box = block.children[index].getBoundingClientRect();
    show(index, box.left, box.bottom);
  });
  for (const name of ["pointerleave", "blur"])
    block.addEventListener(name, () => (mark(-1), hideTooltip()));
}

function colorLegend(samples) {
  const [, words, low, high] = COLORINGS[browsing.color];
  const limit = plain(colorLimit(samples), 2);
  return el(
    "div",
    { class: "color-legend" },
    el("span", {}, `${words} per token`),
    el(
      "span",
      { class: "scale" },
      el("span", {}, `−${limit}`),
      el("i", { class: "ramp" }),
      el("span", {}, `+${limit}`),
    ),
    el("span", { class: "faint" }, `${low} · ${high}`),
  );
}
