// Theme, and drawing the page: once, or again wherever the data of a part has changed.
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
      return null; // a page from disk may have no storage
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
      // the choice then lasts as long as the page
    }
  });
}

// --- Drawing and refreshing ---------------------------------------------------------------------

const POLL = 2000;

/**
 * Draw the page and, where it is live, draw anew what has changed.
 *
 * `parts` are {id, title, data(page) → slice or null, build(slice, page, redraw) → section}: a part
 * whose slice is null is not shown, one whose slice is as before is not touched.
 */
function start(parts) {
  startTheme();
  const main = document.getElementById("page");
  let page = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Map();

  const draw = (part) => {
    const slice = part.data(page);
    const redraw = () => keepingPlace(() => place(part, part.build(slice, page, redraw)));
    if (slice === null) (drawn.delete(part.id), document.getElementById(part.id)?.remove());
    else if (drawn.get(part.id) !== JSON.stringify(slice)) {
      drawn.set(part.id, JSON.stringify(slice));
      place(part, part.build(slice, page, redraw));
    }
  };
  const place = (part, built) => {
    const old = document.getElementById(part.id);
    if (old) return old.replaceWith(built);
    const later = parts.slice(parts.indexOf(part) + 1).map((p) => document.getElementById(p.id));
    return main.insertBefore(built, later.find(Boolean) ?? null);
  };
  const drawAll = () => {
    for (const part of parts) draw(part);
    const shown = parts.filter((part) => part.title && document.getElementById(part.id));
    const links = shown.map((part) =>
      el("a", { href: `#${part.id}`, "data-key": `nav:${part.id}` }, part.title),
    );
    document.getElementById("contents").replaceChildren(...links);
  };
  drawAll();
  if (document.body.dataset.mode === "live")
    poll((fresh) => ((page = fresh), keepingPlace(drawAll)));
}

/** Change the page so that what the reader looks at, and what has the focus, stays where it is. */
function keepingPlace(change) {
  const focused = document.activeElement;
  const key = focused?.dataset?.key;
  const range =
    focused instanceof HTMLInputElement && focused.type === "search"
      ? [focused.selectionStart, focused.selectionEnd]
      : null;
  const seen = [...document.querySelectorAll("main > section")].find(
    (node) => node.getBoundingClientRect().bottom > 60,
  );
  const before = seen?.getBoundingClientRect().top;
  change();
  const now = seen && document.getElementById(seen.id);
  if (now && scrollY > 0)
    scrollBy({ top: now.getBoundingClientRect().top - before, behavior: "instant" });
  const again =
    key && [...document.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key);
  if (!again || again === document.activeElement) return;
  again.focus({ preventScroll: true });
  if (range) again.setSelectionRange(...range);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function poll(take) {
  const notice = el("p", { class: "notice", role: "status", hidden: true });
  document.querySelector(".bar").after(notice);
  let mark = "";
  for (;;) {
    await pause(POLL);
    try {
      const answer = await fetch("data.json", {
        headers: mark ? { "If-None-Match": mark } : {},
        cache: "no-store",
      });
      if (answer.status === 500) throw new Error((await answer.json()).error);
      if (answer.status === 200) {
        mark = answer.headers.get("ETag") ?? "";
        const fresh = await answer.json();
        // A hint that is being read is not torn away, for a while.
        for (let waited = 0; !tip.hidden && waited < 50; waited++) await pause(200);
        take(fresh);
      }
      notice.hidden = true;
    } catch (error) {
      const reason =
        error instanceof TypeError ? "trivium watch does not answer" : oneLine(error.message, 300);
      notice.replaceChildren(`Not up to date: ${reason}. Trying again.`);
      notice.hidden = false;
    }
  }
}
