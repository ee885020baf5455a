// Line charts over episodes, in the colours of the style sheet: a band around the line, dashed lines to compare with.
import uPlot from "../vendor/uPlot.esm.js";

const number = (digits) => new Intl.NumberFormat(document.documentElement.lang || undefined, { minimumFractionDigits: digits, maximumFractionDigits: digits });
const whole = number(0);
const FONT = "12px ui-sans-serif, system-ui, sans-serif";

/** A colour of the style sheet as the canvas understands it, in the theme of the moment. */
function colour(token, alpha = 1) {
  const probe = document.createElement("i");
  probe.style.color = alpha < 1 ? `color-mix(in srgb, var(${token}) ${alpha * 100}%, transparent)` : `var(${token})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

/**
 * A chart in `box`, which has its height from the style sheet.
 *
 * `tone` is a colour token; `unit` stands behind values; `digits` is their precision; `total` the last episode;
 * `marks` draws a dot at each point. `setData({points: [[x, y, margin?], …], lines: [{value, text, token, dash}]})`
 * draws; `onReading(text)` hears what is under the pointer ("" for nothing).
 */
export function lineChart(box, { tone, unit = "", digits = 1, total, hasBand = false, hasMarks = false, from = null, onReading = () => {} }) {
  let points = [];
  let lines = [];
  let colours = {};
  const format = number(digits);
  const chart = new uPlot(options(), [[0], [null], [null], [null]], box);

  function options() {
    readColours();
    const axis = { font: FONT, stroke: () => colours.faint, ticks: { show: false }, border: { show: false } };
    return {
      width: box.clientWidth || 320,
      height: box.clientHeight || 240,
      padding: [8, 24, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 9, fill: () => colours.tone, stroke: () => colours.card } },
      scales: { x: { time: false, range: () => [0, total] }, y: { range: () => heights() } },
      axes: [
        { ...axis, size: 28, space: 90, grid: { show: false }, values: (_chart, ticks) => ticks.map((tick) => whole.format(tick)) },
        { ...axis, size: 52, space: 44, grid: { stroke: () => colours.line, width: 1 }, values: (_chart, ticks, _axis, _space, step) => ticks.map((tick) => number(Math.max(0, Math.ceil(-Math.log10(step)))).format(tick) + unit) },
      ],
      series: [
        {},
        { stroke: () => colours.tone, width: 2, points: { show: hasMarks, size: 5, width: 0, fill: () => colours.tone }, spanGaps: true },
        { show: true, stroke: "transparent", width: 0, points: { show: false } },
        { show: true, stroke: "transparent", width: 0, points: { show: false } },
      ],
      bands: hasBand ? [{ series: [2, 3], fill: () => colours.band }] : [],
      hooks: { draw: [drawLines, drawNow], setCursor: [read] },
    };
  }

  function readColours() {
    colours = { tone: colour(tone), band: colour(tone, 0.16), faint: colour("--ink-faint"), line: colour("--line"), card: colour("--surface-card") };
    for (const line of lines) line.colour = colour(line.token);
  }

  function heights() {
    const values = points.flatMap(([, y, margin = 0]) => [y - margin, y + margin]).concat(lines.map((line) => line.value));
    if (!points.length) return unit ? [0, 100] : [0, 1];
    const low = from ?? Math.min(...values);
    const high = Math.max(...values);
    const room = unit ? Math.max((high - low) * 0.12, 2) : (high - low) * 0.12 || 0.05;
    return [from ?? Math.max(0, low - room), unit ? Math.min(102, high + room) : high + room];
  }

  function drawLines(u) {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    // Words stand above their line unless that is where other words, or the curve itself, are.
    const curve = points.filter(([x]) => x > total * 0.55).map(([, y]) => u.valToPos(y, "y", true) + 4 * ratio);
    const taken = [];
    ctx.save();
    ctx.font = `${12 * ratio}px ui-sans-serif, system-ui, sans-serif`;
    ctx.textAlign = "right";
    ctx.textBaseline = "alphabetic"; // the axes left another
    for (const line of lines) {
      const y = u.valToPos(line.value, "y", true);
      ctx.strokeStyle = line.colour;
      ctx.lineWidth = 1.5 * ratio;
      ctx.setLineDash(line.dash.map((part) => part * ratio));
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      let at = y - 6 * ratio;
      if (at - 12 * ratio < bbox.top || taken.some((other) => Math.abs(other - at) < 14 * ratio) || curve.some((other) => Math.abs(other - at) < 10 * ratio)) at = y + 15 * ratio;
      taken.push(at);
      ctx.fillStyle = colours.faint;
      ctx.fillText(line.text, bbox.left + bbox.width - 2 * ratio, at);
    }
    ctx.restore();
  }

  /** The newest point, so that the eye finds it. */
  function drawNow(u) {
    const last = points.at(-1);
    if (!last || !hasMarks) return;
    const { ctx } = u;
    ctx.save();
    ctx.fillStyle = colours.tone;
    ctx.beginPath();
    ctx.arc(u.valToPos(last[0], "x", true), u.valToPos(last[1], "y", true), 4.5 * devicePixelRatio, 0, 2 * Math.PI);
    ctx.fill();
    ctx.restore();
  }

  function read(u) {
    const point = u.cursor.idx === null || u.cursor.left < 0 ? null : points[u.cursor.idx];
    if (!point) return onReading("");
    const margin = point[2] ? ` ± ${format.format(point[2])}` : "";
    onReading(`${whole.format(point[0])}: ${format.format(point[1])}${unit}${margin}`);
  }

  function setData(next) {
    points = next.points;
    lines = (next.lines ?? []).map((line) => ({ ...line, colour: colour(line.token) }));
    const column = (pick) => (points.length ? points.map(pick) : [null]);
    chart.setData([points.length ? points.map((point) => point[0]) : [0], column((p) => p[1]), column((p) => p[1] + (p[2] ?? 0)), column((p) => p[1] - (p[2] ?? 0))]);
  }

  function repaint() {
    readColours();
    chart.redraw(false);
  }

  const observer = new ResizeObserver(() => box.clientWidth && chart.setSize({ width: box.clientWidth, height: box.clientHeight }));
  observer.observe(box);
  document.addEventListener("themechange", repaint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  return { setData };
}
