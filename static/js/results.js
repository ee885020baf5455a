// The results pane: answers as they come, one photo's evidence, corrections by one key, the whole re-sorting in place.
import { element, icon, request, toast, toastError, isTyping } from "./app.js";
import { watch } from "./live.js";
import { filesFromDrop, filesFromInput, upload } from "./upload.js";
import { announce, gatherErrors, morph, say, sayOnce, throttled } from "./morphing.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const SHOWN_WAITING = 48; // thumbnails of photos on their way
const BECOMES_EXAMPLE = "fewshot.becomesExample";

const labelSet = JSON.parse(document.getElementById("label-set-state").textContent);
const narrow = window.matchMedia("(max-width: 1180px)");
const pane = document.getElementById("evidence-pane");
const sheet = document.getElementById("evidence-sheet");
const sheetContent = document.getElementById("evidence-sheet-content");
const looking = document.getElementById("looking");

let state = null; // what the server said of the classification that is shown
let stopWatching = null;
let selected = new URLSearchParams(location.search).get("photo");
let evidenceAsked = 0;
const waiting = new Map(); // path -> {tile, url}: photos that were dropped and have no answer yet
let sending = 0;
const marks = []; // [time, photos answered] lately, for the rate

// Results ------------------------------------------------------------------------------------------

function readState() {
  const node = document.getElementById("results-state");
  state = node ? JSON.parse(node.textContent) : null;
}

/** Fetch the fragment and lay it over what is shown: scroll, selection and focus stay. */
const refreshResults = throttled(async () => {
  if (!state) return;
  const url = state.query ? `${state.resultsUrl}?${state.query}` : state.resultsUrl;
  const before = state;
  const html = await request(url, { headers: { Accept: "text/html" } });
  if (state !== before) {
    refreshResults(); // another batch was opened meanwhile: once more, and not awaited, for that would be waiting for itself
    return;
  }
  morph(html, { keep: isKept });
  readState();
  markSelected();
  settleWaiting();
  showRate();
  if (before.isLive && !state.isLive) {
    announce(state.summary);
    marks.length = 0;
    if (selected) showEvidence(selected);
  }
});

/** The selection is the page's own: a fragment does not know of it. */
function isKept(name, node) {
  return name === "aria-current" && node.matches(".photo");
}

function follow() {
  stopWatching?.();
  stopWatching = state ? watch(state.job, state.lastEvent, onEvents) : null;
}

function onEvents(events) {
  for (const event of events) {
    if (event.type === "predictions") marks.push([Date.parse(event.at), event.data.done]);
    if (event.type === "failed") toast(event.data.error || gettext("The classification stopped."), { kind: "bad" });
  }
  refreshResults();
}

function showRate() {
  const node = document.getElementById("rate");
  while (marks.length > 2 && marks.at(-1)[0] - marks[0][0] > 4000) marks.shift();
  if (!node || marks.length < 2) return;
  const seconds = (marks.at(-1)[0] - marks[0][0]) / 1000;
  const rate = seconds > 0 ? (marks.at(-1)[1] - marks[0][1]) / seconds : 0;
  if (rate >= 1) node.textContent = " · " + gettext("%s a second").replace("%s", Math.round(rate).toLocaleString());
}

// Dropping photos ----------------------------------------------------------------------------------

export async function classify(files) {
  if (!files.length) return;
  say("classify-problem", "");
  showTab("results");
  const topK = Number(document.getElementById("top-k-number").value);
  const run = { batch: null };
  showWaiting(files);
  sending += 1;
  try {
    const { failed } = await upload(files, {
      open: async (manifest) => {
        const answer = await request(labelSet.classifyUrl, { json: { ...manifest, topK, batch: run.batch } });
        if (!run.batch) enter(answer);
        run.batch = answer.batch;
        return answer;
      },
    });
    gatherErrors(failed);
  } catch (error) {
    clearWaiting();
    if (error.name !== "AbortError") say("classify-problem", error.message);
  } finally {
    sending -= 1; // no look at the results here: the answers tell of themselves, and an early look would delay theirs
  }
}

/** Show the new batch here and now, under its own address. */
function enter(answer) {
  history.pushState({ batch: answer.batch }, "", answer.pageUrl);
  clearSelection();
  state = { job: answer.classificationJob, lastEvent: 0, resultsUrl: answer.resultsUrl, pageUrl: answer.pageUrl, query: "", isLive: true };
  marks.length = 0;
  follow();
  watchIntake(answer);
  document.getElementById("top-k").action = answer.resultsUrl.replace(/results\/$/, "top-k/");
  showExport(answer.resultsUrl.replace(/results\/$/, "export/"));
  document.getElementById("results").replaceChildren();
}

function showExport(base) {
  const link = (kind, text) => element("a", { href: `${base}${kind}/`, download: true }, text);
  const menu = element("details", { class: "menu" }, element("summary", { class: "button" }, icon("download"), gettext("Export")));
  menu.append(element("div", { class: "menu-list" }, link("csv", gettext("Table (CSV)")), link("json", gettext("Data (JSON)"))));
  document.getElementById("export-menu").replaceChildren(menu);
}

