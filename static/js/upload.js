// Photos on their way to the server: a manifest says what is there, each photo goes up in one PUT that can be repeated,
// a zip in hashed chunks. Losing the network costs time and nothing else; the same files again go on where it stopped.
import { element, request, RequestError, toast } from "./app.js";

const PARALLEL = 5;
const HASHING = 4;
const FIRST_BATCH = { files: 40, bytes: 8e6 }; // small, so that the first photo is under way at once
const BATCH = { files: 500, bytes: 64e6 };
const MAX_HASHED_BYTES = 64 * 1024 ** 2; // larger ones are refused anyway
const PAUSES_MS = [400, 800, 1600, 3000, 6000, 10000, 15000];
const PATIENCE = { 0: Infinity, 422: 3, 507: 5 }; // tries by status; others that may pass get eight
const TELL_EVERY_MS = 100;
const RATE_OVER_MS = 6000;

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);
const fill = (text, values) => text.replace(/%\((\w+)\)s/g, (_, name) => values[name]);

// What was chosen -----------------------------------------------------------------------------------

/** All files of a drop, folders included: [{file, path}], paths beginning with the folder; says so where there are none. */
export async function filesFromDrop(dataTransfer) {
  // The list is emptied when the event is over: take its entries before the first wait.
  const items = [...dataTransfer.items].filter((item) => item.kind === "file");
  const roots = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
  const found = [];
  for (const root of roots) {
    if (root instanceof File) found.push({ file: root, path: root.name });
    else await walk(root, "", found);
  }
  if (roots.length && !found.length) {
    const names = roots.map((root) => `“${root.name}”`).join(", ");
    toast(fill(gettext("%(names)s: 0 files in it, so there is nothing to upload. Drop a folder that has photos in it."), { names }), { kind: "warn" });
  }
  return found;
}

/** The files of an <input type="file">, with or without webkitdirectory: [{file, path}]. */
export function filesFromInput(input) {
  const found = [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
  return found.filter(({ path }) => !path.split("/").slice(0, -1).some(isHidden));
}

/**
 * What the chosen files mean for a collection: {name, files}. A single folder with sub-folders gives the collection its
 * name and is no category; one that holds photos directly is a category only of a collection that is there already.
 */
export function arrange(files, { isNew }) {
  if (files.length === 1 && isZip(files[0].file)) return { name: files[0].file.name.replace(/\.zip$/i, ""), files };
  const roots = new Set(files.map(({ path }) => (path.includes("/") ? path.slice(0, path.indexOf("/")) : "")));
  const [root] = roots;
  if (roots.size !== 1 || !root) return { name: "", files };
  const hasFolders = files.some(({ path }) => path.split("/").length > 2);
  if (!isNew && !hasFolders) return { name: root, files };
  return { name: root, files: files.map(({ file, path }) => ({ file, path: path.slice(root.length + 1) })) };
}

export function isZip(file) {
  return /\.zip$/i.test(file.name) || file.type === "application/zip";
}

async function walk(entry, folder, found) {
  const path = folder + entry.name;
  if (entry.isFile) {
    const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
    if (file) found.push({ file, path });
    return;
  }
  if (isHidden(entry.name)) return;
  const reader = entry.createReader();
  for (;;) {
    // It answers a hundred at a time, and an empty list at the end.
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!some.length) return;
    for (const child of some) await walk(child, `${path}/`, found);
  }
}

function isHidden(name) {
  return name.startsWith(".") || name === "__MACOSX";
}

// Sending ---------------------------------------------------------------------------------------------

/**
 * Send files, [{file, path}], and answer when all of them are with the server.
 *
 * `open(said)` posts the first manifest ({files} or {archive}, to which it may add) and returns the server's answer.
 * `onProgress(progress)` hears some ten times a second: {phase: "preparing" | "sending" | "waiting" | "done", files, filesDone,
 * bytes, bytesDone, rate (bytes/s), secondsLeft, answer}; "waiting" says that the network or the server is away.
 * `signal` stops it; what was sent stays. Photos go first, in one import; each zip is one of its own.
 *
 * Answers {answers: [server's answers to open], failed: [{path, reason}]}. Throws a RequestError that a person can read.
 */
