// A collection: its grid, what is selected in it, the photo looked at, and what is being uploaded into it.
import { isTyping, openDialog, request, toast, toastError } from "./app.js";
import { labelChoice } from "./labelchoice.js";
import { watch } from "./live.js";
import { morph, parse } from "./morphing.js";
import { arrange, filesFromDrop, filesFromInput, showSending, upload } from "./upload.js";

const REFRESH_EVERY_MS = 1000;
const REFRESH_SHARE = 15; // and no more than a fifteenth of the time: the server has photos to take in
const NEAR_PX = 1200;
const LONG_PRESS_MS = 450;

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);
const page = document.getElementById("collection");
const grid = document.getElementById("grid");
const tiles = () => [...grid.querySelectorAll(".photo")];

// More photos: by scrolling, or by the link ----------------------------------------------------------

let isLoading = false;

async function loadMore() {
  const link = document.getElementById("more");
  if (!link || isLoading) return;
  isLoading = true;
  try {
    const html = await request(link.dataset.fragment, { headers: { Accept: "text/html" } });
    const fragment = parse(html);
    for (const tile of fragment.querySelectorAll(".photo")) if (!document.getElementById(tile.id)) grid.insertBefore(tile, link);
    const next = fragment.querySelector("#more");
    if (next) link.replaceWith(next);
    else link.hidden = true;
  } catch (error) {
    toastError(error);
  } finally {
    isLoading = false;
    seeMore();
  }
}

const sentinel = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && loadMore(), { rootMargin: `${NEAR_PX}px` });

function seeMore() {
  sentinel.disconnect();
  const link = document.getElementById("more");
  if (link && !link.hidden) sentinel.observe(link);
}

/** New photos come at the end: a grid whose end is near grows, another gets them when it is scrolled to. */
async function growGrid() {
  const link = document.getElementById("more");
  if (link && !link.hidden) return;
  if (link && grid.getBoundingClientRect().bottom > innerHeight + NEAR_PX) {
    link.dataset.fragment = `${page.dataset.photosUrl}?${queryAfter(tiles().at(-1))}`;
    link.hidden = false;
    seeMore();
    return;
  }
  const url = `${page.dataset.photosUrl}?${queryAfter(tiles().at(-1))}`;
  const fragment = parse(await request(url, { headers: { Accept: "text/html" } }));
  const fresh = [...fragment.querySelectorAll(".photo")].filter((tile) => !document.getElementById(tile.id));
  if (!fresh.length) return;
  grid.querySelector(".grid-note")?.remove();
  link?.remove();
  grid.append(...fresh, ...fragment.querySelectorAll("#more"));
  page.querySelector(".collection-page").classList.remove("is-empty");
  seeMore();
}

function queryAfter(tile) {
  const query = new URLSearchParams(location.search);
  query.set("after", tile?.dataset.serial ?? "0");
  return query;
}

// Selecting -------------------------------------------------------------------------------------------

const bar = document.getElementById("selection");
const mode = document.getElementById("select-mode");
let anchor = null;
let press = 0;
let pressedLong = false;

const boxOf = (tile) => tile.querySelector("input");
const selected = () => tiles().filter((tile) => boxOf(tile).checked);

function select(tile, isOn, { range = false } = {}) {
  const all = tiles();
  const from = range && anchor ? all.indexOf(anchor) : -1;
  const to = all.indexOf(tile);
  const chosen = from < 0 ? [tile] : all.slice(Math.min(from, to), Math.max(from, to) + 1);
  for (const one of chosen) boxOf(one).checked = isOn;
  anchor = tile;
  showSelection();
}

function showSelection() {
  const count = selected().length;
  bar.hidden = count === 0;
  bar.querySelector("[data-count]").textContent = ngettext("%s selected", "%s selected", count).replace("%s", count.toLocaleString());
  grid.classList.toggle("is-selecting", isSelecting());
}

function isSelecting() {
  return mode.getAttribute("aria-pressed") === "true" || !bar.hidden;
}

function clearSelection() {
  for (const tile of selected()) boxOf(tile).checked = false;
  mode.setAttribute("aria-pressed", "false");
  anchor = null;
  showSelection();
}

grid.addEventListener("click", (event) => {
  const tile = event.target.closest(".photo");
  if (event.target.closest("#more")) {
    event.preventDefault();
    loadMore();
  } else if (tile && event.target === boxOf(tile)) {
    const isOn = event.target.checked;
    select(tile, isOn, { range: event.shiftKey });
  } else if (tile) {
    event.preventDefault();
    if (pressedLong) pressedLong = false;
    else if (event.shiftKey || event.ctrlKey || event.metaKey || isSelecting()) select(tile, event.shiftKey || !boxOf(tile).checked, { range: event.shiftKey });
    else view(tile);
  }
});

