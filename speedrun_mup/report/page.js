"use strict";
// Draws the figures that stand in the page as JSON (see contents.py for what their parts mean). Nothing is computed here
// but scales, ticks and what is visible.

const report = JSON.parse(document.getElementById("report").textContent);
const hidden = {}; // tag -> the values that are switched off
const views = []; // all figures
const MARGIN = { left: 48, right: 12, top: 8, bottom: 42 };
const LETTER = 7.6; // pixels, of a digit, percent signs allowed for
const LEAST = 270; // pixels, of a panel that stands beside others
const REACH = 24; // pixels between the pointer and a point that it points at

// ---- elements -------------------------------------------------------------------------------------------------------

function add(parent, name, attributes = {}, text = "") {
  const element = parent.appendChild(document.createElement(name));
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function draw(parent, name, attributes = {}, color = null) {
  const element = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (color) element.style.color = `light-dark(${color[0]}, ${color[1]})`;
  return element;
}

function addButton(parent, text, pressed, onChange) {
  const button = add(parent, "button", { type: "button", "aria-pressed": pressed }, text);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", now);
    onChange(now);
  });
  return button;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

function format(value, percent = false) {
  if (percent) return `${format(100 * value)}%`;
  const size = Math.abs(value);
  const text = size && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(5)));
  return text.replace("-", "−");
}

