/* Each run: its configuration against its recipe's, starts, data, warnings; built when opened. */

function pairs(heads, rows) {
  const body = rows.map(([name, ...cells]) => element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))));
  const head = heads ? element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)))) : null;
  return element("table", { className: "pairs" }, head, element("tbody", {}, ...body));
}

function configurationOf(run) {
  const settings = { ...DATA.common, ...run.config };
  const { name, known, differs } = run.recipe;
  const part = element("div", {}, element("h4", {}, "Configuration"));
  if (!run.readable) {
    part.append(element("p", { className: "said" }, "It cannot be read."));
    return part;
  }
  const keys = Object.keys({ ...settings, ...differs });
  const of = (key) => settings[key] ?? "–";
  if (known) {
    const rows = keys.filter((key) => key in differs).map((key) => [key, of(key), differs[key] ?? "–"]);
    part.append(rows.length ? pairs(["setting", "this run", `recipe: ${name}`], rows) : element("p", { className: "said" }, `Same as its recipe: ${name}.`));
  } else part.append(element("p", { className: "said" }, `This version cannot compose its recipe (${name || "unknown"}) for comparison.`));
  const rest = element("details", {}, element("summary", {}, `all ${Object.keys(settings).length} settings`));
  rest.addEventListener("toggle", () => {
    if (rest.open && rest.children.length === 1) rest.append(pairs(["setting", "this run"], Object.keys(settings).sort().map((key) => [key, of(key)])));
  });
  part.append(rest);
  return part;
}

function startsOf(run) {
  const part = element("div", {}, element("h4", {}, run.starts.length ? many(run.starts.length, "start") : "Starts"));
  if (!run.starts.length) part.append(element("p", { className: "said" }, "run.json lists none."));
  for (const start of run.starts) {
    const rows = Object.entries(start).filter(([, value]) => value).map(([name, value]) => [name, value]);
    part.append(pairs(null, rows));
  }
  return part;
}

function insideOf(run) {
  const inside = element("div", { className: "inside" }, element("p", {}, element("code", {}, run.path)));
  if (run.error) inside.append(element("h4", {}, "Error"), element("pre", { className: "bad" }, run.error));
  if (run.warnings.length) inside.append(element("h4", {}, "Warnings"), ...run.warnings.map((line) => element("pre", {}, line)));
  inside.append(configurationOf(run), startsOf(run));
  const data = Object.entries(run.data);
  if (data.length) inside.append(element("h4", {}, "Data"), pairs(null, data));
  return inside;
}

const openRuns = new Set();

function drawEach() {
  const runs = inTableOrder(drawn());
  const made = runs.map((index) => {
    const run = RUNS[index];
    const notes = [run.status, run.warnings.length ? many(run.warnings.length, "warning") : ""].filter(Boolean).join(", ");
    const bad = /failed|unreadable|cut off/.test(run.status);
    const summary = element("summary", {}, `${run.label} `, element("span", { className: bad ? "at bad" : "at" }, notes));
    summary.dataset.key = index;
    const box = element("details", {}, summary);
    box.addEventListener("toggle", () => {
      box.open ? openRuns.add(index) : openRuns.delete(index);
      if (box.open && box.children.length === 1) box.append(insideOf(run));
    });
    box.open = openRuns.has(index);
    return box;
  });
  keepingFocus(byId("each"), () => byId("each").replaceChildren(...made));
  byId("runs-said").textContent = state.picked.size ? "Picked runs." : "All runs in the table.";
}

drawEach();
redraws.push(drawEach);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