grid.addEventListener("pointerdown", (event) => {
  const tile = event.target.closest(".photo");
  pressedLong = false;
  if (!tile || event.pointerType === "mouse") return;
  press = setTimeout(() => {
    pressedLong = true;
    select(tile, !boxOf(tile).checked);
  }, LONG_PRESS_MS);
});
for (const end of ["pointerup", "pointercancel", "pointermove"]) {
  grid.addEventListener(end, (event) => (end !== "pointermove" || Math.hypot(event.movementX, event.movementY) > 4) && clearTimeout(press));
}
grid.addEventListener("contextmenu", (event) => pressedLong && event.preventDefault());

mode.hidden = false;
mode.addEventListener("click", () => {
  const isOn = mode.getAttribute("aria-pressed") !== "true";
  if (!isOn) clearSelection();
  mode.setAttribute("aria-pressed", String(isOn));
  showSelection();
});
bar.querySelector("[data-clear]").addEventListener("click", clearSelection);
bar.querySelector("[data-use-as-examples]").addEventListener("click", () => {
  openDialog("use-as-examples");
  choice?.proposeName();
});

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  const dialog = document.querySelector("dialog[open]");
  if (dialog) {
    if (dialog.id === "photo-dialog") viewerKey(event);
    return;
  }
  const tile = event.target.closest?.(".photo");
  if (event.key === "Escape" && isSelecting()) clearSelection();
  else if (tile && (event.key === " " || event.key === "x")) {
    event.preventDefault();
    select(tile, !boxOf(tile).checked, { range: event.shiftKey });
  } else if (tile && event.key.startsWith("Arrow")) moveFocus(tile, event);
});

function moveFocus(tile, event) {
  const all = tiles();
  const perRow = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow }[event.key];
  const next = all[all.indexOf(tile) + step];
  if (!next) return;
  event.preventDefault();
  next.querySelector("a").focus();
  if (event.shiftKey) select(next, true, { range: Boolean(anchor) });
}

// Looking at one photo -----------------------------------------------------------------------------------

const viewer = document.getElementById("photo-dialog");
let viewed = null;

function view(tile) {
  viewed = tile;
  const link = tile.querySelector("a");
  const large = viewer.querySelector("[data-large]");
  const { name, category, size, notes, taken } = tile.dataset;
  large.src = link.href;
  large.alt = name;
  viewer.querySelector("#photo-name").textContent = name;
  viewer.querySelector("[data-facts]").textContent = [category || gettext("Unlabelled"), size, taken, notes].filter(Boolean).join(" · ");
  viewer.querySelector("[data-original]").href = link.href.replace(/work\/$/, "original/");
  const all = tiles();
  for (const button of viewer.querySelectorAll("[data-step]")) button.disabled = !all[all.indexOf(tile) + Number(button.dataset.step)];
  if (!viewer.open) viewer.showModal();
  tile.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const all = tiles();
  const next = all[all.indexOf(viewed) + by];
  if (next) view(next);
}

function viewerKey(event) {
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "x") select(viewed, !boxOf(viewed).checked);
  else return;
  event.preventDefault();
}

for (const button of viewer.querySelectorAll("[data-step]")) button.addEventListener("click", () => step(Number(button.dataset.step)));
viewer.addEventListener("close", () => viewed?.querySelector("a").focus());

// Using photos as examples ------------------------------------------------------------------------------

const examples = document.querySelector("#use-as-examples form");
const choice = examples && labelChoice(commonCategory);

if (examples) {
  const trouble = examples.querySelector("[data-error]");
  examples.addEventListener("submit", async (event) => {
    event.preventDefault();
    trouble.hidden = true;
    event.submitter?.setAttribute("aria-busy", "true");
    try {
      const { addUrl } = await choice.chosen();
      const { message, url } = await request(addUrl, { json: { photos: selected().map((tile) => tile.dataset.photo) } });
      examples.closest("dialog").close();
      clearSelection();
      toast(message, { action: gettext("Open the label set"), onAction: () => location.assign(url) });
    } catch (error) {
      trouble.querySelector("p").textContent = error.message;
      trouble.hidden = false;
    } finally {
      event.submitter?.removeAttribute("aria-busy");
    }
  });
}

/** The name of the category that all selected photos are in, as a proposal. */
function commonCategory() {
  const names = new Set(selected().map((tile) => tile.dataset.category.split("/").at(-1)));
  return names.size === 1 ? [...names][0] : "";
}

// Uploading -----------------------------------------------------------------------------------------------

