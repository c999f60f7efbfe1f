// The costs tab: the calculators of tinyfm/calc behind sliders. Long ranges are on a scale of
// powers, so a slider's value is an exponent.

import { $, attempt, barParts, duration, el, fill, later, percent, setSlider, short, showValues } from "./dom.js";
import { get, post } from "./api.js";
import { stackedBar } from "./plot.js";

let systems = [];
let gpus = [];
const form = $("job").elements;

/** 1.234567e11 -> 1.2e11, as what a slider says is rounded too. */
const units = () => Number((10 ** Number(form.units.value)).toPrecision(2));
const whole = (name, base) => base ** Number(form[name].value);
const bytes = (n) => short(n, "B");
const WORDS = [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]];

/** 8.03e9 -> "8.03 billion" */
function inWords(n) {
  const [scale, word] = WORDS.find(([least]) => n >= least) ?? [1, ""];
  return `${Number((n / scale).toPrecision(3)).toLocaleString("en")} ${word}`.trimEnd();
}

function chosen() {
  return systems.find((system) => system.name === form.system.value);
}

/** Set the sliders to a published system. */
function publish() {
  const system = chosen();
  $("job-sizes").hidden = !system.layers;
  if (system.layers) {
    setSlider(form.layers, system.layers);
    setSlider(form.heads, system.heads);
    setSlider(form.context, Math.round(Math.log2(system.context)));
  }
  setSlider(form.units, Math.log10(system.trained || 20 * system.parameters));
}

/** The job as the server wants it: sizes as published are 0. */
function job() {
  const system = chosen();
  const size = (name, value) => (system.layers && value !== system[name] ? value : 0);
  const context = whole("context", 2);
  return {
    system: system.name,
    layers: size("layers", Number(form.layers.value)),
    heads: size("heads", Number(form.heads.value)),
    context: Math.log2(system.context) % 1 ? 0 : size("context", context),
    gpu: form.gpu.value,
    gpus: whole("gpus", 2),
    units: units(),
    rows: whole("rows", 2),
    dtype: form.dtype.value,
    optimizer: form.optimizer.value,
    checkpoint: form.checkpoint.value,
    zero: Number(form.zero.value),
    mfu: Number(form.mfu.value),
  };
}

async function calculate() {
  if (!systems.length) return; // the lists are still on their way
  const asked = job();
  await attempt($("costs-status"), async () => {
    const found = await post("/api/costs", asked);
    const facts = [
      ["Parameters", inWords(found.parameters)],
      ["Memory", `${bytes(found.total)} of ${bytes(found.gpu_memory)}: ${found.total > found.gpu_memory ? "does not fit" : "fits"}`],
      ["Time", duration(found.days * 86_400)],
      ["Price", found.cost_usd ? `$${inWords(found.cost_usd)}, at prices of ${found.priced}` : "not known for this GPU"],
      ["Computing", `${found.flops.toExponential(2)} FLOP`],
      ["GPU-hours", Math.round(found.gpu_hours).toLocaleString("en")],
      ["Energy, at most", found.energy_kwh ? short(1000 * found.energy_kwh, "Wh") : "not known"],
      ["To serve one row", bytes(found.serving.weights + found.serving.cache)],
    ];
    $("bill").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    showMemory(found);
    showParts(found.parts);
  });
}

function showMemory(found) {
  const parts = Object.entries(found.memory)
    .filter(([, value]) => value > 0)
    .map(([name, value]) => ({ name, value }));
  const about = parts.map(({ name, value }) => `${name} ${bytes(value)}`).join(", ");
  const list = el("ol", { class: "bars long" }, ...parts.map(({ name, value }) => bar(name, value / found.total, bytes(value))));
  $("memory").replaceChildren(stackedBar(parts, found.gpu_memory, { format: bytes, about, width: $("memory").clientWidth }), list);
}

function showParts(parts) {
  const total = Object.values(parts).reduce((a, b) => a + b, 0);
  $("parts").replaceChildren(
    ...Object.entries(parts).map(([name, n]) => bar(name, n / total, `${inWords(n)}, ${percent(n / total)}`)),
  );
}

function bar(name, share, text) {
  return el("li", {}, ...barParts(name, share, text));
}

function showFormats() {
  fill(form.dtype, gpus.find((gpu) => gpu.name === form.gpu.value).dtypes.map((name) => [name]));
}

let started = false;

/** Called whenever the tab is shown. */
export async function open() {
  if (started) return;
  started = true;
  await attempt($("costs-status"), async () => {
    ({ systems, gpus } = await get("/api/systems"));
    fill(form.system, systems.map((system) => [system.name, `${system.name}, ${inWords(system.parameters)}`]));
    fill(form.gpu, gpus.map((gpu) => [gpu.name]));
    form.system.value = "llama3-8b";
    form.gpu.value = "h100";
    showFormats();
    publish();
    await calculate();
  });
}

showValues($("job"), {
  context: (value) => `${(2 ** value).toLocaleString("en")} tokens`,
  units: () => `${inWords(units())} ${chosen() ? `${chosen().unit}s` : ""}`,
  gpus: (value) => (2 ** value).toLocaleString("en"),
  rows: (value) => (2 ** value).toLocaleString("en"),
  mfu: (value) => `${Math.round(100 * value)}%`,
});
const soon = later(calculate, 60);
$("job").addEventListener("input", (event) => {
  if (event.target.name === "system") publish();
  if (event.target.name === "gpu") showFormats();
  soon();
});
window.addEventListener("resize", later(() => $("costs").hidden || calculate()));
$("job").addEventListener("submit", (event) => event.preventDefault());
