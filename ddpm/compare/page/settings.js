/* A figure by settings: points with error bars over seeds, a heat map, parallel coordinates. */

const against = byId("against");
const candidates = () => SETTINGS.filter((key) => key !== "seed").concat(SETTINGS.includes("seed") ? ["seed"] : []);
const figureColumns = columnsOf("figure");

/* Positions of a setting's values on an axis: by value if all are numbers, else evenly spaced. */
function scaleOf(key, runs) {
  const values = runs.map((run) => valueOf(run, key));
  const numbers = values.filter(isNumber);
  if (numbers.length === values.length && numbers.length) {
    const log = wantsLog(numbers);
    const place = log ? Math.log10 : (value) => value;
    const [low, high] = [place(Math.min(...numbers)), place(Math.max(...numbers))];
    const distinct = [...new Set(numbers)].sort((one, other) => one - other);
    const ticks = distinct.length <= 8 ? distinct : [distinct[0], distinct[Math.floor(distinct.length / 2)], distinct[distinct.length - 1]];
    const at = (value) => (high > low ? (place(value) - low) / (high - low) : 0.5);
    return { at, ticks: ticks.map((value) => [at(value), digits(value)]), log };
  }
  const distinct = [...new Map(values.map((value) => [words(value), value]))].sort((one, other) => compareValues(one[1], other[1], false)).map(([name]) => name);
  const at = (value) => (distinct.length > 1 ? distinct.indexOf(words(value)) / (distinct.length - 1) : 0.5);
  const ticks = distinct.length <= 12 ? distinct : distinct.filter((_, index) => index % Math.ceil(distinct.length / 12) === 0);
  return { at, ticks: ticks.map((name) => [distinct.indexOf(name) / Math.max(distinct.length - 1, 1), name]), names: distinct };
}

const stateOf = (run, key) => {
  const value = RUNS[run].row[key];
  return `${asText(RUNS[run].label)}<br>${digits(plain(value), 5)}${isAt(value) ? ` at step ${value[1]}` : ""}${RUNS[run].status === "complete" ? "" : `<br>${asText(RUNS[run].status)}`}`;
};

function drawPoints(figure, setting, runs) {
  const { of, colours } = coloursBy(byId("colour").value);
  const values = runs.map((run) => valueOf(run, setting));
  const numeric = values.every(isNumber);
  const x = (run) => (numeric ? valueOf(run, setting) : words(valueOf(run, setting)));
  const whole = (run) => RUNS[run].status === "complete";
  const traces = [...colours].map(([name, colour]) => {
    const mine = runs.filter((run) => of(run) === name);
    return {
      x: mine.map(x), y: mine.map((run) => valueOf(run, figure.key)), text: mine.map((run) => stateOf(run, figure.key)), customdata: mine,
      mode: "markers", marker: { color: colour, size: 8, opacity: 0.75, symbol: mine.map((run) => (whole(run) ? "circle" : "circle-open")) }, hovertemplate: "%{text}<extra></extra>",
    };
  }).filter((trace) => trace.x.length);
  const groups = DATA.groups.filter((group) => setting !== "seed" && figure.of === "final" && group.figures[figure.key] && group.members.every((run) => runs.includes(run)));
  if (groups.length) traces.push({
    x: groups.map((group) => x(group.members[0])), y: groups.map((group) => group.figures[figure.key][0]),
    error_y: { array: groups.map((group) => group.figures[figure.key][1]), color: style("--text"), thickness: 1.5, width: 7 },
    text: groups.map((group) => { const [mean, deviation, count] = group.figures[figure.key]; return `mean of ${count || group.members.length} seeds<br>${asText(groupLabel(group))}<br>${digits(mean, 5)} ± ${digits(deviation, 2)}`; }),
    mode: "markers", marker: { symbol: "line-ew-open", size: 18, color: style("--text"), line: { width: 2 } }, hovertemplate: "%{text}<extra></extra>",
  });
  const log = numeric && wantsLog(values);
  const ticks = numeric && new Set(values).size <= 8 ? { tickvals: [...new Set(values)], ticktext: [...new Set(values)].map((value) => digits(value)) } : {};
  const names = numeric ? [] : scaleOf(setting, runs).names.map(String);
  const categories = numeric ? {} : { categoryorder: "array", categoryarray: names, tickvals: names, ticktext: names.map((name) => asText(name)) };
  const layout = layoutOf({ xaxis: { title: { text: asText(setting) }, type: numeric ? (log ? "log" : "linear") : "category", ...ticks, ...categories }, yaxis: { title: { text: titleLines(figure) } } });
  const open = runs.some((run) => !whole(run)) ? "Hollow points are incomplete runs." : "";
  return { traces, layout, said: [groups.length ? "Bars show mean and deviation over seeds." : "", open, log ? "The setting is on a log axis." : ""] };
}