const card = document.getElementById("sending");
let isSending = false;
let stopWatching = null;
let watched = "";

function openUpload(files, signal) {
  const report = document.getElementById("import");
  const { manifestUrl, statusUrl, state, archiveName, archiveSize } = report.dataset;
  let isFirst = true;
  return async (said) => {
    const canGoOn = isFirst && state === "open" && !report.hasAttribute("data-over");
    const isSameZip = said.archive ? said.archive.name === archiveName && said.archive.size === Number(archiveSize) : !archiveName;
    isFirst = false;
    let answer;
    if (canGoOn && isSameZip && said.files) answer = await request(manifestUrl, { json: said, signal });
    else if (canGoOn && isSameZip) answer = await request(manifestUrl, { json: { files: [] }, signal });
    else answer = await request(page.dataset.openUrl, { json: said, signal });
    follow(answer.job, answer.lastEvent);
    return answer;
  };
}

async function send(files) {
  if (!files.length) return;
  if (isSending) {
    toast(gettext("One upload is under way. Add more when it is done."), { kind: "info" });
    return;
  }
  isSending = true;
  document.getElementById("add-photos").close();
  const shown = showSending(card, gettext("Sending photos"));
  const isNew = !page.querySelector("#tree a");
  try {
    const { failed } = await upload(arrange(files, { isNew }).files, { open: openUpload(files, shown.signal), onProgress: shown.update, signal: shown.signal });
    card.hidden = true;
    for (const { path, reason } of failed.slice(0, 3)) toast(`${path}: ${reason}`, { kind: "bad" });
  } catch (error) {
    shown.end();
    shown.say(error.name === "AbortError" ? gettext("Stopped. What was sent stays; choose the same files again to go on.") : error.message);
  }
  isSending = false;
  refresh();
}

for (const input of document.querySelectorAll("#choose-folder, #choose-photos")) {
  input.addEventListener("change", () => {
    send(filesFromInput(input));
    input.value = "";
  });
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-choose]");
  if (button) document.getElementById(button.dataset.choose).click();
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

function markZones(isOver) {
  for (const zone of [grid, ...document.querySelectorAll("[data-drop-zone]")]) zone.classList.toggle("is-over", isOver);
}

document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  markZones(true);
});
document.addEventListener("dragleave", (event) => !event.relatedTarget && markZones(false));
document.addEventListener("drop", async (event) => {
  markZones(false);
  if (!hasFiles(event)) return;
  event.preventDefault();
  send(await filesFromDrop(event.dataTransfer));
});

// Hearing what becomes of it --------------------------------------------------------------------------------

let timer = 0;
let isRefreshing = false;
let isWanted = false;
let refreshTook = 0;

function follow(job, last) {
  if (job === watched) return;
  stopWatching?.();
  watched = job;
  stopWatching = watch(job, last, refreshSoon);
  refreshSoon();
}

function refreshSoon() {
  if (!timer) timer = setTimeout(refresh, Math.max(REFRESH_EVERY_MS, REFRESH_SHARE * refreshTook));
}

async function refresh() {
  clearTimeout(timer);
  timer = 0;
  if (isRefreshing) {
    isWanted = true;
    return;
  }
  isRefreshing = true;
  const begun = performance.now();
  try {
    const html = await request(page.dataset.overviewUrl, { headers: { Accept: "text/html" } });
    refreshTook = performance.now() - begun;
    morph(html);
    hideWhatIsKnown();
    await growGrid();
  } catch (error) {
    if (error.status !== 0) toastError(error);
  } finally {
    isRefreshing = false;
    if (isWanted) {
      isWanted = false;
      refreshSoon();
    }
  }
}

/** While this page sends, it need not say that the upload might be unfinished. */
function hideWhatIsKnown() {
  for (const note of page.querySelectorAll("[data-interrupted]")) note.hidden = isSending;
  for (const zone of page.querySelectorAll("#start [data-drop-zone]")) zone.hidden = isSending;
}

/** The tree scrolls by itself where it is long: the chosen category is in sight. */
function showChosen() {
  const tree = document.getElementById("tree");
  const chosen = tree.querySelector("[aria-current]")?.getBoundingClientRect();
  if (!chosen) return;
  const box = tree.getBoundingClientRect();
  tree.scrollLeft += chosen.left + chosen.width / 2 - (box.left + box.width / 2);
  tree.scrollTop += chosen.top + chosen.height / 2 - (box.top + box.height / 2);
}

seeMore();
showSelection();
showChosen();
const report = document.getElementById("import");
if (report.dataset.job && !report.hasAttribute("data-over")) follow(report.dataset.job, Number(report.dataset.last));
