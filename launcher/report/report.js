"use strict";
// Draws the plots of a run's report from the numbers in the page, and searches its settings. Text from data only ever
// becomes text nodes; nothing is loaded.

const PAGE = JSON.parse(document.getElementById("numbers").textContent);
const SVG = "http://www.w3.org/2000/svg";
const ROOM = { left: 54, right: 14, top: 10, bottom: 26 };
const MOST_SPOTS = 80;

function element(name, attributes, parent) {
  const made = name === "div" || name === "span" ? document.createElement(name) : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function digits(value, most) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(Math.max(most - 2, 1)).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(most)));
}

function scaled(value, base, units, most) {
  let power = 0;
  while (Math.abs(value) >= base && power + 1 < units.length) { value /= base; power += 1; }
  return digits(value, most) + units[power];
}

const FORMATS = {
  "": (value, most) => digits(value, most),
  share: (value, most) => digits(100 * value, most) + "%",
  percent: (value, most) => digits(value, most) + "%",
  bytes: (value, most) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"], most),
  per_s: (value, most) => scaled(value, 1000, ["", "k", "M", "B"], most),
  watt: (value, most) => digits(value, most) + " W",
  joule: (value, most) => scaled(value / 3600, 1000, [" Wh", " kWh", " MWh"], most),
};

