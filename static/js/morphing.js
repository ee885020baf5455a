// Laying a fragment of HTML over the page: what has the same id stays the same node, with its scroll, focus and state.
import { Idiomorph } from "../vendor/idiomorph.esm.js";
import { element, icon, toast } from "./app.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);
const PAUSE_MS = 250;

/** The elements of the server's HTML: its own markup, escaped by its templates. */
export function parse(html) {
  return new DOMParser().parseFromString(html, "text/html").body;
}

/**
 * Put each top-level element of the server's HTML in the place of the page's element of that id. What is marked
 * data-keep, what is open, and what is being typed in stay; `keep(attribute, node)` names further attributes that do.
 */
export function morph(html, { keep = () => false } = {}) {
  const focused = document.activeElement?.id;
  const callbacks = {
    beforeNodeMorphed: (old) => !(old.nodeType === Node.ELEMENT_NODE && old.hasAttribute("data-keep")),
    beforeAttributeUpdated: (name, node, change) => !(name === "open" && node.matches("details, dialog")) && !(change === "remove" && keep(name, node)),
  };
  for (const fresh of [...parse(html).children]) {
    const old = fresh.id && document.getElementById(fresh.id);
    if (old) Idiomorph.morph(old, fresh, { ignoreActiveValue: true, callbacks });
  }
  const again = focused && document.activeElement?.id !== focused && document.getElementById(focused);
  if (again) again.focus({ preventScroll: true });
}

/** At once, then at most four times a second; a call meanwhile is one more run at the end. Answers when that is done. */
export function throttled(work) {
  let running = null;
  let isWanted = false;
  return function ask() {
    if (running) {
      isWanted = true;
      return running;
    }
    running = run();
    return running;
  };

  async function run() {
    try {
      do {
        isWanted = false;
        const began = performance.now();
        try {
          await work();
        } catch (error) {
          if (error.name !== "AbortError") toast(error.message, { kind: "bad" });
        }
        if (isWanted) await new Promise((resolve) => setTimeout(resolve, Math.max(0, PAUSE_MS - (performance.now() - began))));
      } while (isWanted);
    } finally {
      running = null;
    }
  }
}

let takeAway = () => {};

/** A toast in the place of the one before: gestures follow each other fast. */
export function sayOnce(message, options = {}) {
  takeAway();
  takeAway = toast(message, options);
}

/** For whoever hears the page instead of seeing it. */
export function announce(sentence) {
  const node = document.getElementById("announcer");
  node.textContent = "";
  setTimeout(() => { node.textContent = sentence; }, 50);
}

/** A sentence about what went wrong, in its place; an empty one takes it away. */
export function say(place, sentence) {
  const node = typeof place === "string" ? document.getElementById(place) : place;
  node.replaceChildren(...(sentence ? [element("div", { class: "notice warn" }, icon("warning"), element("p", {}, sentence))] : []));
}

/** Files that could not be taken: the first few by name, with the reason. */
export function gatherErrors(failed) {
  if (!failed.length) return;
  const words = ngettext("%s photo was not taken", "%s photos were not taken", failed.length).replace("%s", failed.length);
  const named = failed.slice(0, 3).map((file) => `${file.path}: ${file.reason}`).join(" ");
  toast(`${words}. ${named}${failed.length > 3 ? " " + gettext("And others.") : ""}`, { kind: "warn" });
}
