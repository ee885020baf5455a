// The first page: a drop zone that asks what the photos are for, and the jobs that run.
import { element, openDialog, request } from "./app.js";
import { openCamera } from "./camera.js";
import { labelChoice } from "./labelchoice.js";
import { isActive, onSummary } from "./live.js";
import { say } from "./morphing.js";
import { arrange, filesFromDrop, filesFromInput, showSending, upload } from "./upload.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);
const home = document.getElementById("home");
const dialog = document.getElementById("what-for");
const form = dialog.querySelector("form");
const zone = document.getElementById("drop-zone");
const card = document.getElementById("sending");
const labels = document.getElementById("label-choice") && labelChoice();
let chosen = [];
let isSending = false;

// Choosing and dropping -----------------------------------------------------------------------------

/** Ask what files are for; `proposed` is the answer that stands there first, where it is offered. */
function ask(files, proposed = "new") {
  if (!files.length || isSending) return;
  chosen = files;
  say(form.querySelector("[data-problem]"), "");
  (form.querySelector(`[name="aim"][value="${proposed}"]`) ?? form.querySelector('[name="aim"]')).checked = true;
  showAim();
  const photos = ngettext("%s file", "%s files", files.length).replace("%s", files.length.toLocaleString());
  dialog.querySelector("[data-chosen]").textContent = files.length === 1 ? files[0].file.name : photos;
  form.querySelector("#new-name").value = arrange(files, { isNew: true }).name;
  openDialog("what-for");
}

/** It could not begin: the files are still chosen, and another answer may do. */
function askAgain(problem) {
  say(form.querySelector("[data-problem]"), problem);
  openDialog("what-for");
}

function aim() {
  return form.elements.aim.value;
}

function showAim() {
  for (const part of form.querySelectorAll(".aim-part")) part.hidden = part.dataset.aim !== aim();
}

form.addEventListener("change", showAim);
form.addEventListener("input", () => say(form.querySelector("[data-problem]"), ""));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  dialog.close();
  send(chosen, aim());
});

for (const button of document.querySelectorAll("[data-choose]")) {
  button.addEventListener("click", () => document.getElementById(button.dataset.choose).click());
}
for (const input of document.querySelectorAll("#choose-folder, #choose-photos")) {
  input.addEventListener("change", () => {
    ask(filesFromInput(input));
    input.value = "";
  });
}

document.getElementById("use-camera").addEventListener("click", () => {
  openCamera(gettext("Take a photo"), (file) => ask([{ file, path: file.name }], "classify"));
});

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  zone.classList.add("is-over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) zone.classList.remove("is-over");
});
document.addEventListener("drop", async (event) => {
  zone.classList.remove("is-over");
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  ask(await filesFromDrop(event.dataTransfer));
});

// Sending --------------------------------------------------------------------------------------------

/** Where photos for a purpose go; a label that is new is made now. */
async function addressFor(purpose) {
  if (purpose === "add") return form.querySelector("#add-to").value;
  if (purpose === "classify") return form.querySelector("#classify-by").value;
  return purpose === "examples" ? (await labels.chosen()).intakeUrl : home.dataset.startUrl;
}

async function send(files, purpose) {
  isSending = true;
  const name = form.querySelector("#new-name").value;
  const intoFolders = purpose === "new" || purpose === "add";
  const arranged = intoFolders ? arrange(files, { isNew: purpose === "new" }).files : files;
  const shown = showSending(card, gettext("Sending photos"));
  zone.hidden = true;
  let opened = null;
  const open = async (said) => {
    // What follows the first import of a new collection (photos beside a zip) goes into the same one.
    opened = await request(opened?.openUrl ?? (await addressFor(purpose)), { json: { name, ...said }, signal: shown.signal });
    return opened;
  };
  try {
    const { answers } = await upload(arranged, { open, onProgress: shown.update, signal: shown.signal });
    location.assign(answers[0].pageUrl);
  } catch (error) {
    isSending = false;
    zone.hidden = false;
    if (opened) explain(shown, error, opened.pageUrl);
    else {
      card.hidden = true;
      if (error.name !== "AbortError") askAgain(error.message);
    }
  }
}

/** It stopped half-way: what was sent is where it was meant to go, and can go on there. */
function explain(shown, error, pageUrl) {
  shown.end();
  shown.say(error.name === "AbortError" ? gettext("Stopped. What was sent stays.") : error.message);
  card.append(element("div", {}, element("a", { class: "button small", href: pageUrl }, gettext("Go to what was sent"))));
}

// What runs ------------------------------------------------------------------------------------------

const running = document.getElementById("running");

function show(summary) {
  if (!running) return;
  const rows = running.querySelector(".jobs");
  let row = document.getElementById(`job-${summary.id}`);
  if (!isActive(summary)) row?.remove();
  else {
    const fresh = jobRow(summary);
    if (row) row.replaceWith(fresh);
    else rows.append(fresh);
  }
  running.hidden = !rows.childElementCount;
}

function jobRow({ id, title, url, done, total, stateText }) {
  const much = total ? gettext("%(done)s of %(total)s").replace("%(done)s", done.toLocaleString()).replace("%(total)s", total.toLocaleString()) : stateText;
  const bar = element("progress", total ? { class: "meter", value: done, max: total } : { class: "meter" });
  return element("a", { class: "job", id: `job-${id}`, href: url }, element("span", { class: "what" }, title), element("small", {}, much), bar);
}

onSummary(show);
