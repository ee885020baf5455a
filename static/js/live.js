// The one socket of a page: what happens to jobs, as it happens.
// Events are numbered rows in the database; the socket brings all that are kept in order and once, and after every
// interruption it asks for what came after the last number seen.
import { element, icon } from "./app.js";

const AWAY_NOTE_MS = 3000;
const QUIET_MS = 5000; // a hint may be lost with the Redis that carried it: while jobs run, ask again after this silence
const PING_MS = 25000; // and this often when nothing runs, to notice a connection that died silently
const ANSWER_MS = 8000;
const BACK_OFF_MS = [250, 500, 1000, 2000, 4000, 8000, 15000];
const LOGGED_OUT = 4401;

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const ngettext = (one, many, n) => (window.ngettext ? window.ngettext(one, many, n) : n === 1 ? one : many);

class Live extends EventTarget {
  state = "connecting"; // connecting | open | away | closed
  socket = null;
  watchers = new Map(); // job id -> Set of {last, isReady, onEvents}
  asked = new Map(); // callbacks for summaries -> function that names the jobs to ask for, or null
  active = null; // ids of the user's active jobs, once known
  failures = 0;
  heardAt = 0;
  retryTimer = 0;
  answerTimer = 0;
  noteTimer = 0;

  start() {
    this.connect();
    setInterval(() => this.tick(), 1000);
    const wake = () => document.visibilityState === "visible" && this.wake();
    document.addEventListener("visibilitychange", wake);
    window.addEventListener("online", wake);
    window.addEventListener("pageshow", (event) => event.persisted && this.wake());
    window.addEventListener("pagehide", () => {
      clearTimeout(this.noteTimer);
      this.socket?.close(1000);
    });
  }

  // The connection ---------------------------------------------------------------------------------

