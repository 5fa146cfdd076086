// Shared by every page: elements, number formats, tooltips and tables.
// Untrusted text only becomes text nodes; no markup is parsed.
"use strict";

// --- Elements -----------------------------------------------------------------------------------

/** An element with attributes and children; a string child is text, null is left out. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// Control characters except tab and newline, invisible and bidirectional characters, lone
// surrogates, and tag characters: each is shown as an escape.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\p{Cs}|[\u{e0000}-\u{e007f}]/gu;
const MAX_MARKED = 3000;

function escapeOf(sign) {
  const code = sign.codePointAt(0);
  if (code < 0x80) return `\\x${code.toString(16).padStart(2, "0")}`;
  const hex = code.toString(16);
  return code > 0xffff ? `\\u{${hex}}` : `\\u${hex.padStart(4, "0")}`;
}

/** Untrusted text as nodes; invisible and control characters are shown as small escapes. */
function visible(text) {
  const fragment = document.createDocumentFragment();
  let from = 0;
  let markedCount = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (++markedCount > MAX_MARKED) {
      fragment.append(text.slice(from).replace(HIDDEN, escapeOf));
      return fragment;
    }
    fragment.append(text.slice(from, match.index));
    fragment.append(el("span", { class: "hidden-character" }, escapeOf(match[0])));
    from = match.index + match[0].length;
  }
  fragment.append(text.slice(from));
  return fragment;
}

/** Untrusted text as a string on one line, for a heading, an option or an attribute. */
function oneLine(text, limit = 90) {
  const line = String(text)
    .slice(0, limit * 4)
    .replace(/\s+/g, " ")
    .trim()
    .replace(HIDDEN, escapeOf);
  const characters = Array.from(line);
  return characters.length > limit ? `${characters.slice(0, limit - 1).join("")}…` : line;
}

// --- Numbers ------------------------------------------------------------------------------------

const NOT_FINITE = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };

/** A number from JSON, where non-finite numbers are strings; null if the value is not a number. */
function numeric(value) {
  if (typeof value === "number") return value;
  return typeof value === "string" && Object.hasOwn(NOT_FINITE, value) ? NOT_FINITE[value] : null;
}

/** A number with at most `digits` significant digits. */
function plain(value, digits = 3) {
  return formatted(value, digits, (size, kept) => String(Number(size.toPrecision(kept))));
}

/** A number with exactly `digits` significant digits, for columns of numbers. */
function fixedDigits(value, digits = 3) {
  return formatted(value, digits, (size, kept) => size.toPrecision(kept));
}

function formatted(value, digits, write) {
  const number = numeric(value);
  if (number === null) return "–";
  if (Number.isNaN(number)) return "NaN";
  const sign = number < 0 ? "−" : "";
  const size = Math.abs(number);
  if (size === 0) return "0";
  if (size === Infinity) return `${sign}∞`;
  if (size < 1e-3 || size >= 1e15) {
    const [mantissa, power] = size.toExponential(digits - 1).split("e");
    return `${sign}${Number(mantissa)}e${Number(power)}`.replace("e-", "e−");
  }
  if (size >= 1e4 && digits < 5) return `${sign}${compact(size, digits)}`;
  return sign + write(size, Math.max(digits, Math.floor(Math.log10(size)) + 1));
}

function compact(size, digits = 3) {
  const units = [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ];
  const [unit, sign] = units.find(([u]) => size >= u) ?? [1, ""];
  return `${Number((size / unit).toPrecision(digits))}${sign}`;
}

/** A number with its unit: shares as per cent, seconds as a duration. */
function withUnit(value, unit, digits = 3) {
  const number = numeric(value);
  if (number === null) return "–";
  if (unit === "share") return `${plain(number * 100, digits)} %`;
  if (unit === "s") return duration(number);
  return unit ? `${plain(number, digits)} ${unit}` : plain(number, digits);
}

function signed(value, digits = 3) {
  const number = numeric(value);
  return number > 0 ? `+${plain(number, digits)}` : plain(number, digits);
}

function duration(seconds) {
  const number = numeric(seconds);
  if (number === null || !Number.isFinite(number)) return plain(number);
  if (number < 1) return number > 0 ? `${plain(number * 1000, 2)} ms` : `${plain(number)} s`;
  if (number < 60) return `${plain(number, number < 10 ? 2 : 3)} s`;
  const minutes = Math.round(number / 60);
  if (number < 3600)
    return `${Math.floor(number / 60)} min ${String(Math.floor(number % 60)).padStart(2, "0")} s`;
  return minutes < 2880
    ? `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`
    : `${plain(number / 86400)} days`;
}

