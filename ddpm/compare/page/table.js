/* The table: sortable by any column, filtered by value, with rows to pick and seeds to unfold. */

const SHOWN_FIGURES = 8; // protocols with a visible column at the start
const hidden = new Set();
const figures = [...new Map(columnsOf("figure").map((column) => [column.figure, column])).values()];
figures.filter((column) => !column.part).slice(SHOWN_FIGURES).concat(figures.filter((column) => column.part)).forEach((column) => hidden.add(column.figure));

const visibleColumns = () => DATA.columns.filter((column) => !hidden.has(column.figure));

function passes(value, filter) {
  return filter.split("|").some((part) => {
    const [, sign, rest] = part.trim().match(/^(<=|>=|<|>|=)?\s*(.*)$/);
    if (rest === "") return true;
    const number = Number(rest);
    if (sign && !Number.isNaN(number)) {
      if (typeof value !== "number") return false;
      return { "<": value < number, ">": value > number, "<=": value <= number, ">=": value >= number, "=": value === number || digits(value) === rest }[sign];
    }
    const text = words(value).toLowerCase();
    return sign === "=" ? text === rest.toLowerCase() : text.includes(rest.toLowerCase());
  });
}

function shownRuns() {
  const filters = Object.entries(state.filters).filter(([, filter]) => filter.trim());
  return RUNS.map((_, run) => run).filter((run) =>
    filters.every(([key, filter]) => passes(key === "label" ? `${RUNS[run].label} ${RUNS[run].path}` : valueOf(run, key), filter)));
}

/* The table's entries, in order: single runs, and groups of seeds with their members. */
function entries(runs) {
  const kept = new Set(runs);
  const made = [];
  const done = new Set();
  for (const run of runs) {
    const group = state.together ? groupOf.get(run) : undefined;
    if (!group) made.push({ run });
    else if (!done.has(group)) {
      done.add(group);
      made.push({ group, members: group.members.filter((member) => kept.has(member)) });
    }
  }
  if (state.sort === null) return made;
  const key = state.sort;
  const ofRun = (run) => (key === "label" ? RUNS[run].label : valueOf(run, key));
  const ofEntry = (entry) => {
    if (entry.run !== undefined) return ofRun(entry.run);
    const mean = entry.group.figures[key];
    if (mean) return mean[0];
    return entry.members.map(ofRun).sort((one, other) => compareValues(one, other, state.down))[0];
  };
  const order = (value) => (one, other) => compareValues(value(one), value(other), state.down);
  for (const entry of made) if (entry.members) entry.members.sort(order(ofRun));
  return made.sort(order(ofEntry));
}

const inTableOrder = (runs) => entries(runs).flatMap(({ run, members }) => members ?? [run]);

function cellOf(column, value, best) {
  const cell = element("td", { className: typeof plain(value) === "number" ? "number" : "" });
  cell.textContent = words(plain(value));
  if (typeof plain(value) === "number") cell.title = String(plain(value));
  if (isAt(value)) cell.append(" ", element("span", { className: "at" }, `@${value[1]}`));
  if (column.key === "status" && /failed|unreadable|cut off/.test(String(value))) cell.classList.add("bad");
  if (best && typeof plain(value) === "number" && plain(value) === best) cell.classList.add("best");
  return cell;
}

function rowOf(run, columns, best, member) {
  const { label, path, row } = RUNS[run];
  const box = element("input", { type: "checkbox", checked: state.picked.has(run), "aria-label": `pick ${label}` });
  box.dataset.key = `pick run ${run}`;
  box.addEventListener("change", () => pick([run], box.checked));
  const name = element("th", { className: "name", scope: "row", title: path }, element("div", { className: "cell" }, box, element("span", {}, label)));
  const made = element("tr", { className: `${state.picked.has(run) ? "picked" : ""} ${member ? "member" : ""}` }, name);
  made.dataset.run = run;
  for (const column of columns) made.append(cellOf(column, row[column.key], best[column.key]));
  return made;
}

function groupRow({ group, members }, columns) {
  const open = state.open.has(group);
  const fold = element("button", { type: "button", className: "fold", "aria-expanded": String(open), "aria-label": "show each seed" }, open ? "▾" : "▸");
  fold.addEventListener("click", () => {
    open ? state.open.delete(group) : state.open.add(group);
    drawBody();
  });
  fold.dataset.key = `fold ${DATA.groups.indexOf(group)}`;
  const picked = members.filter((run) => state.picked.has(run)).length;
  const box = element("input", { type: "checkbox", checked: picked === members.length, "aria-label": "pick all seeds of this group" });
  box.indeterminate = picked > 0 && picked < members.length;
  box.dataset.key = `pick group ${DATA.groups.indexOf(group)}`;
  box.addEventListener("change", () => pick(members, box.checked));
  const count = members.length < group.members.length ? `${members.length} of ${group.members.length} seeds` : many(members.length, "seed");
  const title = `Mean and deviation of ${many(group.members.length, "seed")}: ${groupLabel(group)}`;
  const name = element("th", { className: "name", scope: "row", title }, element("div", { className: "cell" }, box, fold, element("span", {}, count)));
  const made = element("tr", { className: `group ${picked === members.length ? "picked" : ""}` }, name);
  made.dataset.group = DATA.groups.indexOf(group);
  for (const column of columns) {
    const mean = column.of === "final" ? group.figures[column.key] : undefined;
    const values = new Set(members.map((run) => words(valueOf(run, column.key)))); // the group's row shows only values that all members share
    if (mean) {
      const [value, deviation, runs] = mean;
      const cell = element("td", { className: "number", title: `${value} ± ${deviation}` }, element("span", { className: "mean" }, digits(value)), " ", element("span", { className: "deviation" }, `± ${digits(deviation, 2)}${runs ? ` (${runs} runs)` : ""}`));
      made.append(cell);
    } else if (column.kind !== "figure" && values.size === 1) made.append(cellOf(column, RUNS[members[0]].row[column.key]));
    else made.append(element("td"));
  }
  return made;
}

