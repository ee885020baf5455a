// What every page needs: theme, toasts, dialogs, menus, keys, and one way to ask the server for something.
// Text that people wrote goes in by textContent, never as markup.

const meta = (name) => document.querySelector(`meta[name="${name}"]`)?.content ?? "";
const gettext = (text) => (window.gettext ? window.gettext(text) : text);

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `${meta("icons")}#${name}`);
  svg.append(use);
  return svg;
}

/** element("a", {class: "chip", href}, "text", node…): children that are strings become text. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export class RequestError extends Error {
  constructor(message, status, data) {
    super(message);
    this.name = "RequestError";
    this.status = status;
    this.data = data;
  }
}

const PLAIN_WORDS = {
  401: "You are logged out. Log in again; nothing was lost.",
  403: "The page is too old to be trusted. Reload it and try again.",
  404: "That is no longer there.",
  409: "Somebody changed this meanwhile. Reload to see it.",
  413: "That is too large.",
  429: "Too many requests at once. Wait a moment and try again.",
  507: "The disk is full. Ask the administrator for room.",
};

/**
 * Ask the server. Answers JSON where it sends JSON, else text; throws a RequestError whose message a person can read:
 * the answer's {"error": "…"} where there is one.
 */
export async function request(url, { method, body, json, headers = {}, signal } = {}) {
  const verb = method ?? (body !== undefined || json !== undefined ? "POST" : "GET");
  const sent = { Accept: "application/json", "X-Requested-With": "fetch", ...headers };
  if (!["GET", "HEAD"].includes(verb)) sent["X-CSRFToken"] = meta("csrf-token");
  if (json !== undefined) sent["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(url, {
      method: verb,
      headers: sent,
      body: json !== undefined ? JSON.stringify(json) : body,
      credentials: "same-origin",
      signal,
    });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new RequestError(gettext("The server cannot be reached. It will be tried again when you are online."), 0, null);
  }
  const type = answer.headers.get("Content-Type") ?? "";
  const data = type.includes("json") ? await answer.json().catch(() => null) : await answer.text();
  if (answer.ok && !(answer.redirected && new URL(answer.url).pathname.startsWith("/accounts/login"))) return data;
  const status = answer.ok ? 401 : answer.status;
  const words = typeof data?.error === "string" ? data.error : PLAIN_WORDS[status] && gettext(PLAIN_WORDS[status]);
  throw new RequestError(words ?? gettext("That did not work. Try again; if it stays so, tell the administrator."), status, data);
}

// Toasts -----------------------------------------------------------------------------------------

const KIND_ICON = { good: "check-circle", success: "check-circle", warn: "warning", warning: "warning", bad: "error", error: "error", info: "info" };
const SHOWN_MS = 6000;
const WITH_ACTION_MS = 10000;

/** Say something in passing. Errors stay until dismissed; the rest leaves by itself, unless looked at. Answers a function that takes it away. */
export function toast(message, { action, onAction, kind = "good" } = {}) {
  const node = element("div", { class: `toast ${kind}` }, icon(KIND_ICON[kind] ?? "info"), element("span", { class: "words" }, String(message)));
  if (action) {
    node.append(element("button", { type: "button", class: "act", onclick: () => (node.remove(), onAction?.()) }, action));
  }
  node.append(element("button", { type: "button", class: "shut", "data-shut": true, "aria-label": gettext("Dismiss") }, icon("x")));
  document.getElementById("toasts").append(node);
  leaveInTime(node);
  return () => node.remove();
}

export function toastError(error) {
  if (error?.name !== "AbortError") toast(error?.message ?? String(error), { kind: "bad" });
}

function leaveInTime(node) {
  if (node.matches(".bad, .error")) return;
  const wait = node.querySelector(".act") ? WITH_ACTION_MS : SHOWN_MS;
  let timer = 0;
  const start = () => { timer = setTimeout(() => node.remove(), wait); };
  for (const held of ["pointerenter", "focusin"]) node.addEventListener(held, () => clearTimeout(timer));
  for (const freed of ["pointerleave", "focusout"]) node.addEventListener(freed, () => (clearTimeout(timer), start()));
  start();
}

// Small things -----------------------------------------------------------------------------------

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that came over plain HTTP has no clipboard: the old way, through a selection.
    const area = element("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(gettext("Copied"));
}