function titleLines(figure) {
  const name = `${figure.figure}${figure.of === "best" ? ", best" : ""}`;
  return asText(name, 200).replace(/(.{24,}?[:@ ,])/g, "$1<br>");
}

function drawMap(figure, first, second, runs) {
  const [across, up] = [first, second].map((key) => [...new Map(runs.map((run) => [words(valueOf(run, key)), valueOf(run, key)]))].sort((one, other) => compareValues(one[1], other[1], false)).map(([name]) => name));
  const cells = up.map((row) => across.map((column) => runs.filter((run) => words(valueOf(run, second)) === row && words(valueOf(run, first)) === column)));
  const mean = (mine) => mine.reduce((sum, run) => sum + valueOf(run, figure.key), 0) / mine.length;
  const z = cells.map((row) => row.map((mine) => (mine.length ? mean(mine) : null)));
  const text = cells.map((row) => row.map((mine) => (mine.length ? `${digits(mean(mine))}${mine.length > 1 ? `<br>(${mine.length})` : ""}` : "")));
  const hover = cells.map((row) => row.map((mine) => mine.slice(0, 12).map((run) => stateOf(run, figure.key)).join("<br>") + (mine.length > 12 ? `<br>and ${mine.length - 12} more` : "")));
  const axis = (key, names) => ({ title: { text: asText(key) }, type: "category", tickvals: names.map((_, index) => index), ticktext: names.map((name) => asText(name, 24)), gridcolor: "rgba(0,0,0,0)" });
  const trace = {
    type: "heatmap", x: across.map((_, index) => index), y: up.map((_, index) => index), z, text, customdata: hover, hovertemplate: "%{customdata}<extra></extra>", hoverongaps: false,
    texttemplate: across.length * up.length <= 100 ? "%{text}" : "", xgap: 2, ygap: 2,
    colorscale: SCALE.map((_, index) => [index / (SCALE.length - 1), scaled(index / (SCALE.length - 1))]), reversescale: figure.better === "min",
    colorbar: { thickness: 12, outlinewidth: 0, exponentformat: "power", tickfont: { color: style("--text") } },
  };
  const others = candidates().filter((key) => key !== first && key !== second && new Set(runs.map((run) => words(valueOf(run, key)))).size > 1);
  const averaged = cells.flat().some((mine) => mine.length > 1);
  return {
    traces: [trace], layout: layoutOf({ xaxis: axis(first, across), yaxis: axis(second, up) }),
    said: [averaged ? `Each cell is the mean of its runs (number of runs in parentheses)${others.length ? `, over all values of ${others.join(", ")}` : ""}.` : "", figure.better ? "Brighter is better." : ""],
  };
}

const axisName = (name) => asText(name, 60).replace(/(.{8,}?[:@._])/g, "$1<br>");