export async function upload(files, { open, onProgress = () => {}, signal } = {}) {
  const sending = new Sending(withOwnPaths(files), onProgress, signal);
  const release = holdPage();
  try {
    const photos = sending.files.filter(({ file }) => !isZip(file));
    if (photos.length) await sending.sendPhotos(photos, open);
    for (const { file } of sending.files.filter(({ file }) => isZip(file))) await sending.sendZip(file, open);
    sending.tell("done", true);
    return { answers: sending.answers, failed: sending.failed };
  } catch (error) {
    sending.stop.abort();
    throw error;
  } finally {
    release();
  }
}

/** "312 of 2,000 · 14.2 MB/s · 40 s left", for a line beside the bar. */
export function describeProgress(progress) {
  const count = fill(ngettext("%(done)s of %(n)s photo sent", "%(done)s of %(n)s photos sent", progress.files), {
    done: progress.filesDone.toLocaleString(),
    n: progress.files.toLocaleString(),
  });
  const share = progress.hasArchive ? `${Math.floor((100 * progress.bytesDone) / Math.max(1, progress.bytes))} %` : count;
  if (progress.phase === "waiting") return `${share} · ${gettext("waiting for the connection")}`;
  if (progress.phase === "done" || !progress.rate) return share;
  const rate = fill(gettext("%(n)s MB/s"), { n: (progress.rate / 1e6).toFixed(1) });
  return [share, rate, timeLeft(progress.secondsLeft)].filter(Boolean).join(" · ");
}

export function timeLeft(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 90) return fill(gettext("%(n)s s left"), { n: Math.max(1, Math.round(seconds)) });
  if (seconds < 5400) return fill(gettext("%(n)s min left"), { n: Math.round(seconds / 60) });
  return fill(gettext("%(n)s h left"), { n: (seconds / 3600).toFixed(1) });
}

/** Fill a card with a bar for an upload; answers {update(progress), say(sentence), signal}. Its button stops the upload. */
export function showSending(card, title) {
  const stop = new AbortController();
  const bar = element("progress", { class: "meter thick", max: 1 });
  const line = element("small");
  const button = element("button", { type: "button", class: "button small", onclick: () => stop.abort() }, gettext("Stop"));
  card.replaceChildren(element("div", { class: "row spread" }, element("h2", {}, title), button), bar, line);
  card.hidden = false;
  const update = (progress) => {
    if (progress.bytes) bar.value = progress.bytesDone / progress.bytes;
    line.textContent = describeProgress(progress);
  };
  return { update, signal: stop.signal, say: (sentence) => { line.textContent = sentence; }, end: () => button.remove() };
}

class Sending {
  constructor(files, onProgress, signal) {
    this.files = files;
    this.onProgress = onProgress;
    this.stop = new AbortController();
    signal?.addEventListener("abort", () => this.stop.abort(signal.reason), { once: true });
    if (signal?.aborted) this.stop.abort(signal.reason);
    this.signal = this.stop.signal;
    this.answers = [];
    this.failed = [];
    this.bytes = files.reduce((sum, { file }) => sum + file.size, 0);
    this.bytesDone = this.filesDone = this.waiting = this.toldAt = 0;
    this.samples = [];
  }

  async sendPhotos(photos, open) {
    const byPath = new Map(photos.map((photo) => [photo.path, photo.file]));
    const batches = inBatches(photos);
    const slots = new Slots(PARALLEL, this.signal);
    this.tell("preparing", true);
    let coming = this.describe(batches[0]);
    for (let n = 0; n < batches.length; n++) {
      const said = await coming;
      coming = n + 1 < batches.length ? this.describe(batches[n + 1]) : null;
      coming?.catch(() => {}); // it is heard when its turn comes
      const answer = await this.announce(said, open);
      for (const { path, url, reason, state } of answer.files) {
        const file = byPath.get(path);
        if (url && file) await slots.run(() => this.putPhoto(url, file, path));
        else this.count(file?.size ?? 0, 1, { path, reason, state });
      }
    }
    await slots.empty();
    await this.patiently(() => request(this.answer.closeUrl, { method: "POST", signal: this.signal }));
  }

