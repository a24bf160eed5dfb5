/* Curves: one panel per measure, drawn when scrolled into view, with few traces for any number of runs. */

const MOST_ON_SCREEN = 40_000; // points per panel
const OVER = { step: "step (optimizer updates)", images: "images trained on", seconds: "hours of training", device_seconds: "hours of training times devices", flops: "FLOPs of training" };

const names = [...new Set(RUNS.flatMap((run) => run.series.flatMap(([, values]) => Object.keys(values))))];
const figureNames = new Set(columnsOf("figure").map((column) => column.figure));
const isFigure = (name) => figureNames.has(name) && name.includes("@"); // has a protocol; the training loss has none
const kindOf = (name) =>
  isFigure(name) ? (isPart(name) ? 5 : 3) : /^loss( |$)/.test(name) ? 0 : name === "grad_norm" ? 1 : /^loss_q\d/.test(name) ? 2 : 4;
const isPart = (name) => columnsOf("figure").some((column) => column.figure === name && column.part);
const titleOf = (name) =>
  isFigure(name) ? name : name.replace(/^loss_q(\d)/, (_, quartile) => `loss, quartile ${quartile} of the timesteps${{ 0: " (least noise)", 3: " (most noise)" }[quartile] || ""}`).replace(/^grad_norm$/, "gradient norm").replace(/^lr$/, "learning rate");
names.sort((one, other) => kindOf(one) - kindOf(other) || (kindOf(one) === 2 ? one.localeCompare(other) : 0));

/* A figure with one value per run is not a curve; the table and the next section show it. */
const panels = names
  .filter((name) => !isFigure(name) || RUNS.some((run) => (seriesOf(run, name) || [[]])[0].length > 1))
  .map((name) => ({ name, kind: kindOf(name), stale: true, visible: false }));
let evaluations = 0;
for (const panel of panels) panel.chosen = panel.kind < 3 || (panel.kind === 3 && (evaluations += 1) <= SHOWN_FIGURES);

function seriesOf(run, name) {
  const found = run.series.find(([, values]) => name in values);
  return found ? [found[0], found[1][name]] : null;
}