/** Photos that turn out to be none are named with the reason, and wait no longer. */
function watchIntake(answer) {
  const stop = watch(answer.job, answer.lastEvent, async (events) => {
    if (!events.some((event) => ["idle", "succeeded", "failed"].includes(event.type))) return;
    try {
      const said = await request(answer.statusUrl);
      if (said.report.state !== "done" && said.job.state !== "failed") return;
      stop();
      gatherErrors(said.files.filter((file) => file.state === "refused"));
      for (const file of said.files) if (file.state !== "duplicate") forget(file.path);
      refreshResults();
    } catch (error) {
      toastError(error);
    }
  });
}

function showWaiting(files) {
  const grid = document.getElementById("looking-photos");
  for (const { file, path } of files) {
    if (waiting.size >= SHOWN_WAITING) break;
    const url = URL.createObjectURL(file);
    const picture = element("img", { src: url, alt: "" });
    picture.addEventListener("error", () => picture.remove());
    const tile = element("span", { class: "photo is-waiting" }, picture);
    grid.append(tile);
    waiting.set(path, { tile, url });
  }
  countWaiting();
}

/** A photo that has its answer is shown among the results, and no longer as waiting. */
function settleWaiting() {
  const answered = new Set();
  for (const tile of document.querySelectorAll("#results .photo:not(.is-waiting)")) answered.add(tile.dataset.name);
  for (const path of [...waiting.keys()]) if (answered.has(path.split("/").at(-1))) forget(path);
  if (!sending && state && !state.isLive) clearWaiting();
}

function forget(path) {
  const one = waiting.get(path);
  if (!one) return;
  one.tile.remove();
  URL.revokeObjectURL(one.url);
  waiting.delete(path);
  countWaiting();
}

function clearWaiting() {
  for (const path of [...waiting.keys()]) forget(path);
}

function countWaiting() {
  looking.hidden = waiting.size === 0;
  document.getElementById("looking-count").textContent = waiting.size;
}

// One photo ----------------------------------------------------------------------------------------

function tileOf(photo) {
  return photo ? document.getElementById(`photo-${photo}`) : null;
}

function markSelected() {
  for (const tile of document.querySelectorAll("#results .photo[aria-current]")) {
    if (tile.dataset.photo !== selected) tile.removeAttribute("aria-current");
  }
  const tile = tileOf(selected);
  tile?.setAttribute("aria-current", "true");
  const group = tile?.closest(".group");
  const place = document.getElementById("evidence-place");
  if (place && group) {
    const index = [...group.querySelectorAll(".photo")].indexOf(tile) + 1;
    place.textContent = gettext("photo %(n)s of %(all)s").replace("%(n)s", index).replace("%(all)s", group.dataset.count);
  }
}

function clearSelection() {
  selected = null;
  markSelected();
}

async function select(photo, { focus = true } = {}) {
  selected = photo;
  markSelected();
  const tile = tileOf(photo);
  if (focus) tile?.focus({ preventScroll: true });
  tile?.scrollIntoView({ block: "nearest" });
  history.replaceState(history.state, "", `${state.pageUrl}?${new URLSearchParams({ ...Object.fromEntries(new URLSearchParams(state.query)), photo })}`);
  await showEvidence(photo, { opens: true });
}

/** Bring the evidence up to date; only a person's own choice `opens` the sheet that it has on a narrow screen. */
async function showEvidence(photo, { opens = false } = {}) {
  const asked = ++evidenceAsked;
  try {
    const html = await request(`${state.resultsUrl.replace(/results\/$/, "photos/")}${photo}/`, { headers: { Accept: "text/html" } });
    if (asked !== evidenceAsked || photo !== selected) return;
    placeEvidence();
    morph(html);
    rememberBecomesExample();
    markSelected();
    if (opens && narrow.matches && !sheet.open) sheet.showModal();
  } catch (error) {
    toastError(error);
  }
}

/** Beside the results where there is room, else in a sheet over them. */
function placeEvidence() {
  const home = narrow.matches ? sheetContent : pane;
  const evidence = document.getElementById("evidence");
  if (evidence.parentNode !== home) home.replaceChildren(evidence);
}

function rememberBecomesExample() {
  const box = document.getElementById("becomes-example");
  if (box) box.checked = localStorage.getItem(BECOMES_EXAMPLE) === "yes";
}

/** The photo that a person looks at next: the following one of the same group, else the one before, else any. */
function neighbourOf(tile, step) {
  const tiles = [...document.querySelectorAll("#results .photo[data-photo]")];
  const index = tiles.indexOf(tile);
  return index < 0 ? tiles[0] : tiles[index + step];
}

async function answer(form, label) {
  const photo = selected;
  const following = neighbourOf(tileOf(photo), 1) ?? neighbourOf(tileOf(photo), -1);
  const becomesExample = form.querySelector("#becomes-example").checked;
  tileOf(photo)?.classList.add("is-leaving");
  try {
    const said = await request(form.closest("#evidence").dataset.answerUrl, { json: { label: label || null, becomesExample } });
    sayOnce(said.message, { action: gettext("Undo"), onAction: () => takeBack(said.undo, photo) });
    if (following && following.dataset.photo !== photo) select(following.dataset.photo);
    else showEvidence(photo);
    await refreshResults();
  } catch (error) {
    tileOf(photo)?.classList.remove("is-leaving");
    toastError(error);
  }
}

