// Jobs as rows that stay live on any page, the Activity page, and the page of one job.
import { request } from "./app.js";
import { isActive, onSummary, watch } from "./live.js";
import { morph, throttled } from "./morphing.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const number = new Intl.NumberFormat(document.documentElement.lang || undefined);

/** Keep every `[data-job]` row below `root` live; answers a function that stops it. */
export function liveRows(root = document) {
  const rows = () => [...root.querySelectorAll("[data-job]")];
  const waiting = () => rows().filter((row) => isActive({ state: row.dataset.state })).map((row) => row.dataset.job);
  return onSummary((summary) => {
    for (const row of rows()) if (row.dataset.job === summary.id) show(row, summary);
  }, waiting);
}

function show(row, summary) {
  const part = (name) => row.querySelector(`[data-job-${name}]`);
  row.dataset.state = summary.state;
  row.classList.toggle("bad", summary.state === "failed");
  const isRunning = summary.state === "running";
  const percent = summary.total ? Math.min(100, Math.round((100 * summary.done) / summary.total)) : null;
  const figure = part("figure");
  if (figure) figure.textContent = isRunning && percent !== null ? progressText(summary, percent) : summary.stateText;
  const meter = part("meter");
  if (meter) {
    meter.hidden = !isActive(summary);
    if (isRunning && percent === null) meter.removeAttribute("value");
    else meter.value = percent ?? 0;
  }
  const note = part("note");
  if (note) {
    note.textContent = summary.error || summary.message;
    note.hidden = !note.textContent;
  }
  const cancel = part("cancel");
  if (cancel) cancel.hidden = !isActive(summary);
}

function progressText(summary, percent) {
  return gettext("%(done)s of %(total)s · %(percent)s %")
    .replace("%(done)s", number.format(summary.done))
    .replace("%(total)s", number.format(summary.total))
    .replace("%(percent)s", percent);
}

/** Bring the page up to date by the same partial that the server first drew; calls in between become one. */
export function refresher(url) {
  return throttled(async () => {
    try {
      morph(await request(url, { headers: { Accept: "text/html" } }));
    } catch (error) {
      if (error.status && error.status !== 401) throw error; // away, or logged out: the socket sees to that
    }
  });
}

function activityPage() {
  const refresh = refresher(location.pathname + location.search);
  const known = new Map();
  for (const row of document.querySelectorAll("#activity [data-job]")) known.set(row.dataset.job, row.dataset.state);
  onSummary((summary) => {
    const before = known.get(summary.id);
    known.set(summary.id, summary.state);
    if (before !== summary.state && (before !== undefined || isActive(summary))) refresh();
  });
}

function jobPage(node) {
  const refresh = refresher(location.pathname + location.search);
  watch(node.dataset.jobPage, node.dataset.last, (events) => {
    if (events.some((event) => event.type !== "step")) refresh();
  });
  let state = "";
  onSummary((summary) => {
    if (summary.id !== node.dataset.jobPage || summary.state === state) return;
    state = summary.state;
    refresh();
  });
}

// The page asks for this file by its fingerprinted name and modules may import it by its plain one: wire once.
if (!document.documentElement.dataset.activityWired) {
  document.documentElement.dataset.activityWired = "1";
  liveRows(document);
  if (document.getElementById("activity")) activityPage();
  const one = document.querySelector("[data-job-page]");
  if (one) jobPage(one);
}