  async announce(files, open) {
    if (this.answer) {
      return this.patiently(() => request(this.answer.manifestUrl, { json: { files }, signal: this.signal }));
    }
    return this.begin({ files }, open);
  }

  async begin(said, open) {
    // Only a request that never arrived is repeated: one whose answer was lost would open a second import.
    this.answer = await open(said);
    this.answers.push(this.answer);
    this.tell("sending", true);
    return this.answer;
  }

  describe(batch) {
    return inParallel(HASHING, batch, async ({ file, path }) => ({ path, size: file.size, sha256: await hashOf(file) }));
  }

  async putPhoto(url, file, path) {
    try {
      await this.patiently(() => this.put(url, file), file);
    } catch (error) {
      if (this.signal.aborted || !isAboutOneFile(error)) throw error;
      this.failed.push({ path, reason: error.message });
    }
    this.count(file.size, 1);
  }

  async sendZip(file, open) {
    this.hasArchive = true;
    let answer = await this.begin({ archive: { name: file.name, size: file.size } }, open);
    let missing = answer.chunks.missing;
    const { size, urlTemplate } = answer.chunks;
    this.count(file.size - missing.reduce((sum, n) => sum + file.slice(n * size, (n + 1) * size).size, 0), 0);
    for (let round = 0; missing.length && round < 3; round++) {
      const slots = new Slots(2, this.signal);
      for (const n of missing) {
        await slots.run(() => this.putChunk(urlTemplate.replace("{n}", n), file.slice(n * size, (n + 1) * size), round));
      }
      await slots.empty();
      missing = (await this.patiently(() => request(answer.statusUrl, { signal: this.signal }))).chunks?.missing ?? [];
    }
    await this.patiently(() => request(answer.closeUrl, { method: "POST", signal: this.signal }));
    this.count(0, 1);
  }

  async putChunk(url, chunk, round) {
    const sha256 = await digest(chunk);
    await this.patiently(() => this.put(url, chunk, sha256 ? { "X-Content-SHA256": sha256 } : {}), chunk);
    if (round === 0) this.count(chunk.size, 0);
  }

  put(url, body, headers = {}) {
    return request(url, { method: "PUT", body, headers: { "Content-Type": "application/octet-stream", ...headers }, signal: this.signal });
  }

  /** Try again what may pass: the network away, the server restarting, bytes that arrived damaged. */
  async patiently(ask, source = null) {
    for (let tries = 1; ; tries++) {
      try {
        return await ask();
      } catch (error) {
        if (!mayPass(error) || tries >= (PATIENCE[error.status] ?? 8)) throw error;
        if (error.status === 0 && source && !(await isReadable(source))) {
          throw new RequestError(gettext("The file cannot be read any more: it was moved or changed."), 422, null);
        }
        await this.wait(PAUSES_MS[Math.min(tries, PAUSES_MS.length) - 1] * (0.75 + Math.random() / 2));
      }
    }
  }

  async wait(ms) {
    this.waiting += 1;
    this.tell("waiting", true);
    try {
      await pause(ms, this.signal);
    } finally {
      this.waiting -= 1;
    }
  }

  count(bytes, files, outcome = null) {
    this.bytesDone += bytes;
    this.filesDone += files;
    if (outcome?.state === "refused") this.failed.push({ path: outcome.path, reason: outcome.reason });
    this.tell(this.waiting ? "waiting" : "sending");
  }