/* Interpolates a run's cost linearly between entries of costs.jsonl. */
function costAt(costs, what, step) {
  const { step: steps, [what]: values } = costs;
  let low = 0;
  let high = steps.length - 1;
  if (step < steps[0]) return steps[0] ? (values[0] * step) / steps[0] : values[0];
  if (step > steps[high]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  const span = steps[high] - steps[low];
  return values[low] + (span ? ((values[high] - values[low]) * (step - steps[low])) / span : 0);
}

const isNumber = (value) => typeof value === "number";

/* Averages each point over the preceding share of the run, like the loss in the table. */
function smoothed(steps, values, share) {
  if (!share) return values;
  const width = share * steps[steps.length - 1];
  let first = 0;
  let sum = 0;
  let count = 0;
  return values.map((value, index) => {
    if (isNumber(value)) { sum += value; count += 1; }
    while (first < index && steps[first] <= steps[index] - width) {
      if (isNumber(values[first])) { sum -= values[first]; count -= 1; }
      first += 1;
    }
    return isNumber(value) && count ? sum / count : null;
  });
}

/* One run's curve as drawn: x, y and steps; null if the run has none. */
function curveOf(run, name, most) {
  const found = seriesOf(RUNS[run], name);
  const over = byId("over").value;
  const { costs } = RUNS[run];
  if (!found || (over !== "step" && !costs?.[over])) return null;
  const values = smoothed(found[0], found[1].map((value) => (isNumber(value) ? value : null)), Number(byId("smoothing").value) / 100);
  const every = Math.ceil(found[0].length / Math.max(most, 20));
  const at = found[0].map((_, index) => index).filter((index) => (found[0].length - 1 - index) % every === 0);
  const x = (step) => (over === "step" ? step : over.endsWith("seconds") ? scaleHours(costAt(costs, over, step)) : costAt(costs, over, step));
  return { run, steps: at.map((index) => found[0][index]), x: at.map((index) => x(found[0][index])), y: at.map((index) => values[index]) };
}
const scaleHours = (seconds) => (seconds === null ? null : seconds / 3600);

/* Mean, minimum and maximum of the seeds' curves where all of them have a value. */
function bandOf(curves) {
  const base = curves.reduce((one, other) => (one.x.length >= other.x.length ? one : other));
  const at = (curve, x) => {
    let high = curve.x.findIndex((value) => value !== null && value >= x);
    if (high < 0) return null;
    if (curve.x[high] === x || high === 0) return curve.x[high] === x ? curve.y[high] : null;
    const [left, right] = [curve.x[high - 1], curve.x[high]];
    const [low, up] = [curve.y[high - 1], curve.y[high]];
    return low === null || up === null || left === null ? null : low + ((up - low) * (x - left)) / (right - left);
  };
  const band = { x: [], mean: [], low: [], high: [], steps: [] };
  base.x.forEach((x, index) => {
    const values = x === null ? [null] : curves.map((curve) => at(curve, x));
    if (values.some((value) => value === null)) return;
    band.x.push(x);
    band.steps.push(base.steps[index]);
    band.mean.push(values.reduce((sum, value) => sum + value, 0) / values.length);
    band.low.push(Math.min(...values));
    band.high.push(Math.max(...values));
  });
  return band;
}

/* Runs of one color share a trace, with gaps between them. */
function tracesOf(name, runs, { of, colours }) {
  const most = Math.floor(MOST_ON_SCREEN / Math.max(runs.length, 1));
  const curves = runs.map((run) => curveOf(run, name, most)).filter(Boolean);
  const lines = new Map();
  const bands = new Map();
  const into = (map, colour) => map.get(colour) || map.set(colour, { x: [], y: [], text: [], run: [], alone: true }).get(colour);
  const add = (line, x, y, text, run) => {
    for (let index = 0; index < x.length; index += 1) {
      line.x.push(x[index]);
      line.y.push(y[index]);
      line.text.push(text(index));
      line.run.push(run);
    }
    line.x.push(null); line.y.push(null); line.text.push(""); line.run.push(null);
    if (x.length > 1) line.alone = false;
  };
  const done = new Set();
  for (const curve of curves) {
    const group = byId("band").checked ? groupOf.get(curve.run) : undefined;
    const colour = colours.get(of(curve.run));
    const mates = group ? curves.filter((other) => group.members.includes(other.run)) : [];
    if (mates.length > 1) {
      if (done.has(group)) continue;
      done.add(group);
      const band = bandOf(mates);
      const label = asText(`mean of ${mates.length} seeds: ${groupLabel(group)}`);
      add(into(lines, colour), band.x, band.mean, (index) => `${label}<br>seeds ${digits(band.low[index])} to ${digits(band.high[index])}<br>step ${band.steps[index]}`, null);
      const shape = into(bands, colour);
      shape.x.push(...band.x, ...[...band.x].reverse(), null);
      shape.y.push(...band.high, ...[...band.low].reverse(), null);
    } else {
      const label = asText(RUNS[curve.run].label);
      add(into(lines, colour), curve.x, curve.y, (index) => `${label}<br>step ${curve.steps[index]}`, curve.run);
    }
  }
  const traces = [...bands].map(([colour, { x, y }]) => ({ x, y, mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: withAlpha(colour, 0.2), hoverinfo: "skip" }));
  const dense = curves.length > 60;
  for (const [colour, line] of lines) {
    const few = line.x.length / Math.max(new Set(line.run).size, 1) < 15;
    traces.push({
      x: line.x, y: line.y, text: line.text, customdata: line.run,
      mode: few || line.alone ? "lines+markers" : "lines",
      line: { color: withAlpha(colour, dense ? 0.55 : 1), width: dense ? 1 : 1.6 }, marker: { color: colour, size: 5 },
      hovertemplate: "%{text}<br>%{y:.5~g}<extra></extra>",
    });
  }
  return { traces, curves };
}

function drawPanel(panel) {
  panel.stale = false;
  const runs = drawn();
  const { traces, curves } = tracesOf(panel.name, runs, coloursBy(byId("colour").value));
  lineOver(panel);
  panel.curves = new Map(curves.map((curve) => [curve.run, curve]));
  const values = curves.flatMap((curve) => curve.y).filter(isNumber);
  const logWanted = byId("log-y").checked;
  const log = logWanted && values.length > 0 && !values.some((value) => value <= 0);
  const missing = runs.length - curves.length;
  panel.note.textContent = [
    curves.length === 0 ? "None of these runs has this curve." : missing ? `${missing} of ${many(runs.length, "run")} ${missing === 1 ? "lacks" : "lack"} this curve.` : "",
    logWanted && !log && values.length ? "The axis is linear, since some values are not positive." : "",
    RUNS.some((_, run) => panel.curves.has(run) && (seriesOf(RUNS[run], panel.name)[1]).some((value) => !isNumber(value))) ? "Gaps are values that are not finite." : "",
  ].filter(Boolean).join(" ");
  panel.chart.hidden = curves.length === 0;
  if (!curves.length) return;
  const layout = layoutOf({
    xaxis: { title: { text: OVER[byId("over").value] }, type: byId("log-x").checked ? "log" : "linear" },
    yaxis: { type: log ? "log" : "linear", tickformat: log ? ".3~g" : "", ...(log ? logTicks(values) : {}) },
  });
  Plotly.react(panel.chart, traces, layout, PLOT).then(() => listen(panel));
}

/* Highlights the run under the mouse in every panel and in the table; a click picks it. */
function listen(panel) {
  if (panel.listens) return;
  panel.listens = true;
  panel.chart.on("plotly_hover", ({ points }) => pointAt(points[0].customdata));
  panel.chart.on("plotly_unhover", () => pointAt(null));
  panel.chart.on("plotly_relayout", () => pointAt(null));
  panel.chart.on("plotly_click", ({ points }) => {
    const run = points[0].customdata;
    if (run !== null && run !== undefined) pick([run], !state.picked.has(run));
  });
}

let pointed = null;
function pointAt(run) {
  if (run === undefined || run === pointed) return;
  pointed = run;
  for (const row of document.querySelectorAll("#rows tr.pointed")) row.classList.remove("pointed");
  if (run !== null) document.querySelector(`#rows tr[data-run="${run}"]`)?.classList.add("pointed");
  for (const panel of panels) if (panel.chosen && panel.visible && panel.curves) lineOver(panel, run === null ? undefined : panel.curves.get(run));
}

/* Draws one run's curve over the chart, not as a trace: changing a trace redraws the whole chart. */
function lineOver({ over, chart }, curve) {
  const layout = chart._fullLayout;
  if (!curve || !layout) {
    over.replaceChildren();
    return;
  }
  const { xaxis, yaxis } = layout;
  Object.assign(over.style, { left: `${xaxis._offset}px`, top: `${yaxis._offset}px`, width: `${xaxis._length}px`, height: `${yaxis._length}px` });
  const places = curve.x.map((x, index) => (x === null || curve.y[index] === null ? null : [xaxis.d2p(x), yaxis.d2p(curve.y[index])]));
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", places.map((place, index) => (place === null ? "" : `${index && places[index - 1] ? "L" : "M"}${place[0].toFixed(1)},${place[1].toFixed(1)}`)).join(""));
  over.replaceChildren(path);
}

const watcher = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    const panel = panels.find(({ box }) => box === target);
    panel.visible = isIntersecting;
    if (isIntersecting && panel.stale) drawPanel(panel);
  }
}, { rootMargin: "200px" });