/** "0.610 [0.550, 0.660]", or only the value if there is no interval. */
function interval(measure, unit = "") {
  if (!measure || numeric(measure.value) === null) return "–";
  const ends = intervalEnds(measure, unit);
  const value = `${percent(measure.value, unit)}${unit === "share" ? " %" : ""}`;
  return ends ? `${value} [${ends.join(", ")}]` : value;
}

/** The two ends of a measure's interval as strings; null if it has none. */
function intervalEnds({ low, high }, unit = "") {
  const known = numeric(low) !== null && numeric(high) !== null;
  return known ? [percent(low, unit), percent(high, unit)] : null;
}

function percent(value, unit) {
  return fixedDigits(numeric(value) * (unit === "share" ? 100 : 1));
}

function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

function date(iso) {
  const parsed = new Date(iso);
  if (Number.isNaN(parsed.getTime())) return oneLine(iso ?? "–");
  return parsed.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

// --- Tooltips -----------------------------------------------------------------------------------

const tip = document.getElementById("tip");

/** Show the tooltip next to a point of the window, inside the window. */
function showTooltip(content, x, y) {
  tip.replaceChildren(...[content].flat());
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth - 8 ? x - 14 - width : x + 14;
  const top = y + 14 + height > innerHeight - 8 ? y - 14 - height : y + 14;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

function hideTooltip() {
  tip.hidden = true;
}

addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());
addEventListener("pointerdown", hideTooltip, { capture: true });
addEventListener("scroll", hideTooltip, { passive: true });

/** Give an element a tooltip for hovering, focus and taps; `content` returns nodes. */
function withTooltip(node, content) {
  const show = () => {
    const box = node.getBoundingClientRect();
    showTooltip(content(), box.left, box.bottom - 8);
  };
  node.addEventListener("pointerenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("click", show);
  node.addEventListener("pointerleave", hideTooltip);
  node.addEventListener("blur", hideTooltip);
  return node;
}

/** Tooltip of a metric: title, meaning, name, unit and source. */
function meaning(metric) {
  const facts = [metric.name, metric.unit, metric.source]
    .filter(Boolean)
    .map((f) => oneLine(f, 120));
  return [
    el("strong", {}, oneLine(metric.title, 120)),
    metric.meaning ? el("p", {}, metric.meaning) : null,
    el("p", { class: "faint" }, facts.join(" · ")),
  ].filter(Boolean);
}

// --- Parts of a page ----------------------------------------------------------------------------

function section(id, title, note, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  const head = el(
    "div",
    { class: "head" },
    heading,
    note ? el("p", { class: "note" }, note) : null,
  );
  return el("section", { id, "aria-labelledby": `${id}-title` }, head, ...children);
}

/** A group of buttons with one pressed. `options` are [value, text] pairs. */
function choice(key, label, options, chosen, onchoose) {
  const buttons = options.map(([value, text]) =>
    el(
      "button",
      {
        type: "button",
        "data-key": `${key}:${value}`,
        "aria-pressed": String(value === chosen),
        onclick: () => onchoose(value),
      },
      text,
    ),
  );
  return el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

/** A table. A column is {title, hint?, text?: true, cell(row) → text or node}. */
function table(caption, columns, rows) {
  const title = (column) =>
    column.hint
      ? withTooltip(el("button", { type: "button", class: "term" }, column.title), column.hint)
      : column.title;
  const align = (column) => ({ class: column.text ? "text" : "number" });
  const head = el(
    "tr",
    {},
    columns.map((column) => el("th", { scope: "col", ...align(column) }, title(column))),
  );
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      columns.map((column) => el("td", align(column), column.cell(row))),
    ),
  );
  const grid = el(
    "table",
    {},
    el("caption", {}, caption),
    el("thead", {}, head),
    el("tbody", {}, body),
  );
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, grid);
}

/** A collapsible block; `state.open[key]` holds whether it is open. */
function folded(state, key, summary, ...children) {
  const ontoggle = (event) => (state.open[key] = event.target.open);
  return el(
    "details",
    { open: Boolean(state.open[key]), ontoggle },
    el("summary", { "data-key": `fold:${key}` }, summary),
    ...children,
  );
}
