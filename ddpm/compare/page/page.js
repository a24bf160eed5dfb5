"use strict";
/* Shared by all parts of the page: data, selection, text and colors. Everything from a run folder
   enters the page as text, never as HTML. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const state = { sort: null, down: false, filters: {}, picked: new Set(), open: new Set(), together: DATA.groups.length > 0 };
const redraws = []; // called when the runs shown or picked change

const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/* Like Python's %.4g, the format of ddpm.compare's tables. */
function digits(value, count = 4) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value)) return String(value);
  const exponent = Number(value.toExponential(count - 1).split("e")[1]);
  if (exponent < -4 || exponent >= count) {
    const [mantissa, power] = value.toExponential(count - 1).split("e");
    const places = Math.abs(Number(power));
    return `${Number(mantissa)}e${power[0]}${places < 10 ? "0" : ""}${places}`;
  }
  return String(Number(value.toPrecision(count)));
}

const isAt = (value) => Array.isArray(value); // [value, step]: not from the run's last step
const plain = (value) => (isAt(value) ? value[0] : value);
const valueOf = (run, key) => plain(RUNS[run].row[key]);
const words = (value) => (value === null || value === undefined ? "–" : typeof value === "number" ? digits(value) : String(value));

/* Plotly interprets some HTML tags in its texts. */
const asText = (text, most = 70) => {
  const short = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
};

const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/* Numbers before text, missing values last, in either direction. */
function compareValues(one, other, down) {
  const rank = (value) => (typeof value === "number" ? 0 : value === null || value === undefined ? 2 : 1);
  if (rank(one) !== rank(other)) return rank(one) - rank(other);
  const order = rank(one) === 0 ? one - other : rank(one) === 1 ? String(one).localeCompare(String(other), "en", { numeric: true }) : 0;
  return down ? -order : order;
}

/* Picked runs, or, if none is picked, those that pass the filters. */
const drawn = () => (state.picked.size ? RUNS.map((_, run) => run).filter((run) => state.picked.has(run)) : shownRuns());
const groupOf = new Map(DATA.groups.flatMap((group) => group.members.map((run) => [run, group])));

let waiting = false;
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const redraw of redraws) redraw();
  });
}

/* Redraws a part and restores the keyboard focus inside it. */
function keepingFocus(part, draw) {
  const key = part.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  draw();
  if (key !== undefined) part.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

function pick(runs, on) {
  for (const run of runs) on ? state.picked.add(run) : state.picked.delete(run);
  changed();
}

/* Columns */
const columnsOf = (kind) => DATA.columns.filter((column) => column.kind === kind);
const SETTINGS = columnsOf("setting").map((column) => column.key);
const isNumeric = (key, runs) => {
  const values = runs.map((run) => valueOf(run, key)).filter((value) => value !== null && value !== undefined);
  return values.length > 0 && values.every((value) => typeof value === "number");
};
const wantsLog = (values) => values.length > 1 && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8;

function groupLabel(group) {
  const said = SETTINGS.filter((key) => key !== "seed").map((key) => `${key.split(".").pop()} ${words(valueOf(group.members[0], key))}`);
  return said.join(", ") || "only the seed differs";
}

/* Colors: ten for up to ten values, else one scale by rank, so that no color repeats. */
const TEN = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#a6761d", "#7f7f7f", "#b2b200"];
const SCALE = [[72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 200, 44], [235, 190, 40]];
function scaled(share) {
  const place = share * (SCALE.length - 1);
  const low = Math.min(Math.floor(place), SCALE.length - 2);
  const mixed = SCALE[low].map((part, index) => Math.round(part + (SCALE[low + 1][index] - part) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}
const withAlpha = (colour, alpha) =>
  colour.startsWith("#")
    ? `rgba(${[1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).join(",")},${alpha})`
    : colour.replace("rgb(", "rgba(").replace(")", `,${alpha})`);

/* value -> color, in the order of values; a run keeps its color whatever is picked. */
function coloursBy(key) {
  const of = (run) => (key === "" ? RUNS[run].label : words(valueOf(run, key)));
  const values = [...new Map(RUNS.map((_, run) => [of(run), key === "" ? run : valueOf(run, key)]))]
    .sort((one, other) => compareValues(one[1], other[1], false))
    .map(([name]) => name);
  const ordered = key !== "" && values.length > 2 && isNumeric(key, RUNS.map((_, run) => run));
  const some = values.length <= TEN.length && !ordered;
  const colours = new Map(values.map((name, index) => [name, some ? TEN[index] : scaled(values.length > 1 ? index / (values.length - 1) : 0)]));
  return { of, colours };
}

/* Labels a log axis at 1, 2, 5, 10; all nine of a decade do not fit. */
function logTicks(values) {
  const decades = Math.log10(Math.max(...values) / Math.min(...values));
  return decades > 0.8 && decades < 4 ? { dtick: "D2" } : {};
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layoutOf(more) {
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"), exponentformat: "power", minexponent: 4, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 56, r: 14, t: 30, b: 44 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--quiet"), activecolor: style("--accent") },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--line"), font: { color: style("--text") }, align: "left" },
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}
const PLOT = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };

byId("about").textContent = `${many(RUNS.length, "run")} of ${DATA.asked}, ${DATA.made.replace("T", " ").replace("+00:00", " UTC")}, ddpm ${DATA.version}`;
