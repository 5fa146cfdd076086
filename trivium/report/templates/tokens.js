// Tokens colored by a number each, with a legend, and a way to read the numbers.
"use strict";

const CLIPPED_TOKENS = 400;
const COLORINGS = {
  log_ratio: [
    "log-ratio",
    "log π − log π_ref",
    "less likely than under the reference",
    "more likely",
  ],
  advantages: ["advantage", "advantage Â", "discouraged", "encouraged"],
};

/** The value beyond which color does not deepen: nearly the largest of the page's. */
function reach(samples) {
  const sizes = samples.rows
    .flatMap((row) => row[browsing.color] ?? [])
    .map((v) => Math.abs(numeric(v)))
    .filter(Number.isFinite);
  return d3.quantile(sizes, 0.98) || d3.max(sizes) || 1;
}

function tint(value, most) {
  if (value === null || Number.isNaN(value)) return null;
  const depth = Math.min(1, Math.abs(value) / most);
  const color = value < 0 ? "--negative" : "--positive";
  return `color-mix(in srgb, var(${color}) ${Math.round(70 * depth)}%, transparent)`;
}

function pieces(row) {
  if (row.tokens) return row.tokens;
  const signs = Array.from(row.response);
  let from = 0;
  return row.cuts.map((length) => signs.slice(from, (from += length)).join(""));
}

function tokens(row, samples) {
  const texts = pieces(row);
  const most = reach(samples);
  const span = (text, i) =>
    el(
      "span",
      {
        "data-token": i,
        style: { "background-color": tint(numeric(row[browsing.color][i]), most) },
      },
      text ? visible(text) : "·",
    );
  const block = el("p", {
    class: "text tokens",
    dir: "auto",
    tabindex: "0",
    "aria-label": "Tokens; arrow keys read their values",
  });
  const draw = (count) => block.replaceChildren(...texts.slice(0, count).map(span));
  draw(texts.length > CLIPPED_TOKENS * 1.2 ? CLIPPED_TOKENS : texts.length);
  readTokens(block, row, texts);
  if (block.childElementCount === texts.length) return block;
  return [
    block,
    showAll(`Show all ${texts.length.toLocaleString("en")} tokens`, () => draw(texts.length)),
  ];
}

/** Let pointer and arrow keys read the tokens' values. */
function readTokens(block, row, texts) {
  let current = -1;
  const mark = (place) => {
    block.children[current]?.classList.remove("read");
    current = place;
    block.children[current]?.classList.add("read");
  };
  const show = (place, x, y) => {
    mark(place);
    const line = ([name, [, words]]) =>
      row[name]
        ? el("tr", {}, el("td", {}, words), el("td", { class: "number" }, signed(row[name][place])))
        : null;
    const token = el("code", {}, oneLine(JSON.stringify(texts[place]), 60));
    showTip(
      [
        el(
          "p",
          {},
          token,
          el("span", { class: "faint" }, ` token ${place + 1} of ${texts.length}`),
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
    if (event.key === "Escape") hideTip();
    if (!move) return;
    event.preventDefault();
    const place = Math.max(0, Math.min(block.childElementCount - 1, current + move));
    const box = block.children[place].getBoundingClientRect();
    show(place, box.left, box.bottom);
  });
  for (const name of ["pointerleave", "blur"])
    block.addEventListener(name, () => (mark(-1), hideTip()));
}

function colorLegend(samples) {
  const [, words, low, high] = COLORINGS[browsing.color];
  const most = plain(reach(samples), 2);
  return el(
    "div",
    { class: "color-legend" },
    el("span", {}, `${words} per token`),
    el(
      "span",
      { class: "scale" },
      el("span", {}, `−${most}`),
      el("i", { class: "ramp" }),
      el("span", {}, `+${most}`),
    ),
    el("span", { class: "faint" }, `${low} · ${high}`),
  );
}