function clock(seconds) {
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)}:${two(s % 60)}`;
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

const place = (plot, x) => plot.axis === "time" ? clock(x) : Math.round(x).toLocaleString("en");

// Round numbers between low and high, about `most` of them; of times such as are round on a clock.
function ticks(low, high, most, steps) {
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((one) => one * power >= rough * 0.999);
  const step = (steps && steps.find((one) => one >= rough)) || factor * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step)
    found.push(Number(at.toPrecision(12)));
  return found;
}

const CLOCK_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

// What a unit's round numbers are multiples of: half a GiB rather than 500 MB, an hour's watts rather than joules.
function grain(unit, high) {
  if (unit === "joule") return 3600;
  return unit === "bytes" ? 1024 ** Math.max(Math.floor(Math.log2(high || 1) / 10), 0) : 1;
}

function logTicks(low, high) {
  const found = [];
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 4 ? [1] : last - first > 2 ? [1, 3] : [1, 2, 5];
  for (let power = first; power <= last; power += 1)
    for (const factor of factors) {
      const at = factor * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  return found.length > 1 ? found : [low, high];
}

function limits(plot, logarithmic) {
  let [low, high, left, right] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const line of plot.lines)
    for (let i = 0; i < line.x.length; i += 1) {
      left = Math.min(left, line.x[i]); right = Math.max(right, line.x[i]);
      if (line.y[i] !== null) { low = Math.min(low, line.y[i]); high = Math.max(high, line.y[i]); }
    }
  if (logarithmic) return { left, right: right > left ? right : left + 1, low, high: high > low ? high : low * 2 };
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const floor = plot.zero && low >= 0 ? 0 : low >= 0 ? Math.max(low - pad, 0) : low - pad;
  const ceiling = plot.unit === "share" && high <= 1 ? Math.min(high + pad, 1) : high + pad;
  return { left, right: right > left ? right : left + 1, low: floor, high: Math.max(ceiling, floor + 1e-12) };
}

class Chart {
  constructor(figure, plot) {
    this.figure = figure; this.plot = plot; this.logarithmic = false; this.at = null;
    this.svg = figure.querySelector("svg");
    this.tip = element("div", { class: "tip", "aria-hidden": "true" }, figure.querySelector(".canvas"));
    let colour = 0;
    this.colours = plot.lines.map((line) => line.look === "faint" ? colour : colour++);
    this.legend();
    const button = figure.querySelector("button");
    if (button) button.addEventListener("click", () => {
      this.logarithmic = !this.logarithmic;
      button.setAttribute("aria-pressed", String(this.logarithmic));
      this.draw();
    });
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerdown", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -6, ArrowRight: 6 }[event.key];
      if (move) { event.preventDefault(); this.point((this.at === null ? ROOM.left : this.at) + move); }
    });
    new ResizeObserver(() => { if (this.svg.clientWidth !== this.width) this.draw(); }).observe(this.svg);
    this.draw();
  }

  legend() {
    const named = this.plot.lines.map((line, i) => [line, i]).filter(([line]) => line.look !== "faint");
    if (named.length < 2 && !named.some(([line]) => line.look === "points")) return;
    const legend = this.figure.querySelector(".legend");
    for (const [line, i] of named) {
      const item = element("span", { class: `c${this.colours[i] % 8} ${line.look}` }, legend);
      element("span", { class: "key" }, item);
      item.append(line.name);
    }
  }

  draw() {
    const { plot, svg } = this;
    this.width = svg.clientWidth; this.height = svg.clientHeight;
    if (!this.width) return;
    svg.replaceChildren();
    this.box = limits(plot, this.logarithmic);
    const { left, right, low, high } = this.box, floor = this.height - ROOM.bottom;
    const across = this.width - ROOM.left - ROOM.right, up = floor - ROOM.top;
    this.px = (x) => ROOM.left + (x - left) / (right - left) * across;
    this.py = this.logarithmic
      ? (y) => floor - Math.log(y / low) / Math.log(high / low) * up
      : (y) => floor - (y - low) / (high - low) * up;
    const format = FORMATS[plot.unit];
    const unit = grain(plot.unit, high);
    const linear = () => ticks(low / unit, high / unit, this.height / 42).map((y) => y * unit);
    for (const y of this.logarithmic ? logTicks(low, high) : linear()) {
      const at = this.py(y).toFixed(1);
      element("line", { class: "axis", x1: ROOM.left, x2: this.width - ROOM.right, y1: at, y2: at }, svg);
      element("text", { x: ROOM.left - 7, y: Number(at) + 4, "text-anchor": "end" }, svg).append(format(y, 3));
    }
    for (const x of ticks(left, right, this.width / 95, plot.axis === "time" ? CLOCK_STEPS : null)) {
      if ((plot.axis === "step" && x !== Math.round(x)) || this.px(x) < ROOM.left + 12) continue;
      element("text", { x: this.px(x).toFixed(1), y: floor + 18, "text-anchor": "middle" }, svg).append(place(plot, x));
    }
    element("text", { x: ROOM.left - 7, y: floor + 18, "text-anchor": "end" }, svg).append(plot.axis);
    this.happenings(floor);
    plot.lines.forEach((line, i) => this.line(line, `c${this.colours[i] % 8} ${line.look}`));
    this.cross = element("line", { class: "cross", y1: ROOM.top, y2: floor, visibility: "hidden" }, svg);
  }

  line(line, kind) {
    let path = "", pen = false;
    for (let i = 0; i < line.x.length; i += 1) {
      if (line.y[i] === null) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${this.px(line.x[i]).toFixed(1)} ${this.py(line.y[i]).toFixed(1)}`;
      pen = true;
    }
    element("path", { class: `curve ${kind}`, d: path }, this.svg);
    if (line.x.length === 1 || (line.look === "points" && line.x.length <= MOST_SPOTS))
      line.x.forEach((x, i) => {
        if (line.y[i] === null) return;
        const [cx, cy] = [this.px(x).toFixed(1), this.py(line.y[i]).toFixed(1)];
        element("circle", { class: `spot ${kind}`, cx, cy, r: 3 }, this.svg);
      });
  }

  happenings(floor) {
    for (const event of PAGE.events) {
      const x = this.plot.axis === "time" ? event.seconds : event.step;
      if (x === null || x < this.box.left || x > this.box.right) continue;
      const at = this.px(x);
      const mark = element("g", { class: `event ${event.tone}` }, this.svg);
      element("line", { x1: at.toFixed(1), x2: at.toFixed(1), y1: ROOM.top, y2: floor }, mark);
      element("path", { d: `M${(at - 4).toFixed(1)} ${floor + 1}h8l-4 -6z` }, mark);
    }
  }

  // What the lines and events say at a pixel, beside it.
  point(pixel) {
    const { left, right } = this.box, { plot, tip } = this;
    this.at = Math.min(Math.max(pixel, ROOM.left), this.width - ROOM.right);
    const wanted = left + (this.at - ROOM.left) / (this.width - ROOM.left - ROOM.right) * (right - left);
    const leader = plot.lines.reduce((most, line) => line.x.length > most.x.length ? line : most);
    const x = leader.x[nearest(leader, wanted)];
    tip.replaceChildren();
    element("div", { class: "where" }, tip).append(`${plot.axis === "time" ? "after " : "step "}${place(plot, x)}`);
    plot.lines.forEach((line, i) => {
      const found = nearest(line, wanted);
      if (found < 0 || Math.abs(this.px(line.x[found]) - this.px(x)) > this.reach(line)) return;
      const row = element("div", { class: `c${this.colours[i] % 8} ${line.look}` }, tip);
      element("span", { class: "key" }, row);
      row.append(`${line.name} `);
      element("span", { class: "value" }, row).append(FORMATS[plot.unit](line.y[found], 5));
      if (plot.axis === "step" && line.x[found] !== x) row.append(` at ${place(plot, line.x[found])}`);
    });
    for (const event of PAGE.events) {
      const where = plot.axis === "time" ? event.seconds : event.step;
      if (where !== null && Math.abs(this.px(where) - this.at) < 5)
        element("div", { class: `said ${event.tone}` }, tip).append(event.words);
    }
    this.cross.setAttribute("x1", this.px(x)); this.cross.setAttribute("x2", this.px(x));
    this.cross.setAttribute("visibility", "visible");
    tip.classList.add("shown");
    const room = this.width - tip.offsetWidth - 4;
    const beside = this.px(x) > this.width / 2 ? this.px(x) - tip.offsetWidth - 12 : this.px(x) + 12;
    tip.style.left = `${Math.max(Math.min(beside, room), 0)}px`;
  }

  reach(line) { return Math.max((this.width - ROOM.left - ROOM.right) / Math.max(line.x.length, 2), 12); }

  leave() {
    this.at = null;
    this.tip.classList.remove("shown");
    this.cross.setAttribute("visibility", "hidden");
  }
}

// Number of the value nearest to x, -1 where there is none.
function nearest(line, x) {
  let found = -1, distance = Infinity;
  for (let i = 0; i < line.x.length; i += 1) {
    const away = Math.abs(line.x[i] - x);
    if (line.y[i] !== null && away < distance) { found = i; distance = away; }
  }
  return found;
}

for (const plot of PAGE.plots) new Chart(document.getElementById(`plot-${plot.id}`), plot);

const search = document.getElementById("search");
if (search) {
  const rows = [...document.querySelectorAll("#settings tbody tr")], count = document.getElementById("found");
  const others = document.querySelector("#settings details");
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    others.open = words.length > 0;
    count.textContent = `${shown} of ${rows.length}`;
  };
  search.addEventListener("input", show);
  show();
}
