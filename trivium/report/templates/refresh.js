// Theme, drawing of the page, and refreshing of the sections whose data has changed.
"use strict";

// --- Theme --------------------------------------------------------------------------------------

const THEMES = { auto: ["◐", "as the system"], light: ["○", "light"], dark: ["●", "dark"] };

function useTheme(name) {
  const [sign, words] = THEMES[name];
  const button = document.getElementById("theme");
  button.replaceChildren(el("span", { "aria-hidden": "true" }, sign));
  button.setAttribute("aria-label", `Theme: ${words}. Change it`);
  button.title = `Theme: ${words}`;
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}

function startTheme() {
  const names = Object.keys(THEMES);
  const stored = () => {
    try {
      return localStorage.getItem("trivium-theme");
    } catch {
      return null; // a page opened from disk may have no storage
    }
  };
  let name = names.includes(stored()) ? stored() : "auto";
  useTheme(name);
  document.getElementById("theme").addEventListener("click", () => {
    name = names[(names.indexOf(name) + 1) % names.length];
    useTheme(name);
    try {
      localStorage.setItem("trivium-theme", name);
    } catch {
      // without storage, the choice is lost when the page closes
    }
  });
}

// --- Drawing and refreshing ---------------------------------------------------------------------

const POLL = 2000;

/**
 * Draw the page and, if it is live, redraw the sections whose data has changed.
 *
 * `sections` are {id, title, data(page) → slice or null, build(slice, page, redraw) → element}. A
 * section whose slice is null is not shown; a section whose slice is unchanged is not redrawn.
 */
function start(sections) {
  startTheme();
  const main = document.getElementById("page");
  let page = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Map();

  const draw = (section) => {
    const slice = section.data(page);
    const redraw = () => keepScrollAndFocus(() => insert(section, section.build(slice, page, redraw)));
    if (slice === null) (drawn.delete(section.id), document.getElementById(section.id)?.remove());
    else if (drawn.get(section.id) !== JSON.stringify(slice)) {
      drawn.set(section.id, JSON.stringify(slice));
      insert(section, section.build(slice, page, redraw));
    }
  };
  const insert = (section, built) => {
    const old = document.getElementById(section.id);
    if (old) return old.replaceWith(built);
    const later = sections
      .slice(sections.indexOf(section) + 1)
      .map((other) => document.getElementById(other.id));
    return main.insertBefore(built, later.find(Boolean) ?? null);
  };
  const drawAll = () => {
    for (const section of sections) draw(section);
    const shown = sections.filter((section) => section.title && document.getElementById(section.id));
    const links = shown.map((section) =>
      el("a", { href: `#${section.id}`, "data-key": `nav:${section.id}` }, section.title),
    );
    document.getElementById("contents").replaceChildren(...links);
  };
  drawAll();
  if (document.body.dataset.mode === "live")
    poll((fresh) => ((page = fresh), keepScrollAndFocus(drawAll)));
}

/** Change the page without moving the visible section or the focus. */
function keepScrollAndFocus(change) {
  const focused = document.activeElement;
  const key = focused?.dataset?.key;
  const range =
    focused instanceof HTMLInputElement && focused.type === "search"
      ? [focused.selectionStart, focused.selectionEnd]
      : null;
  const topSection = [...document.querySelectorAll("main > section")].find(
    (node) => node.getBoundingClientRect().bottom > 60,
  );
  const before = topSection?.getBoundingClientRect().top;
  change();
  const now = topSection && document.getElementById(topSection.id);
  if (now && scrollY > 0)
    scrollBy({ top: now.getBoundingClientRect().top - before, behavior: "instant" });
  const replacement =
    key && [...document.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key);
  if (!replacement || replacement === document.activeElement) return;
  replacement.focus({ preventScroll: true });
  if (range) replacement.setSelectionRange(...range);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function poll(onData) {
  const notice = el("p", { class: "notice", role: "status", hidden: true });
  document.querySelector(".bar").after(notice);
  let etag = "";
  for (;;) {
    await pause(POLL);
    try {
      const response = await fetch("data.json", {
        headers: etag ? { "If-None-Match": etag } : {},
        cache: "no-store",
      });
      if (response.status === 500) throw new Error((await response.json()).error);
      if (response.status === 200) {
        etag = response.headers.get("ETag") ?? "";
        const fresh = await response.json();
        // Wait for an open tooltip to close, for at most ten seconds.
        for (let waited = 0; !tip.hidden && waited < 50; waited++) await pause(200);
        onData(fresh);
      }
      notice.hidden = true;
    } catch (error) {
      const reason =
        error instanceof TypeError ? "trivium watch does not respond" : oneLine(error.message, 300);
      notice.replaceChildren(`Not up to date: ${reason}. Trying again.`);
      notice.hidden = false;
    }
  }
}
