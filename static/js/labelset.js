// The page of a label set: its labels and their examples. What is classified with them is results.js's part.
import { element, openDialog, request, toast, toastError } from "./app.js";
import { watch } from "./live.js";
import { filesFromInput, upload } from "./upload.js";
import { openCamera } from "./camera.js";
import { announce, gatherErrors, morph, parse, sayOnce, throttled } from "./morphing.js";
import { classify, showTab, takeDrops } from "./results.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);

const labelSet = JSON.parse(document.getElementById("label-set-state").textContent);
const picked = new Set(); // ids of photos chosen in the picker, kept over its pages
const wired = new WeakSet();
let aim = null; // {card, replaces}: which label the photos of the open dialog are for
let toFocus = "";
let pickerAsked = 0;

const refreshLabels = throttled(async () => {
  const url = new URL(labelSet.labelsUrl, location.href);
  url.search = new URLSearchParams({ labels: new URLSearchParams(location.search).get("labels") ?? "0" });
  const html = await request(url, { headers: { Accept: "text/html" } });
  const uploads = new Map([...document.querySelectorAll(".label .is-arriving")].map((node) => [node, node.closest(".label").id]));
  for (const node of uploads.keys()) node.remove();
  morph(html);
  for (const [node, card] of uploads) document.querySelector(`#${CSS.escape(card)} .thumb.add`)?.before(node);
  wireCards();
  const goal = toFocus && document.getElementById(toFocus);
  if (goal) {
    // A fragment asked for before the gesture has no such card yet: the next one has.
    if (!document.getElementById("new-label-name").value) goal.focus(); // unless the next label is being written
    toFocus = "";
  }
});

watch(labelSet.job, labelSet.lastEvent, (events) => {
  for (const event of events) {
    if (event.type === "failed") toast(event.data.error || gettext("The labels could not be learned."), { kind: "bad" });
  }
  refreshLabels();
});

// Gestures: a form that answers with a sentence and an undo ------------------------------------------

async function gesture(url, body) {
  const said = await request(url, { method: "POST", body });
  if (said.label && said.undo) announce(said.message);
  else if (said.message) sayOnce(said.message, said.undo ? { action: gettext("Undo"), onAction: () => perform(said.undo) } : {});
  if (said.label) toFocus = `add-${said.label}`;
  await refreshLabels();
  return said;
}

async function perform(url, body = new FormData()) {
  try {
    return await gesture(url, body);
  } catch (error) {
    toastError(error);
    return null;
  }
}

async function onSubmit(event) {
  const form = event.target;
  if (form.dataset.gesture === undefined && form.id !== "picker-form") return;
  event.preventDefault();
  if (form.id === "picker-form") return addPicked(form);
  const url = event.submitter?.hasAttribute("formaction") ? event.submitter.formAction : form.action;
  const card = event.submitter?.closest(".thumb")?.closest(".label");
  if (card) toFocus = `add-${card.dataset.label}`;
  const body = new FormData(form);
  const isNew = form.dataset.gesture === "new-label";
  if (isNew) form.reset(); // at once: whoever writes the next one does not wait for the answer
  const said = await perform(url, body);
  if (!said && isNew) form.elements.name.value ||= body.get("name");
  if (!said && form.dataset.gesture === "rename") form.reset();
}

function onChange(event) {
  const target = event.target;
  if (target.matches(".name-input")) {
    if (target.value.trim() && target.value !== target.defaultValue) target.form.requestSubmit();
    else target.value = target.defaultValue;
  } else if (target.matches("#example-files")) {
    const files = filesFromInput(target);
    target.value = "";
    document.getElementById("add-examples").close();
    addFiles(aim.card, files, aim.replaces);
  } else if (target.matches("#picker-choice select")) loadPicker(pickerQuery());
  else if (target.matches('#picker [name="photos"]')) {
    if (target.checked) picked.add(target.value);
    else picked.delete(target.value);
    countPicked();
  }
}

// Examples -------------------------------------------------------------------------------------------

/** Upload photos as examples of a card's label; they are seen at once, and settle when they were taken in. */
async function addFiles(card, files, replaces = null) {
  if (!files.length) return;
  if (replaces) files = files.slice(0, 1);
  const arriving = files.slice(0, 14).map(({ file }) => showArriving(card, file));
  const done = () => arriving.forEach((node) => node.remove());
  try {
    const url = card.dataset.intakeUrl;
    const { answers, failed } = await upload(files, { open: (manifest) => request(url, { json: { ...manifest, replaces } }) });
    gatherErrors(failed);
    await Promise.all(answers.map(taken));
    const n = files.length - failed.length;
    if (n > 0) announce(ngettext("%(n)s photo added to %(name)s", "%(n)s photos added to %(name)s", n).replace("%(n)s", n).replace("%(name)s", card.dataset.name));
  } catch (error) {
    toastError(error);
  } finally {
    done();
    refreshLabels();
  }
}