function drawParallel(figure, runs) {
  const keys = [...candidates(), figure.key];
  const scales = keys.map((key) => scaleOf(key, runs));
  const { of, colours } = coloursBy(byId("colour").value);
  const nudge = keys.map((key) => (isNumeric(key, runs) ? 0 : 0.012));
  const traces = [...colours].map(([name, colour]) => {
    const trace = { x: [], y: [], text: [], customdata: [], mode: "lines+markers", line: { color: withAlpha(colour, runs.length > 60 ? 0.45 : 0.8), width: 1.4 }, marker: { color: colour, size: 5 }, hovertemplate: "%{text}<extra></extra>" };
    runs.filter((run) => of(run) === name).forEach((run, place, mine) => {
      keys.forEach((key, index) => {
        trace.x.push(index);
        trace.y.push(scales[index].at(valueOf(run, key)) + nudge[index] * (place / mine.length - 0.5));
        trace.text.push(`${stateOf(run, figure.key)}<br>${asText(key)} ${asText(words(valueOf(run, key)))}`);
        trace.customdata.push(run);
      });
      trace.x.push(null); trace.y.push(null); trace.text.push(""); trace.customdata.push(null);
    });
    return trace;
  }).filter((trace) => trace.x.length);
  const annotations = keys.flatMap((key, index) => [
    { x: index, y: 1, yref: "paper", yanchor: "bottom", yshift: 8, text: axisName(key === figure.key ? figure.figure : key), showarrow: false, font: { size: 12, color: style("--text") } },
    ...scales[index].ticks.map(([y, text]) => ({ x: index, y, text: asText(text, 22), showarrow: false, xanchor: index === keys.length - 1 ? "right" : "left", xshift: index === keys.length - 1 ? -7 : 7, font: { size: 11 }, bgcolor: style("--back"), opacity: 0.85 })),
  ]);
  const layout = layoutOf({
    margin: { l: 44, r: 44, t: 84, b: 16 }, annotations,
    xaxis: { range: [-0.15, keys.length - 0.85], showticklabels: false, zeroline: false, tickvals: keys.map((_, index) => index), gridcolor: style("--quiet"), fixedrange: true },
    yaxis: { range: [-0.06, 1.06], showticklabels: false, showgrid: false, zeroline: false, fixedrange: true },
  });
  return { traces, layout, width: keys.length * 140, said: ["One line per run, across all settings to the figure.", scales.some(({ log }) => log) ? "Wide ranges have a log axis." : ""] };
}

function drawAgainst() {
  const figure = figureColumns.find((column) => column.key === byId("figure").value);
  const view = byId("view").value;
  const [first, second] = [byId("first").value, byId("second").value];
  byId("first-label").hidden = view === "parallel";
  byId("second-label").hidden = view !== "map";
  const keys = candidates();
  const runs = figure ? drawn().filter((run) => isNumber(valueOf(run, figure.key))) : [];
  const missing = drawn().length - runs.length;
  against.hidden = true;
  let said = [];
  if (!figure) said = ["No run has a figure yet."];
  else if (!keys.length) said = ["No setting differs between these runs."];
  else if (!runs.length) said = ["None of these runs has this figure."];
  else if (view === "map" && keys.length < 2) said = ["Only one setting differs; a heat map needs two."];
  else {
    against.hidden = false;
    const made = view === "parallel" ? drawParallel(figure, runs) : view === "map" ? drawMap(figure, first, second, runs) : drawPoints(figure, first, runs);
    against.style.minWidth = made.width ? `${made.width}px` : "";
    said = [...made.said, missing ? `${missing} of ${many(drawn().length, "run")} ${missing === 1 ? "lacks" : "lack"} this figure.` : ""];
    Plotly.react(against, made.traces, made.layout, PLOT).then(() => {
      if (againstListens) return;
      againstListens = true;
      against.on("plotly_click", ({ points }) => { if (isNumber(points[0].customdata)) pick([points[0].customdata], !state.picked.has(points[0].customdata)); });
    });
  }
  byId("settings-said").textContent = said.filter(Boolean).join(" ");
}
let againstListens = false;

function setUpAgainst() {
  for (const column of figureColumns) byId("figure").append(element("option", { value: column.key }, `${column.figure}, ${column.of}`));
  const firstMeasured = figureColumns.find((column) => column.better && !column.part && !/^loss( |$)/.test(column.figure));
  if (figureColumns.length) byId("figure").value = (firstMeasured || figureColumns[0]).key;
  const keys = candidates();
  for (const id of ["first", "second"]) for (const key of keys) byId(id).append(element("option", { value: key }, key));
  if (keys.length) byId("first").value = keys[0];
  if (keys.length > 1) byId("second").value = keys[1];
  const count = keys.filter((key) => key !== "seed").length;
  byId("view").value = count > 2 ? "parallel" : count === 2 ? "map" : "scatter";
  for (const id of ["figure", "view", "first", "second"]) byId(id).addEventListener("input", drawAgainst);
}

/* Drawn when scrolled into view, like the curves. */
let againstVisible = false;
const drawAgainstIfSeen = () => { if (againstVisible) drawAgainst(); };
setUpAgainst();
new IntersectionObserver((seen) => {
  againstVisible = seen[seen.length - 1].isIntersecting;
  drawAgainstIfSeen();
}, { rootMargin: "200px" }).observe(byId("settings"));
redraws.push(drawAgainstIfSeen);