/* The best value in each column of figures among the runs shown. */
function bestOf(columns, runs) {
  const found = {};
  for (const column of columns.filter((column) => column.better)) {
    const values = runs.map((run) => valueOf(run, column.key)).filter((value) => typeof value === "number");
    if (values.length > 1) found[column.key] = Math[column.better](...values);
  }
  return found;
}

function drawBody() {
  const columns = visibleColumns();
  const runs = shownRuns();
  const best = bestOf(columns, runs);
  const rows = [];
  for (const entry of entries(runs)) {
    if (entry.run !== undefined) rows.push(rowOf(entry.run, columns, best, false));
    else {
      rows.push(groupRow(entry, columns));
      if (state.open.has(entry.group)) for (const run of entry.members) rows.push(rowOf(run, columns, best, true));
    }
  }
  const body = document.querySelector("#rows tbody");
  keepingFocus(body, () => body.replaceChildren(...rows));
  const left = runs.length < RUNS.length ? `${runs.length} of ${many(RUNS.length, "run")} shown` : `all ${many(RUNS.length, "run")} shown`;
  byId("shown").textContent = `${left}, ${state.picked.size ? `${state.picked.size} picked` : "none picked"}`;
}

function headerOf(key, name, numeric, title) {
  const sorted = state.sort === key;
  const button = element("button", { type: "button", title: title || "" }, `${name}${sorted ? (state.down ? " ▼" : " ▲") : ""}`);
  button.dataset.sort = key;
  button.addEventListener("click", () => {
    if (!sorted) [state.sort, state.down] = [key, false];
    else if (!state.down) state.down = true;
    else state.sort = null;
    drawTable();
    drawStrips();
    drawEach();
  });
  button.dataset.key = `sort ${key}`;
  return element("th", { scope: "col", className: numeric ? "number" : "", "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }, button);
}

function filterOf(key, name) {
  const input = element("input", { type: "text", value: state.filters[key] || "", placeholder: "filter", spellcheck: false, "aria-label": `filter ${name}` });
  input.dataset.filter = key;
  input.addEventListener("input", () => {
    state.filters[key] = input.value;
    changed();
  });
  return element("th", {}, input);
}

/* Lets long names break after these characters. */
const breakable = (text) => text.split(/(?<=[:@ ])/).flatMap((part) => [part, element("wbr")]);

function drawHead() {
  const columns = visibleColumns();
  const grouped = element("tr", { className: "grouped" }, element("th", { className: "name" }));
  const groupName = (column) => column.figure || { setting: "settings that differ", state: "" }[column.kind];
  for (let at = 0; at < columns.length; ) {
    let end = at;
    while (end < columns.length && groupName(columns[end]) === groupName(columns[at]) && columns[end].kind === columns[at].kind) end += 1;
    const { protocol } = columns[at];
    const title = protocol ? Object.entries(protocol).map(([key, value]) => `${key}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join("\n") : "";
    grouped.append(element("th", { colSpan: end - at, scope: "colgroup", title }, ...breakable(groupName(columns[at]))));
    at = end;
  }
  const all = RUNS.map((_, run) => run);
  const heads = element("tr", {}, headerOf("label", "run", false));
  heads.firstChild.classList.add("name");
  const filters = element("tr", { className: "filters" }, filterOf("label", "run"));
  filters.firstChild.classList.add("name");
  for (const column of columns) {
    heads.append(headerOf(column.key, column.of || column.key, isNumeric(column.key, all), column.key));
    filters.append(filterOf(column.key, column.key));
  }
  const head = document.querySelector("#rows thead");
  keepingFocus(head, () => head.replaceChildren(grouped, heads, filters));
}

function drawTable() {
  drawHead();
  drawBody();
}

function drawColumns() {
  const box = byId("columns");
  box.hidden = figures.length === 0;
  const say = () => { box.firstElementChild.textContent = `Figures: ${figures.length - hidden.size} of ${figures.length}`; };
  for (const { figure } of figures) {
    const input = element("input", { type: "checkbox", checked: !hidden.has(figure) });
    input.addEventListener("change", () => {
      input.checked ? hidden.delete(figure) : hidden.add(figure);
      say();
      drawTable();
    });
    box.lastElementChild.append(element("label", {}, input, figure));
  }
  say();
}

const together = byId("together");
together.checked = state.together;
together.parentElement.hidden = DATA.groups.length === 0;
together.addEventListener("change", () => {
  state.together = together.checked;
  drawTable();
});
byId("pick-shown").addEventListener("click", () => pick(shownRuns(), true));
byId("pick-none").addEventListener("click", () => pick([...state.picked], false));
byId("clear-filters").addEventListener("click", () => {
  state.filters = {};
  drawHead();
  changed();
});
drawColumns();
drawTable();
redraws.push(drawBody);
