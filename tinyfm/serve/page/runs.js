// The runs tab: the curves of all runs side by side, followed while one trains; and one run's
// samples as a film, its settings and its verdict.

import { $, attempt, duration, el, fill, later, say, showValues } from "./dom.js";
import { get, getFile } from "./api.js";
import { Film } from "./film.js";
import { linePlot, lineSample } from "./plot.js";

const EVERY = 2000; // milliseconds between two looks at runs that train

let runs = []; // as the server describes them
const rows = new Map(); // name of a run -> rows of its metrics.jsonl
const drawn = new Set(); // names of the runs that are drawn
const styles = new Map(); // name of a run -> number of its line's colour and dashes

const film = new Film($("samples-step"), $("samples-play"), showSample, 900);

/** The number of a run's line: in the order in which runs were drawn first. */
function style(name) {
  if (!styles.has(name)) styles.set(name, styles.size);
  return styles.get(name);
}

/** Read what is new of each drawn run. */
async function readCurves() {
  for (const name of drawn) {
    const known = rows.get(name) ?? [];
    const found = await get("/api/metrics", { run: name, after: known.at(-1)?.step ?? -1 });
    rows.set(name, [...known, ...found.rows]);
  }
}

/** The values that can be drawn: losses first, then the other scores. */
function listCurves() {
  const names = new Set([...rows.values()].flat().flatMap((row) => Object.keys(row)));
  names.delete("step");
  const first = ["loss", "val_loss"].filter((name) => names.has(name));
  const both = first.length === 2 ? [["both", "loss, and val_loss"]] : [];
  const others = [...names].filter((name) => !first.includes(name)).sort();
  fill($("curve"), [...both, ...[...first, ...others].map((name) => [name])]);
}

function draw() {
  const shown = $("curve").value;
  const names = shown === "both" ? ["loss", "val_loss"] : [shown];
  const lines = [];
  for (const run of runs.filter((one) => drawn.has(one.name))) {
    for (const name of names) {
      const points = (rows.get(run.name) ?? []).filter((row) => name in row).map((row) => [row.step, row[name]]);
      if (points.length) lines.push({ name: `${run.name}, ${name}`, points, style: style(run.name), faint: shown === "both" && name === "loss" });
    }
  }
  const about = `${names.join(" and ")} by step: ${lines.map(({ name, points }) => `${name} ends at ${points.at(-1)[1].toPrecision(4)}`).join("; ")}`;
  const yName = names.join(", thick: ");
  $("curves").replaceChildren(linePlot(lines, { yName, log: $("log-scale").checked, about, width: $("curves").clientWidth }));
}

function listRuns() {
  const focused = document.activeElement?.id; // the new list keeps it
  const items = runs.map((run, i) => {
    const check = el("input", { type: "checkbox", id: `run-${i}`, checked: drawn.has(run.name) });
    check.addEventListener("change", async () => {
      if (check.checked) drawn.add(run.name);
      else drawn.delete(run.name);
      listRuns();
      await look();
    });
    const state = run.error ?? (run.training ? "training" : `step ${run.step.toLocaleString("en")}`);
    return el("li", {}, el("label", {}, check, drawn.has(run.name) ? lineSample(style(run.name)) : "", run.name, el("span", { class: "hint" }, state)));
  });
  $("run-list").replaceChildren(...items);
  if (focused?.startsWith("run-")) $(focused)?.focus();
  fill($("run"), runs.filter((run) => !run.error).map((run) => [run.name]));
}

function sayTraining() {
  const training = runs.filter((run) => run.training).map((run) => run.name);
  say($("runs-status"), training.length ? `Training now: ${training.join(", ")}` : "No run trains now.");
}

/** Read and draw everything again. */
async function look() {
  await attempt($("runs-status"), async () => {
    await readCurves();
    listCurves();
    draw();
    sayTraining();
  });
}

/** Look whether a run has trained on, and if so show it. */
async function follow() {
  if ($("runs").hidden || !$("live").checked) return;
  const state = () => JSON.stringify(runs.map((run) => [run.name, run.step, run.training]));
  await attempt($("runs-status"), async () => {
    const before = state();
    runs = await get("/api/runs");
    sayTraining();
    if (state() === before) return;
    listRuns();
    await look();
    await showProgress();
  });
}

// ---- one run ------------------------------------------------------------------------------------

function describe(run) {
  const score = (value) => Number(value.toPrecision(4));
  const steps = `step ${run.step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}`;
  const scored = run.first !== null && run.last !== null;
  const reached = scored ? `${run.score} ${score(run.first)} to ${score(run.last)}` : "not evaluated yet";
  return `${run.preset}: ${steps}, ${reached}, ${duration(run.seconds)} of training`;
}

function chosen() {
  return runs.find((run) => run.name === $("run").value);
}

/** Show what changes while the chosen run trains: its step and score, and its samples. */
async function showProgress() {
  const run = chosen();
  if (!run) return;
  $("description").textContent = describe(run);
  const found = await get("/api/samples", { run: run.name });
  if ($("run").value !== run.name) return; // another one was chosen meanwhile
  const known = new Set(film.moments.map((moment) => moment.file));
  const added = found.filter((sample) => !known.has(sample.file));
  if (added.length) film.add(...added.map((sample) => ({ ...sample, run: run.name })));
  if (!film.moments.length) $("samples").replaceChildren("This run has written no samples yet.");
}

async function choose() {
  const run = chosen();
  if (!run) return;
  $("verdict").replaceChildren();
  const settings = Object.entries(run.config).map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)),
  );
  $("config").replaceChildren(...settings);
  film.clear();
  $("samples").replaceChildren();
  await attempt($("runs-status"), async () => {
    await showProgress();
    const sentences = await get("/api/about", { run: run.name });
    if ($("run").value !== run.name) return;
    $("verdict").append(...sentences.filter(Boolean).map((sentence) => el("p", {}, sentence)));
  });
}

async function showSample(moment) {
  const { text, url } = (moment.content ??= await getFile("/api/sample", { run: moment.run, file: moment.file }));
  if (film.moments[Number($("samples-step").value)] !== moment) return; // turned on meanwhile
  const alt = `samples of ${moment.run} at step ${moment.step}`;
  $("samples").replaceChildren(url ? el("img", { src: url, alt }) : el("pre", { tabindex: 0, "aria-label": alt }, text));
}

let started = false;

/** Called whenever the tab is shown. */
export async function open() {
  if (started) return;
  started = true;
  await attempt($("runs-status"), async () => {
    runs = await get("/api/runs");
    // Losses of one family can be compared; those of others are a click away.
    const first = runs.find((run) => !run.error);
    for (const run of runs) if (run.family === first?.family && !run.error) drawn.add(run.name);
    listRuns();
    await look();
    setInterval(follow, EVERY);
    await choose();
  });
}

showValues(document.querySelector("#runs .film-bar"), {
  sample: (value) => film.moments[value]?.step.toLocaleString("en") ?? "",
});
window.addEventListener("resize", later(() => $("runs").hidden || draw()));
$("curve").addEventListener("change", draw);
$("log-scale").addEventListener("change", draw);
$("run").addEventListener("change", choose);
