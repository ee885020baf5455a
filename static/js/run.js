// The page of a training run, live; and the form of a new one, whose consequences follow the numbers.
import { request, toastError } from "./app.js";
import { refresher } from "./activity.js";
import { onSummary, watch } from "./live.js";
import { morph } from "./morphing.js";
import { lineChart } from "./chart.js";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);
const language = document.documentElement.lang || undefined;
const format = (digits) => new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
const MAX_STEPS = 1500;

// A run --------------------------------------------------------------------------------------------

class RunPage {
  evaluations = [];
  steps = [];
  baseline = null;
  way = 0;

  constructor(node) {
    this.job = node.dataset.jobId;
    this.state = node.dataset.state;
    this.curvesUrl = node.dataset.curvesUrl;
    this.refresh = refresher(node.dataset.panelUrl);
    this.last = Number(node.dataset.last);
  }

  async start() {
    // What the curves say may be newer than the page; events that come twice change nothing.
    await this.loadCurves();
    watch(this.job, this.last, (events) => this.heard(events));
    onSummary((summary) => summary.id === this.job && this.stands(summary), () => [this.job]);
  }

  async loadCurves() {
    try {
      const curves = await request(this.curvesUrl);
      this.total = curves.total;
      this.way = curves.way;
      this.baseline = curves.baseline;
      this.evaluations = curves.evaluations.map(([episode, accuracy, ci95]) => [episode, 100 * accuracy, 100 * ci95]);
      this.steps = curves.steps;
    } catch (error) {
      toastError(error);
    }
    this.draw();
  }

  heard(events) {
    let isStep = false;
    const isWhole = events[0].number === this.last + 1; // the steps of a long run are thinned: the curves have them all
    this.last = events.at(-1).number;
    for (const { type, data } of events) {
      if (type === "step") {
        isStep = true;
        append(this.steps, [data.episode, data.loss]);
        this.latest = data;
      } else if (type === "evaluation") append(this.evaluations, [data.episode, 100 * data.accuracy, 100 * data.ci95]);
    }
    if (this.steps.length > MAX_STEPS) this.steps = halved(this.steps);
    if (isStep) this.showStep(this.latest);
    this.draw();
    if (!isWhole || events.some(({ type }) => type === "started")) this.loadCurves();
    if (events.some(({ type }) => type !== "step" && type !== "saved" && type !== "preparing")) this.refresh();
  }

  stands(summary) {
    if (summary.state !== this.state) {
      this.state = summary.state;
      this.refresh();
    }
    write("message", summary.message);
  }

  showStep(step) {
    write("loss", format(2).format(step.loss));
    write("speed", format(step.episodes_per_s >= 10 ? 0 : 1).format(step.episodes_per_s));
    write("episode", format(0).format(step.episode));
    write("left", duration(step.seconds_left));
    const part = figure("left-part");
    if (part) part.hidden = false;
    const meter = figure("meter");
    if (meter && this.total) meter.value = (100 * step.episode) / this.total;
  }

  draw() {
    if (!this.total) return;
    this.charts ??= this.makeCharts();
    const chance = 100 / this.way;
    const lines = [{ value: chance, text: `${gettext("guessing")} ${format(chance % 1 ? 1 : 0).format(chance)} %`, token: "--ink-faint", dash: [2, 4] }];
    if (this.baseline !== null) {
      const untrained = 100 * this.baseline;
      lines.unshift({ value: untrained, text: `${gettext("untrained backbone")} ${format(1).format(untrained)} %`, token: "--tone-4", dash: [6, 5] });
    }
    this.charts.accuracy.setData({ points: this.evaluations, lines });
    this.charts.loss.setData({ points: this.steps });
  }

  makeCharts() {
    const reading = (id) => {
      const node = document.getElementById(id);
      const usual = node.textContent;
      return (text) => (node.textContent = text ? `${gettext("episode")} ${text}` : usual);
    };
    return {
      accuracy: lineChart(document.getElementById("accuracy-plot"), { tone: "--tone-1", unit: " %", total: this.total, hasBand: true, hasMarks: true, onReading: reading("accuracy-reading") }),
      loss: lineChart(document.getElementById("loss-plot"), { tone: "--tone-2", digits: 2, total: this.total, from: 0, onReading: reading("loss-reading") }),
    };
  }
}

function figure(name) {
  return document.querySelector(`[data-figure="${name}"]`);
}

function write(name, text) {
  const node = figure(name);
  if (node && text) node.textContent = text;
}

/** Points grow to the right; an episode that is run again after an interruption replaces what lay beyond it. */
function append(points, point) {
  while (points.length && points.at(-1)[0] >= point[0]) points.pop();
  points.push(point);
}

function halved(points) {
  const kept = [];
  for (let i = 0; i < points.length; i += 2) {
    const [first, second] = [points[i], points[i + 1] ?? points[i]];
    kept.push([second[0], (first[1] + second[1]) / 2]);
  }
  return kept;
}

/** As webapp/training/report.py says it. */
function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const filled = (text, values) => text.replace(/%\((\w)\)d/g, (_all, name) => values[name]);
  if (whole < 60) return filled(gettext("%(s)d s"), { s: whole });
  if (whole < 3600) return filled(gettext("%(m)d min %(s)d s"), { m: Math.floor(whole / 60), s: whole % 60 });
  return filled(gettext("%(h)d h %(m)d min"), { h: Math.floor(whole / 3600), m: Math.floor((whole % 3600) / 60) });
}

// A new one ------------------------------------------------------------------------------------------

const USUAL_RATE = { adapt: "0.0001", full: "0.001" };

class NewRun {
  constructor(form) {
    this.form = form;
    this.rate = form.elements.learning_rate;
    form.querySelector("[data-check]").hidden = true;
    for (const presets of form.querySelectorAll("[data-presets]")) presets.hidden = false;
    if (!this.rate.value) this.rate.value = USUAL_RATE[form.elements.kind.value];
    form.addEventListener("input", (event) => this.changed(event));
    form.addEventListener("click", (event) => this.preset(event.target.closest("[data-preset]")));
  }

  changed(event) {
    const isUsual = Object.values(USUAL_RATE).includes(this.rate.value);
    if (event.target.name === "kind" && isUsual) this.rate.value = USUAL_RATE[event.target.value];
    this.soon();
  }

  preset(button) {
    if (!button) return;
    for (const [name, value] of Object.entries(JSON.parse(button.dataset.preset))) this.form.elements[name].value = value;
    this.soon();
  }

  soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), 250);
  }

  async look() {
    this.asking?.abort();
    this.asking = new AbortController();
    const values = new URLSearchParams(new FormData(this.form));
    values.delete("csrfmiddlewaretoken");
    try {
      const html = await request(`${this.form.dataset.notesUrl}?${values}`, { headers: { Accept: "text/html" }, signal: this.asking.signal });
      morph(html);
    } catch (error) {
      toastError(error);
    }
  }
}

const run = document.getElementById("run");
if (run) new RunPage(run).start();
const form = document.getElementById("new-run");
if (form) new NewRun(form);