/** Wait until an upload was looked at to its end, and say what was no photo. */
function taken(answer) {
  return new Promise((resolve) => {
    const stop = watch(answer.job, answer.lastEvent, async (events) => {
      if (!events.some((event) => ["idle", "succeeded", "failed"].includes(event.type))) return;
      const said = await request(answer.statusUrl).catch(() => null);
      if (said && said.report.state !== "done" && said.job.state !== "failed") return;
      stop();
      if (said) gatherErrors(said.files.filter((file) => file.state === "refused"));
      resolve();
    });
  });
}

function showArriving(card, file) {
  const url = URL.createObjectURL(file);
  const picture = element("img", { src: url, alt: gettext("being added"), onload: () => URL.revokeObjectURL(url) });
  const node = element("div", { class: "thumb is-arriving" }, picture);
  card.querySelector(".thumb.add").before(node);
  return node;
}

function ask(card, replaces = null) {
  aim = { card, replaces };
  const title = document.getElementById("add-examples-title");
  title.textContent = (replaces ? title.dataset.titleReplace : title.dataset.title).replace("%(name)s", card.dataset.name);
  document.getElementById("example-files").multiple = !replaces;
  openDialog("add-examples");
}

async function loadPicker(query = "") {
  const asked = ++pickerAsked;
  try {
    const url = aim.card.dataset.pickUrl + (query ? `?${query}` : "");
    const fragment = parse(await request(url, { headers: { Accept: "text/html" } }));
    if (asked !== pickerAsked) return;
    document.getElementById("picker-title").textContent = document.getElementById("add-examples-title").textContent;
    document.getElementById("picker-content").replaceChildren(...fragment.children);
    for (const box of document.querySelectorAll('#picker [name="photos"]')) box.checked = picked.has(box.value);
    countPicked();
    openDialog("picker");
  } catch (error) {
    toastError(error);
  }
}

function pickerQuery(page = "") {
  const { collection, category } = document.getElementById("picker-choice").elements;
  const isOther = collection.value !== collection.querySelector("[selected]")?.value;
  return new URLSearchParams({ collection: collection.value, category: isOther ? "" : category.value, page });
}

function countPicked() {
  const button = document.getElementById("picker-add");
  if (!button) return;
  button.disabled = picked.size === 0 || Boolean(aim.replaces && picked.size !== 1);
  document.getElementById("picker-count").textContent = picked.size || "";
}

async function addPicked(form) {
  const json = { photos: [...picked], replaces: aim.replaces };
  try {
    const said = await request(form.action, { json });
    document.getElementById("picker").close();
    sayOnce(said.message);
    toFocus = `add-${said.label}`;
    await refreshLabels();
  } catch (error) {
    toastError(error);
  }
}

// Wiring ---------------------------------------------------------------------------------------------

function onClick(event) {
  const target = event.target.closest("button, a[data-add], a[data-replace], #picker a[data-page]");
  if (!target) return;
  if (target.matches("a")) {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
  }
  const card = target.closest(".label");
  if (target.matches("[data-add]")) ask(card);
  else if (target.matches("[data-replace]")) ask(card, target.dataset.replace);
  else if (target.matches("[data-camera]")) {
    openCamera(gettext("Classify with the camera"), (file) => classify([{ file, path: file.name }]));
  } else if (target.id === "pick-example") {
    document.getElementById("add-examples").close();
    picked.clear();
    loadPicker();
  } else if (target.id === "shoot-example") {
    document.getElementById("add-examples").close();
    const { card: goal, replaces } = aim;
    const title = gettext("Take an example of %(name)s").replace("%(name)s", goal.dataset.name);
    openCamera(title, (file) => addFiles(goal, [{ file, path: file.name }], replaces));
  } else if (target.matches("#picker [data-page]")) loadPicker(pickerQuery(target.dataset.page));
}

function wireCards() {
  for (const card of document.querySelectorAll(".label[data-label]")) {
    if (wired.has(card)) continue;
    wired.add(card);
    takeDrops(card, (files) => addFiles(card, files));
  }
}

function onKey(event) {
  if (event.key === "Enter" && event.target.matches("a[data-add], a[data-replace]")) {
    event.preventDefault(); // or the same stroke would press what has the focus in the dialog that opens
    event.target.click();
    return;
  }
  if (event.key !== "Escape" || !event.target.matches(".name-input")) return;
  event.target.value = event.target.defaultValue;
  event.target.blur();
}

document.addEventListener("submit", onSubmit, true); // before app.js takes it for a form that leaves the page
document.addEventListener("change", onChange);
document.addEventListener("click", onClick);
document.addEventListener("keydown", onKey);
wireCards();
if (location.hash.startsWith("#label-")) showTab("labels");