  connect() {
    clearTimeout(this.retryTimer);
    if (this.socket || this.state === "closed") return;
    const url = new URL("/ws/", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = (this.socket = new WebSocket(url));
    socket.onopen = () => this.opened();
    socket.onmessage = (message) => this.heard(JSON.parse(message.data));
    socket.onclose = (event) => this.socket === socket && this.lost(event.code);
    this.expectAnswer(ANSWER_MS);
  }

  /** A server that does not answer in time is taken for gone; a browser would wait for minutes. */
  expectAnswer(patience) {
    clearTimeout(this.answerTimer);
    this.answerTimer = setTimeout(() => this.abandon(), patience);
  }

  abandon() {
    const socket = this.socket;
    if (!socket) return;
    socket.onclose = socket.onmessage = socket.onopen = null;
    socket.close();
    this.lost(1006);
  }

  opened() {
    this.failures = 0;
    clearTimeout(this.noteTimer);
    this.setState("open");
    for (const watchers of this.watchers.values()) for (const watcher of watchers) watcher.isReady = false;
    this.refresh();
    this.subscribe([...this.watchers.keys()]);
  }

  lost(code) {
    const wasOpen = this.state === "open";
    this.socket = null;
    clearTimeout(this.answerTimer);
    this.answerTimer = 0;
    if (code === LOGGED_OUT) return this.logIn();
    if (wasOpen || this.failures === 0) {
      clearTimeout(this.noteTimer);
      this.noteTimer = setTimeout(() => this.setState("away"), AWAY_NOTE_MS);
    }
    if (this.state === "open") this.setState("connecting");
    // A refused handshake does not say why: a server that is away looks like a session that is over.
    if (!wasOpen && this.failures % 3 === 1) this.checkSession();
    const pause = BACK_OFF_MS[Math.min(this.failures++, BACK_OFF_MS.length - 1)];
    this.retryTimer = setTimeout(() => this.connect(), pause * (0.5 + Math.random()));
  }

  /** Back in front of the person, or online: do not wait for the next try. */
  wake() {
    if (this.state === "open") return this.refresh(3000);
    this.abandon(); // it may hang in a network that is gone
    this.failures = 0;
    this.connect();
  }

  tick() {
    if (this.state !== "open" || document.visibilityState !== "visible") return;
    const silence = performance.now() - this.heardAt;
    const isWaiting = this.active?.size > 0;
    if (silence > (isWaiting ? QUIET_MS : PING_MS) && !this.answerTimer) {
      this.refresh();
      if (isWaiting) this.subscribe([...this.watchers.keys()]);
    }
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  /** Ask how things stand. */
  refresh(patience = ANSWER_MS) {
    const ids = new Set();
    for (const naming of this.asked.values()) for (const id of naming?.() ?? []) ids.add(id);
    this.send({ refresh: [...ids] });
    this.expectAnswer(patience);
  }

  subscribe(jobs) {
    const wanted = {};
    for (const job of jobs) wanted[job] = Math.min(...[...this.watchers.get(job)].map((watcher) => watcher.last));
    if (jobs.length) this.send({ subscribe: wanted });
  }

  async checkSession() {
    const pill = document.getElementById("jobs-pill");
    if (!pill) return;
    try {
      const answer = await fetch(new URL("running/", pill.href), { headers: { Accept: "application/json" }, redirect: "manual" });
      if (answer.type === "opaqueredirect" || answer.status === 401) this.logIn();
      else if (answer.ok) this.heard(await answer.json());
    } catch {
      // The server is away: the next try will tell.
    }
  }

  /** The session is over. The same address leads to the login page, and back here after it. */
  logIn() {
    this.state = "closed";
    location.assign(location.pathname + location.search);
  }

  setState(state) {
    if (this.state === "closed" || this.state === state) return;
    this.state = state;
    showNote(state === "away");
    this.dispatchEvent(new Event("change"));
  }

  // What comes in ------------------------------------------------------------------------------------

  heard(message) {
    this.heardAt = performance.now();
    clearTimeout(this.answerTimer);
    this.answerTimer = 0;
    if (message.subscribed) this.settle(message.subscribed, message.after);
    else if (message.events) this.deliver(message.job, message.events);
    else if (message.summary) this.summarise([message.summary]);
    else if (message.active) {
      this.active = new Set(message.active.map((summary) => summary.id));
      this.summarise([...message.active, ...(message.asked ?? [])]);
    } else if (message.refused) this.watchers.delete(message.refused);
  }

  /** From here on the server sends everything after that number: whoever has seen as much may listen. */
  settle(job, after) {
    for (const watcher of this.watchers.get(job) ?? []) watcher.isReady ||= after <= watcher.last;
  }

  deliver(job, events) {
    for (const watcher of [...(this.watchers.get(job) ?? [])]) {
      const fresh = watcher.isReady ? events.filter((event) => event.number > watcher.last) : [];
      if (!fresh.length) continue;
      watcher.last = fresh.at(-1).number;
      guarded(() => watcher.onEvents(fresh));
    }
  }

  summarise(summaries) {
    this.active ??= new Set();
    for (const summary of summaries) {
      if (isActive(summary)) this.active.add(summary.id);
      else this.active.delete(summary.id);
      for (const callback of [...this.asked.keys()]) guarded(() => callback(summary));
    }
    showPill(this.active.size);
  }
}

function guarded(call) {
  try {
    call();
  } catch (error) {
    reportError(error); // one listener's fault is not the others'
  }
}

function showPill(count) {
  const pill = document.getElementById("jobs-pill");
  if (!pill) return;
  pill.hidden = count === 0;
  const text = pill.querySelector("[data-jobs-text]") ?? pill;
  text.textContent = ngettext("%s job running", "%s jobs running", count).replace("%s", count);
}

function showNote(isAway) {
  document.getElementById("live-note")?.remove();
  if (!isAway) return;
  document.body.append(element("div", { id: "live-note", class: "live-note", role: "status" }, icon("refresh"), gettext("Reconnecting…")));
}

// The page asks for this file by its fingerprinted name and modules import it by its plain one:
// both must share one socket.
function shared() {
  if (!window.studioLive) {
    window.studioLive = new Live();
    window.studioLive.start();
  }
  return window.studioLive;
}

// What pages use -----------------------------------------------------------------------------------

/** Is the job of this summary still to be waited for? */
export function isActive(summary) {
  return summary.state === "queued" || summary.state === "running";
}

/**
 * Hear of a job's events after the last number the page shows: `onEvents([{number, type, data, at}, …])`, in order,
 * each once, whatever happens to the connection. Answers a function that stops it.
 */
export function watch(jobId, lastNumber, onEvents) {
  const live = shared();
  const watcher = { last: Number(lastNumber) || 0, isReady: false, onEvents };
  if (!live.watchers.has(jobId)) live.watchers.set(jobId, new Set());
  live.watchers.get(jobId).add(watcher);
  live.subscribe([jobId]);
  return () => {
    const watchers = live.watchers.get(jobId);
    if (!watchers?.delete(watcher) || watchers.size) return;
    live.watchers.delete(jobId);
    live.send({ unsubscribe: [jobId] });
  };
}

/**
 * Hear how any of the user's jobs stands whenever that changes: `callback(summary)`. `naming` names jobs whose state
 * is asked for after an interruption, beside the active ones. Answers a function that stops it.
 */
export function onSummary(callback, naming = null) {
  const live = shared();
  live.asked.set(callback, naming);
  if (live.state === "open") live.refresh();
  return () => live.asked.delete(callback);
}

/** `connection.state`: connecting, open, away (for a while) or closed; it tells of changes by "change" events. */
export const connection = shared();