async function takeBack(url, photo) {
  try {
    const said = await request(url, { method: "POST" });
    announce(said.message);
    await refreshResults();
    select(photo);
  } catch (error) {
    toastError(error);
  }
}

// Wiring -------------------------------------------------------------------------------------------

export function showTab(name) {
  document.getElementById("studio").dataset.tab = name;
  for (const tab of document.querySelectorAll(".label-set-tabs [data-tab]")) {
    if (tab.dataset.tab === name) tab.setAttribute("aria-current", "true");
    else tab.removeAttribute("aria-current");
  }
}

function onClick(event) {
  const tab = event.target.closest(".label-set-tabs [data-tab]");
  if (tab) {
    event.preventDefault();
    return showTab(tab.dataset.tab);
  }
  const tile = event.target.closest("#results a.photo");
  if (tile && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    select(tile.dataset.photo);
  }
}

function onSubmit(event) {
  const form = event.target;
  if (form.matches("[data-answer]")) {
    event.preventDefault();
    if (event.submitter?.matches("[data-take-back]")) takeBack(event.submitter.formAction, selected);
    else answer(form, event.submitter?.value ?? "");
  } else if (form.matches("#threshold, #top-k")) event.preventDefault();
  else if (form.matches("#classify-collection")) {
    event.preventDefault();
    classifyCollection(form);
  }
}

async function classifyCollection(form) {
  const problem = form.querySelector("[data-problem]");
  problem.replaceChildren();
  try {
    location.assign((await request(form.action, { body: new FormData(form) })).url);
  } catch (error) {
    say(problem, error.message);
  }
}

function onChange(event) {
  const target = event.target;
  if (target.matches("#becomes-example")) localStorage.setItem(BECOMES_EXAMPLE, target.checked ? "yes" : "no");
  else if (target.matches("[data-other]") && target.value) answer(target.form, target.value);
  else if (target.matches("#reject-above")) saveThreshold(target);
  else if (target.matches("#top-k-number") && state) saveTopK(target.form);
  else if (target.matches("#classify-files")) {
    const files = filesFromInput(target);
    target.value = "";
    classify(files);
  }
}

function describeThreshold(slider) {
  const words = document.getElementById("threshold-means");
  const share = Math.round(100 * slider.value);
  words.textContent = share >= 100 ? words.dataset.none : words.dataset.some.replace("%(share)s", share);
}

async function saveThreshold(slider) {
  try {
    await request(labelSet.thresholdUrl, { body: new URLSearchParams({ reject_above: slider.value }) });
    await refreshResults();
    if (selected) showEvidence(selected);
  } catch (error) {
    toastError(error);
  }
}

async function saveTopK(form) {
  try {
    await request(form.action, { body: new FormData(form) });
    await refreshResults();
    if (selected) showEvidence(selected);
  } catch (error) {
    toastError(error);
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || isTyping(event.target)) return;
  const dialog = document.querySelector("dialog[open]");
  if (!selected || (dialog && dialog !== sheet)) return;
  const onTile = event.target.matches("#results .photo");
  const step = { j: 1, k: -1, ...(onTile ? { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 } : {}) }[event.key];
  if (step) {
    event.preventDefault();
    const tile = neighbourOf(tileOf(selected), step);
    if (tile) select(tile.dataset.photo);
  } else if (/^[0-9]$/.test(event.key)) {
    const button = document.querySelector(`#answer button[data-key="${event.key}"]`);
    if (!button) return;
    event.preventDefault();
    answer(button.form, button.value);
  }
}

/** Make a place take files that are dropped on it. */
export function takeDrops(node, onFiles) {
  let depth = 0;
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  node.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) depth++ || node.classList.add("is-over");
  });
  node.addEventListener("dragleave", () => --depth <= 0 && ((depth = 0), node.classList.remove("is-over")));
  node.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  node.addEventListener("drop", async (event) => {
    depth = 0;
    node.classList.remove("is-over");
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    onFiles(await filesFromDrop(event.dataTransfer));
  });
}

document.addEventListener("click", onClick);
document.addEventListener("submit", onSubmit, true); // before app.js takes it for a form that leaves the page
document.addEventListener("change", onChange);
document.addEventListener("keydown", onKey);
document.getElementById("reject-above").addEventListener("input", (event) => describeThreshold(event.target));
window.addEventListener("popstate", () => location.reload());
narrow.addEventListener("change", () => {
  if (!narrow.matches) sheet.close();
  placeEvidence();
});
takeDrops(document.getElementById("results-pane"), classify);

describeThreshold(document.getElementById("reject-above"));
readState();
follow();
rememberBecomesExample();
markSelected();
if (selected && narrow.matches && state) {
  placeEvidence();
  sheet.showModal();
}