export function setTheme(theme) {
  const root = document.documentElement;
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
  const scheme = document.querySelector('meta[name="color-scheme"]');
  if (scheme) scheme.content = theme || "light dark";
  const age = theme ? 365 * 24 * 3600 : 0;
  const secure = location.protocol === "https:" ? "; Secure" : "";
  document.cookie = `fewshot_theme=${theme}; Path=/; Max-Age=${age}; SameSite=Lax${secure}`;
  for (const button of document.querySelectorAll("[data-theme-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.themeChoice === theme));
  }
  document.dispatchEvent(new CustomEvent("themechange", { detail: theme }));
}

export function openDialog(id) {
  const dialog = document.getElementById(id);
  if (!dialog || dialog.open) return dialog;
  dialog.showModal();
  // The browser would choose the first thing that takes the focus, and that is the button that closes it.
  if (!dialog.querySelector("[autofocus]")) dialog.querySelector("input:not([type=hidden], [type=radio], [type=file]), select")?.focus();
  return dialog;
}

/** Is the person writing? Then single keys belong to the text. */
export function isTyping(target) {
  return target.closest("input:not([type=checkbox], [type=radio], [type=range], [type=button]), textarea, select, [contenteditable]") !== null;
}

// Wiring -----------------------------------------------------------------------------------------

function onClick(event) {
  const target = event.target.closest("[data-open], [data-close], [data-copy], [data-shut], [data-theme-choice], [data-reveal]");
  const menu = event.target.closest("details.menu");
  for (const other of document.querySelectorAll("details.menu[open]")) if (other !== menu) other.open = false;
  if (menu && event.target.closest(".menu-list :is(a, button)")) menu.open = false;
  if (event.target instanceof HTMLDialogElement && event.target.matches(".dialog, .sheet")) closeOnBackdrop(event);
  if (!target) return;
  const { open, close, copy, themeChoice, reveal } = target.dataset;
  if (open !== undefined) {
    event.preventDefault();
    target.closest("[popover]")?.hidePopover();
    openDialog(open);
  } else if (close !== undefined) {
    event.preventDefault();
    (close ? document.getElementById(close) : target.closest("dialog"))?.close();
  } else if (copy !== undefined) {
    copyText(copy.startsWith("#") ? document.querySelector(copy).value : copy);
  } else if (themeChoice !== undefined) setTheme(themeChoice);
  else if (reveal !== undefined) revealPassword(target, document.getElementById(reveal));
  else target.closest(".toast")?.remove();
}

function closeOnBackdrop(event) {
  const box = event.target.getBoundingClientRect();
  const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
  if (!inside && event.detail > 0) event.target.close();
}

function revealPassword(button, field) {
  const shown = field.type === "password";
  field.type = shown ? "text" : "password";
  button.setAttribute("aria-pressed", String(shown));
  button.replaceChildren(icon(shown ? "eye-off" : "eye"));
}

let leader = 0;

function onKey(event) {
  if (event.key === "Escape") {
    const menu = document.querySelector("details.menu[open]");
    if (menu) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || isTyping(event.target)) return;
  if (event.key === "?") openDialog("keys");
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "g") leader = event.timeStamp;
  else if (event.timeStamp - leader < 1200) {
    leader = 0;
    document.querySelector(`a[data-go="${CSS.escape(event.key)}"]`)?.click();
  } else if (event.key === "z") document.querySelector("#toasts > .toast:last-child .act")?.click();
}

function onSubmit(event) {
  // A second press of the same button is the same wish. Forms that scripts handle prevent the default first.
  if (event.defaultPrevented || event.target.method === "dialog") return;
  if (event.target.dataset.sent) {
    event.preventDefault();
    return;
  }
  if (event.target.method === "get" || event.target.hasAttribute("data-again")) return;
  event.target.dataset.sent = "1";
  event.submitter?.setAttribute("aria-busy", "true");
}

function onPageShow(event) {
  if (!event.persisted) return;
  for (const form of document.querySelectorAll("form[data-sent]")) {
    delete form.dataset.sent;
    form.querySelector("[aria-busy]")?.removeAttribute("aria-busy");
  }
}

// The page asks for this file by its fingerprinted name and modules may import it by its plain one:
// the wiring is done by whichever comes first.
if (!document.documentElement.dataset.wired) {
  document.documentElement.dataset.wired = "1";
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
  document.addEventListener("submit", onSubmit);
  window.addEventListener("pageshow", onPageShow);
  for (const node of document.querySelectorAll("[data-toast]")) {
    node.querySelector("[data-shut]").hidden = false;
    leaveInTime(node);
  }
  for (const button of document.querySelectorAll("[data-reveal]")) button.hidden = false;
}