function niceTicks(low, high, count = 7) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, base) {
  const ticks = [];
  const step = base === 2 ? Math.ceil(Math.log2(high / low) / 9) : 1;
  const factors = base === 2 ? [1] : high / low > 300 ? [1] : [1, 2, 5];
  for (let k = Math.floor(Math.log(low) / Math.log(base)); base ** k <= high; k++) {
    if (k % step === 0) ticks.push(...factors.map((factor) => factor * base ** k));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return base === 10 && inside.length < 3 ? niceTicks(low, high) : inside;
}

// One axis as drawn: limits with some room, a map to pixels, ticks.
class Scale {
  constructor(axis, log, [low, high], [from, to], room) {
    const warp = log ? Math.log : (value) => value;
    const pad = room * (warp(high) - warp(low) || 1);
    const start = warp(low) - pad;
    const end = warp(high) + pad;
    const back = log ? Math.exp : (value) => value;
    this.at = (value) => from + ((warp(value) - start) / (end - start)) * (to - from);
    this.powers = log && axis.scale === "log2" && !axis.ticks.length;
    if (axis.ticks.length) this.ticks = axis.ticks;
    else if (log) this.ticks = logTicks(back(start), back(end), axis.scale === "log2" ? 2 : 10);
    else this.ticks = niceTicks(start, end);
  }
}

// ---- figures --------------------------------------------------------------------------------------------------------

const isOn = (tags) => Object.entries(tags).every(([tag, value]) => !hidden[tag]?.has(value));

class View {
  constructor(frame, figure) {
    this.figure = figure;
    this.log = { x: figure.x.scale !== "linear", y: figure.y.scale !== "linear" };
    this.whole = false;
    this.chosen = figure.choice?.options[0];
    const caption = frame.firstElementChild;
    const before = (name, attributes) => frame.insertBefore(add(frame, name, attributes), caption);
    this.addTools(before("div", { class: "tools" }));
    this.row = before("div", { class: "panels" });
    this.panels = figure.panels.map((panel) => {
      const box = add(this.row, "div", { class: "panel" });
      add(box, "h3", {}, panel.title);
      const label = `${panel.title} ${figure.y.label} against ${figure.x.label}`;
      const svg = draw(box, "svg", { role: "img", "aria-label": label });
      const drawn = { panel, box, svg, size: null, targets: [] };
      svg.addEventListener("pointermove", (event) => this.point(drawn, event));
      svg.addEventListener("pointerleave", () => this.leave());
      return drawn;
    });
    const legend = before("div", { class: "legend" });
    for (const key of figure.keys) addKey(legend, key);
  }

  addTools(parent) {
    const { figure } = this;
    if (figure.choice) {
      const group = add(parent, "label", { class: "group" }, figure.choice.label);
      const select = add(group, "select");
      for (const option of figure.choice.options) add(select, "option", {}, option);
      select.addEventListener("change", () => this.change({ chosen: select.value }));
    }
    const positive = (name) => this.values(name, figure.panels.flatMap((panel) => panel.marks)).every((value) => value > 0);
    for (const name of ["x", "y"]) {
      if (this.log[name] || positive(name)) {
        addButton(parent, `log ${name}`, this.log[name], (on) => this.change({ log: { ...this.log, [name]: on } }));
      }
    }
    if (figure.y.limits) addButton(parent, "whole range", false, (on) => this.change({ whole: on }));
  }

  change(state) {
    Object.assign(this, state);
    this.draw();
  }

  isChosen(mark) {
    const { choice } = this.figure;
    return !choice || !(choice.tag in mark.tags) || mark.tags[choice.tag] === this.chosen;
  }

  values(name, marks) {
    const some = (mark) => (name === "x" ? mark.x : mark.kind === "cross" ? [] : [...mark.y, ...mark.low, ...mark.high]);
    return marks.flatMap(some).filter((value) => value !== null);
  }

  // Limits do not depend on what is switched off, so that nothing jumps.
  limits(name) {
    const { figure } = this;
    if (figure[name].limits && !this.whole) return figure[name].limits;
    const marks = figure.panels.flatMap((panel) => panel.marks).filter((mark) => this.isChosen(mark));
    const values = this.values(name, marks).filter((value) => !this.log[name] || value > 0);
    return values.length ? [Math.min(...values), Math.max(...values)] : [1, 2];
  }

  // As many columns as fit, and no orphan: four panels are two rows of two where three would fit.
  layout() {
    const count = Math.max(1, this.panels.filter(({ panel }) => isOn(panel.tags)).length);
    const room = this.row.clientWidth || 800;
    const rows = Math.ceil(count / Math.max(1, Math.floor(room / LEAST)));
    const columns = Math.ceil(count / rows);
    this.row.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    const width = Math.floor((room - 18 * (columns - 1)) / columns);
    const [wide, high] = this.figure.size;
    const least = Math.max(190, 6.6 * this.figure.y.label.length); // room for the axis' name
    const height = MARGIN.top + MARGIN.bottom + Math.round(Math.min(380, Math.max(least, (width * high) / wide - 50)));
    return { width, height };
  }

  draw() {
    const size = this.layout();
    for (const drawn of this.panels) {
      const on = isOn(drawn.panel.tags);
      drawn.box.hidden = !on;
      drawn.size = size;
      drawn.svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
      drawn.targets = [];
      drawn.svg.replaceChildren();
      if (on) this.drawPanel(drawn);
    }
  }

  drawPanel(drawn) {
    const { figure } = this;
    const { svg, size } = drawn;
    const right = size.width - MARGIN.right;
    const bottom = size.height - MARGIN.bottom;
    const y = new Scale(figure.y, this.log.y, this.limits("y"), [bottom, MARGIN.top], figure.y.limits && !this.whole ? 0 : 0.06);
    const widest = Math.max(0, ...y.ticks.map((tick) => (y.powers ? 3 : format(tick, figure.y.percent).length)));
    const left = Math.max(MARGIN.left, 28 + LETTER * widest);
    const x = new Scale(figure.x, this.log.x, this.limits("x"), [left, right], 0.04);
    x.ticks = withRoom(x, figure.x);
    const clip = `clip-${views.indexOf(this)}-${this.panels.indexOf(drawn)}`;
    const area = { x: left, y: MARGIN.top, width: right - left, height: bottom - MARGIN.top };
    draw(draw(svg, "clipPath", { id: clip }), "rect", area);
    for (const tick of x.ticks) {
      draw(svg, "line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: MARGIN.top, y2: bottom });
      drawTick(svg, tick, x, figure.x, { x: x.at(tick), y: bottom + 16, "text-anchor": "middle" });
    }
    for (const tick of y.ticks) {
      draw(svg, "line", { class: "grid", x1: left, x2: right, y1: y.at(tick), y2: y.at(tick) });
      drawTick(svg, tick, y, figure.y, { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" });
    }
    draw(svg, "path", { class: "frame", d: `M${left},${MARGIN.top}V${bottom}H${right}` });
    draw(svg, "text", { x: (left + right) / 2, y: size.height - 6, "text-anchor": "middle" }).textContent = figure.x.label;
    const middle = (MARGIN.top + bottom) / 2;
    const turned = { transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" };
    draw(svg, "text", turned).textContent = figure.y.label;
    const layer = draw(svg, "g", { "clip-path": `url(#${clip})` });
    const order = { band: 0, rule: 1, line: 2, points: 3, cross: 4 };
    const marks = drawn.panel.marks.filter((mark) => isOn(mark.tags) && this.isChosen(mark));
    for (const mark of marks.sort((one, other) => order[one.kind] - order[other.kind])) {
      drawMark(layer, mark, x, y, area, drawn.targets);
    }
  }

  point(drawn, event) {
    this.leave();
    const box = drawn.svg.getBoundingClientRect();
    const zoom = drawn.size.width / box.width;
    const [px, py] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
    let nearest = null;
    let least = REACH;
    for (const target of drawn.targets) {
      const distance = Math.hypot(target.x - px, target.y - py);
      if (distance < least) [nearest, least] = [target, distance];
    }
    if (!nearest) return;
    nearest.element.classList.add("hot");
    this.hot = nearest.element;
    this.ring = draw(drawn.svg, "circle", { class: "ring", cx: nearest.x, cy: nearest.y, r: 7 });
    showTip(tipText(nearest.mark, nearest.index, this.figure), event);
  }

  leave() {
    this.hot?.classList.remove("hot");
    this.ring?.remove();
    tip.hidden = true;
  }
}

// Ticks whose labels do not touch: all of them, or every second, third ...
function withRoom(scale, axis) {
  const needs = (tick) => (scale.powers ? 26 : 12 + LETTER * format(tick, axis.percent).length);
  for (let step = 1; step < scale.ticks.length; step++) {
    const some = scale.ticks.filter((_, index) => index % step === 0);
    const fits = (tick, index) => !index || scale.at(tick) - scale.at(some[index - 1]) >= (needs(tick) + needs(some[index - 1])) / 2;
    if (some.every(fits)) return some;
  }
  return scale.ticks.slice(0, 1);
}

function drawTick(svg, tick, scale, axis, place) {
  const text = draw(svg, "text", place);
  if (!scale.powers) {
    text.textContent = format(tick, axis.percent);
    return;
  }
  text.textContent = "2";
  const power = draw(text, "tspan", { dy: -5, "font-size": 9 });
  power.textContent = format(Math.log2(tick));
}

function drawMark(layer, mark, x, y, area, targets) {
  const style = { class: "mark", opacity: mark.opacity };
  const stroke = { ...style, fill: "none", stroke: "currentColor", "stroke-width": 1.3 * mark.size };
  if (mark.dotted) stroke["stroke-dasharray"] = "2 4";
  const target = (element, px, py, index) => {
    const inside = py >= area.y && py <= area.y + area.height;
    if (mark.name && inside) targets.push({ mark, element, index, x: px, y: py });
  };
  if (mark.kind === "band") {
    const path = (edge) => edge.map((value, index) => `${x.at(mark.x[index])},${y.at(value)}`);
    const points = [...path(mark.low), ...path(mark.high).reverse()].join(" ");
    draw(layer, "polygon", { ...style, points, fill: "currentColor" }, mark.color);
  } else if (mark.kind === "rule") {
    for (const at of mark.x) {
      draw(layer, "line", { ...stroke, x1: x.at(at), x2: x.at(at), y1: area.y, y2: area.y + area.height }, mark.color);
    }
  } else if (mark.kind === "line") {
    const corners = mark.x.map((value, index) => [x.at(value), y.at(mark.y[index])]);
    const seen = corners.filter((corner) => corner.every(Number.isFinite));
    const line = draw(layer, "polyline", { ...stroke, points: seen.join(" "), "stroke-linejoin": "round" }, mark.color);
    corners.forEach(([px, py], index) => {
      if (mark.marked && seen.includes(corners[index])) drawPoint(layer, mark, px, py, 3, { opacity: mark.opacity });
      target(line, px, py, index);
    });
  } else if (mark.kind === "cross") {
    mark.x.forEach((value, index) => {
      const [px, py] = [x.at(value), area.y + area.height * (0.025 + 0.04 * mark.y[index])];
      const d = `M${px - 3.5},${py - 3.5}l7,7m0,-7l-7,7`;
      target(draw(layer, "path", { ...stroke, d, "stroke-width": 1.4 }, mark.color), px, py, index);
    });
  } else {
    mark.x.forEach((value, index) => {
      const [px, py] = [x.at(value), y.at(mark.y[index])];
      if (mark.low.length) {
        const [low, high] = [y.at(mark.low[index]), y.at(mark.high[index])];
        draw(layer, "path", { ...stroke, d: `M${px - 4},${low}h8m-4,0V${high}m-4,0h8`, "stroke-width": 1.2 }, mark.color);
      }
      target(drawPoint(layer, mark, px, py, (1.4 * mark.size) / 2, style), px, py, index);
    });
  }
}

function drawPoint(layer, mark, px, py, radius, style) {
  const r = Math.max(radius, 2);
  const shapes = {
    o: `M${px - r},${py}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0z`,
    s: `M${px - r},${py - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    "^": `M${px},${py - 1.2 * r}l${1.2 * r},${2.1 * r}h${-2.4 * r}z`,
    v: `M${px},${py + 1.2 * r}l${1.2 * r},${-2.1 * r}h${-2.4 * r}z`,
    D: `M${px},${py - 1.35 * r}l${1.35 * r},${1.35 * r}l${-1.35 * r},${1.35 * r}l${-1.35 * r},${-1.35 * r}z`,
  };
  const ground = "var(--ground)";
  const paint = mark.hollow ? { fill: ground, stroke: "currentColor" } : { fill: "currentColor", stroke: mark.symbol === "D" ? ground : "none" };
  return draw(layer, "path", { ...style, ...paint, "stroke-width": 1.3, d: shapes[mark.symbol] }, mark.color);
}

function addKey(parent, key) {
  const entry = add(parent, "span");
  const svg = draw(entry, "svg", { width: 22, height: 12 });
  const style = { fill: "none", stroke: "currentColor", "stroke-width": 2 };
  if (key.dotted) style["stroke-dasharray"] = "2 4";
  if (key.kind === "line") {
    draw(svg, "path", { ...style, d: "M0,6h22" }, key.color);
    if (key.marked) drawPoint(svg, key, 11, 6, 3, {});
  }
  else if (key.kind === "band") draw(svg, "rect", { width: 22, height: 12, fill: "currentColor" }, key.color);
  else if (key.kind === "cross") draw(svg, "path", { ...style, "stroke-width": 1.4, d: "M7.5,2.5l7,7m0,-7l-7,7" }, key.color);
  else drawPoint(svg, key, 11, 6, 3.5, {});
  entry.append(key.label);
}

// ---- what the pointer is at -----------------------------------------------------------------------------------------

const tip = add(document.body, "div", { id: "tip", role: "status" });
tip.hidden = true;

function nearest(ticks, value) {
  const away = (tick) => Math.abs(Math.log(tick / value));
  return ticks.reduce((best, tick) => (away(tick) < away(best) ? tick : best));
}

function tipText(mark, index, { x, y }) {
  const value = x.ticks.length ? nearest(x.ticks, mark.x[index]) : mark.x[index]; // points may stand aside of their tick
  const power = x.scale === "log2" && !x.ticks.length ? ` = 2^${Math.log2(value).toFixed(2).replace("-", "−")}` : "";
  const lines = [mark.name, `${x.label}: ${format(value, x.percent)}${power}`];
  if (mark.kind !== "cross") lines.push(`${y.label}: ${format(mark.y[index], y.percent)}`);
  if (mark.low.length) lines.push(`90 %: ${format(mark.low[index])} to ${format(mark.high[index])}`);
  if (mark.notes.length) lines.push(...mark.notes[index].split("; "));
  return lines.join("\n");
}

function showTip(text, { clientX, clientY }) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = clientX + 16 + box.width > innerWidth ? clientX - 16 - box.width : clientX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.min(clientY + 14, innerHeight - box.height - 4)}px`;
}

// A term explains itself under the pointer, and when it is reached by the keyboard; its link leads to the list of words.
function explain(term) {
  const told = term.title;
  term.removeAttribute("title");
  term.setAttribute("aria-description", told);
  const show = () => {
    const box = term.getBoundingClientRect();
    showTip(told, { clientX: box.left - 12, clientY: box.bottom - 8 });
  };
  for (const name of ["pointerenter", "focus"]) term.addEventListener(name, show);
  for (const name of ["pointerleave", "blur"]) term.addEventListener(name, () => (tip.hidden = true));
}

// ---- the page -------------------------------------------------------------------------------------------------------

function addSwitches(parent) {
  for (const [tag, values] of Object.entries(report.switches)) {
    hidden[tag] = new Set();
    const group = add(parent, "div", { class: "group" }, tag);
    for (const value of values) {
      const button = addButton(group, value, true, (on) => {
        hidden[tag][on ? "delete" : "add"](value);
        drawAll();
      });
      button.dataset.tag = tag;
      button.dataset.value = value;
    }
  }
}

function drawAll() {
  for (const view of views) view.draw();
}

addSwitches(document.querySelector("nav"));
for (const figure of report.figures) views.push(new View(document.getElementById(figure.name), figure));
drawAll();
for (const term of document.querySelectorAll(".term")) explain(term);

const words = document.querySelector("aside details");
if (words && innerWidth < 900) words.open = false;
addEventListener("hashchange", () => {
  if (words && location.hash.startsWith("#term-")) words.open = true;
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
});

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));
let room = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth !== room) drawAll();
  room = document.body.clientWidth;
});
document.body.dataset.drawn = views.length;