function drawCurves() {
  for (const panel of panels) {
    panel.stale = true;
    panel.box.hidden = !panel.chosen;
    if (panel.chosen && panel.visible) drawPanel(panel);
  }
  const runs = drawn();
  const over = byId("over").value;
  const without = over === "step" ? 0 : runs.filter((run) => !RUNS[run].costs?.[over]).length;
  byId("curves-said").textContent = [
    `${many(runs.length, "run")}: ${state.picked.size ? "those picked" : "all in the table"}.`,
    without ? `${without} of them ${without === 1 ? "has" : "have"} no costs.jsonl and cannot be shown on this axis.` : "",
    byId("band").checked && DATA.groups.length ? "Bands span the lowest to the highest seed; lines are means." : "",
    panels.length === 0 ? "No run has recorded a curve yet." : "",
  ].filter(Boolean).join(" ");
  const share = Number(byId("smoothing").value);
  byId("smoothing-said").textContent = share ? `${share}% of a run` : "off";
  drawLegend();
}

function drawLegend() {
  const { of, colours } = coloursBy(byId("colour").value);
  const runs = new Set(drawn());
  const buttons = [...colours].map(([name, colour]) => {
    const members = RUNS.map((_, run) => run).filter((run) => of(run) === name);
    const there = members.filter((run) => runs.has(run));
    if (!there.length) return null;
    const on = members.every((run) => state.picked.has(run));
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = colour;
    const button = element("button", { type: "button", "aria-pressed": String(on), title: on ? "leave these out" : "pick these" }, swatch, element("span", {}, name));
    button.dataset.key = name;
    button.addEventListener("click", () => pick(members, !on));
    return button;
  });
  keepingFocus(byId("legend"), () => byId("legend").replaceChildren(...buttons.filter(Boolean)));
}

function setUpCurves() {
  const over = byId("over");
  for (const [name, title] of Object.entries(OVER)) {
    if (name === "step" || RUNS.some((run) => run.costs)) over.append(element("option", { value: name }, title));
  }
  const colour = byId("colour");
  for (const key of SETTINGS) colour.append(element("option", { value: key }, key));
  colour.append(element("option", { value: "status" }, "status"), element("option", { value: "" }, "each run"));
  colour.value = SETTINGS.find((key) => key !== "seed") || SETTINGS[0] || "";
  const band = byId("band");
  byId("band-label").hidden = DATA.groups.length === 0;
  band.checked = DATA.groups.length > 0;
  const box = byId("panels-chosen");
  const say = () => { box.firstElementChild.textContent = `Panels: ${panels.filter((panel) => panel.chosen).length} of ${panels.length}`; };
  box.hidden = panels.length === 0;
  for (const panel of panels) {
    const input = element("input", { type: "checkbox", checked: panel.chosen });
    input.addEventListener("change", () => {
      panel.chosen = input.checked;
      say();
      drawCurves();
    });
    box.lastElementChild.append(element("label", {}, input, titleOf(panel.name)));
    panel.chart = element("div", { className: "chart" });
    panel.note = element("p", { className: "note" });
    panel.over = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const both = element("div", { className: "both" }, panel.chart, panel.over);
    panel.box = element("div", { className: "panel", hidden: !panel.chosen }, element("h3", {}, titleOf(panel.name)), panel.note, both);
    byId("panels").append(panel.box);
    watcher.observe(panel.box);
  }
  say();
  for (const id of ["over", "smoothing", "log-x", "log-y", "band"]) byId(id).addEventListener("input", drawCurves);
  colour.addEventListener("input", changed);
}

setUpCurves();
drawCurves();
redraws.push(drawCurves);
