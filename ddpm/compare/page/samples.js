/* Previews: one row per run, the same noise in each column, over the steps of training. */

const MOST_STRIPS = 50;
let stripsShown = MOST_STRIPS;
const when = byId("when");
const allSteps = [...new Set(RUNS.flatMap((run) => (run.samples ? run.samples.steps.map(([step]) => step) : [])))].sort((one, other) => one - other);

function latest({ samples }, step) {
  return samples.steps.filter(([at]) => at <= step).pop();
}

function stripOf(run, step) {
  const { samples, label, path } = RUNS[run];
  const found = latest(RUNS[run], step);
  const [width, height] = samples.size;
  const said = found ? `step ${found[0]}` : `no preview up to step ${step}`;
  const picture = found ? element("img", { src: found[1], alt: `${label}: ${said}`, className: width <= 64 ? "pixels" : "" }) : null;
  if (picture) picture.style.aspectRatio = `${samples.columns * width} / ${height}`;
  const words = element("div", { className: "words", title: path }, label, element("br"), element("span", { className: "at" }, said));
  const pictures = element("div", { className: "pictures" }, picture);
  pictures.style.setProperty("--columns", samples.columns);
  return element("div", { className: "strip" }, words, pictures);
}

function drawStrips() {
  const step = allSteps[Number(when.value)];
  const runs = inTableOrder(drawn());
  const having = runs.filter((run) => RUNS[run].samples);
  const some = having.slice(0, stripsShown);
  const byNoise = new Map();
  for (const run of some) {
    const key = `noise of ${RUNS[run].samples.noise}`;
    byNoise.set(key, [...(byNoise.get(key) || []), run]);
  }
  const made = [];
  for (const [noise, mine] of byNoise) {
    const columns = Math.max(...mine.map((run) => RUNS[run].samples.columns));
    const heads = element("div", { className: "heads pictures" });
    heads.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    for (let index = 0; index < columns; index += 1) heads.append(element("span", {}, String(index + 1)));
    made.push(element("h3", {}, noise), element("div", { className: "strip" }, element("span", { className: "words at" }, "the same noise in each column"), heads), ...mine.map((run) => stripOf(run, step)));
  }
  if (having.length > some.length) {
    const more = element("button", { type: "button" }, `Show ${Math.min(MOST_STRIPS, having.length - some.length)} more of ${having.length}`);
    more.addEventListener("click", () => {
      stripsShown += MOST_STRIPS;
      drawStrips();
    });
    made.push(more);
  }
  byId("strips").replaceChildren(...made);
  byId("when-said").textContent = step === undefined ? "" : `up to ${step}`;
  const drawers = new Set(having.map((run) => RUNS[run].samples.by).filter(Boolean));
  byId("samples-said").textContent = [
    having.length ? "" : "None of these runs has a preview yet.",
    having.length < runs.length && having.length ? `${runs.length - having.length} of ${many(runs.length, "run")} ${runs.length - having.length === 1 ? "has" : "have"} none.` : "",
    having.length ? "From each run's previews, drawn with averaged weights." : "",
    drawers.size ? `Drawn by ${[...drawers].join("; ")}.` : "",
    DATA.reduced.length ? `${DATA.reduced.join("; ")}.` : "",
  ].filter(Boolean).join(" ");
}

when.max = Math.max(allSteps.length - 1, 0);
when.value = when.max;
byId("samples-controls").hidden = allSteps.length < 2;
when.addEventListener("input", drawStrips);
drawStrips();
redraws.push(drawStrips);