  tell(phase, atOnce = false) {
    const now = performance.now();
    if (!atOnce && now - this.toldAt < TELL_EVERY_MS) return;
    this.toldAt = now;
    this.samples.push({ now, bytes: this.bytesDone });
    while (this.samples.length > 2 && now - this.samples[0].now > RATE_OVER_MS) this.samples.shift();
    const [oldest] = this.samples;
    const rate = now > oldest.now ? (1000 * (this.bytesDone - oldest.bytes)) / (now - oldest.now) : 0;
    this.onProgress({
      phase,
      files: this.files.length,
      filesDone: this.filesDone,
      bytes: this.bytes,
      bytesDone: this.bytesDone,
      rate,
      secondsLeft: rate > 0 ? (this.bytes - this.bytesDone) / rate : Infinity,
      hasArchive: Boolean(this.hasArchive),
      answer: this.answer ?? null,
    });
  }
}

/** At most so many at a time; the first failure stops the rest. */
class Slots {
  constructor(size, signal) {
    this.size = size;
    this.signal = signal;
    this.running = new Set();
    this.failure = null;
  }

  async run(work) {
    while (this.running.size >= this.size) await Promise.race(this.running);
    this.check();
    const going = work()
      .catch((error) => { this.failure ??= error; })
      .finally(() => this.running.delete(going));
    this.running.add(going);
  }

  async empty() {
    await Promise.all(this.running);
    this.check();
  }

  check() {
    if (this.failure) throw this.failure;
    this.signal.throwIfAborted();
  }
}

function inBatches(files) {
  const batches = [];
  let limit = FIRST_BATCH;
  let batch = [];
  let bytes = 0;
  for (const one of files) {
    if (batch.length && (batch.length >= limit.files || bytes + one.file.size > limit.bytes)) {
      batches.push(batch);
      [batch, bytes, limit] = [[], 0, BATCH];
    }
    batch.push(one);
    bytes += one.file.size;
  }
  return [...batches, batch];
}

async function inParallel(width, items, work) {
  const results = new Array(items.length);
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const n = next++;
      results[n] = await work(items[n]);
    }
  };
  await Promise.all(Array.from({ length: width }, worker));
  return results;
}

/** Its sha256, or "" where the browser cannot hash (plain HTTP), the file is no picture, or it cannot be read. */
async function hashOf(file) {
  const isPicture = file.type === "" || file.type.startsWith("image/");
  return isPicture && file.size <= MAX_HASHED_BYTES ? digest(file) : "";
}

async function digest(blob) {
  if (!globalThis.crypto?.subtle) return "";
  try {
    const hash = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
    return Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("");
  } catch {
    return "";
  }
}

/** Paths as the server keeps them, each once: several photos of the same name may be chosen from several places. */
function withOwnPaths(files) {
  const taken = new Set();
  return files.map(({ file, path }) => {
    const clean = Array.from((path.toWellFormed?.() ?? path).replaceAll("\0", "")).slice(0, 990).join("");
    let own = clean;
    for (let n = 2; taken.has(own); n++) own = clean.replace(/(\.[^./]*)?$/, ` (${n})$1`);
    taken.add(own);
    return { file, path: own };
  });
}

function mayPass(error) {
  return error instanceof RequestError && (error.status === 0 || error.status === 408 || error.status === 422 || error.status === 429 || error.status >= 500);
}

function isAboutOneFile(error) {
  return error instanceof RequestError && (error.status === 413 || error.status === 422);
}

async function isReadable(blob) {
  try {
    await blob.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}

/** A pause that ends early when the browser comes online, and with an error when the signal says stop. */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const end = (how) => {
      clearTimeout(timer);
      window.removeEventListener("online", onOnline);
      signal.removeEventListener("abort", onAbort);
      how();
    };
    const onOnline = () => end(resolve);
    const onAbort = () => end(() => reject(signal.reason));
    const timer = setTimeout(() => end(resolve), ms);
    window.addEventListener("online", onOnline);
    signal.addEventListener("abort", onAbort);
    if (signal.aborted) onAbort();
  });
}

let held = 0;

/** While something is unsent, leaving the page asks first. */
function holdPage() {
  if (held++ === 0) window.addEventListener("beforeunload", warn);
  return () => {
    if (--held === 0) window.removeEventListener("beforeunload", warn);
  };
}

function warn(event) {
  event.preventDefault();
  event.returnValue = "";
}
