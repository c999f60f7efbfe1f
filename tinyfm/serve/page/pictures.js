// The pictures tab: a drawing step by step, pictures that were drawn, changing one, and the walk
// between two. A drawing is a stream of events of POST /api/draw, one for each step.

import { $, attempt, el, fill, say, setSlider, showValues } from "./dom.js";
import { events, post } from "./api.js";
import { Film } from "./film.js";
import { Mask, takeFiles } from "./mask.js";

const WALKED = 12; // pictures of a walk
const MOST_KEPT = 60; // pictures in the gallery
const CHANGED = 0.6; // strength at which a whole picture is changed; a painted part is drawn from noise: 1

let models = [];
let walkers = []; // runs with an autoencoder
let running = null;
let ends = { first: null, last: null }; // pictures of the walk: {picture, item}

const form = $("draw-settings").elements;
const mask = new Mask($("mask"), $("edit").elements.brush);
const strength = $("edit").elements.strength;
const film = new Film($("film-step"), $("film-play"), ({ state, estimate, step, steps }) => {
  const images = { "film-state": state, "film-estimate": estimate };
  for (const [id, url] of Object.entries(images)) {
    $(id).src = url;
    $(id).alt = `${id === "film-state" ? "state" : "estimate"} after step ${step} of ${steps}`;
  }
});

function chosen() {
  return models.find((model) => model.id === $("draw-model").value);
}

/** Show the controls that the chosen run has a use for. */
function adapt() {
  const prompted = chosen().abilities.includes("draw");
  $("draw-prompt-label").hidden = !prompted;
  $("edit").hidden = !prompted;
  document.querySelector(".guided").hidden = !prompted;
  const flow = ["euler", "heun"];
  const samplers = ["dpm++", "ddim", "ddpm"];
  fill(form.sampler, [...samplers, ...(chosen().flow ? flow : [])].map((name) => [name]));
}

async function draw() {
  const prompted = chosen().abilities.includes("draw");
  const body = {
    model: chosen().id,
    prompt: prompted ? $("draw-prompt").value : "",
    steps: Number(form.steps.value),
    sampler: form.sampler.value,
    seed: Number(form.seed.value),
  };
  if (prompted) {
    body.guidance = Number(form.guidance.value);
    Object.assign(body, mask.given());
    if (body.image) body.strength = Number(strength.value);
  }
  running?.abort();
  const control = new AbortController();
  running = control;
  $("draw-stop").disabled = false;
  film.clear();
  $("films").hidden = $("film-controls").hidden = false;
  let last = null;
  await attempt($("draw-status"), async () => {
    for await (const moment of events("/api/draw", body, control.signal)) {
      film.add(moment);
      last = moment;
      say($("draw-status"), `Step ${moment.step} of ${moment.steps}, seed ${body.seed}`);
    }
  });
  if (running !== control) return;
  $("draw-stop").disabled = true;
  if (!last || last.step < last.steps) return; // stopped, or failed
  keep({ url: last.state, ...body });
  if (form.fresh.checked) form.seed.value = Math.floor(Math.random() * 1e6);
}

// ---- pictures that were drawn -------------------------------------------------------------------

/** Put a drawn picture into the gallery, with what can be done with it. */
function keep(picture) {
  const title = picture.prompt || picture.model;
  const item = el(
    "li",
    {},
    el("img", { class: "pixels", src: picture.url, alt: `${title}, seed ${picture.seed}` }),
    el("span", { class: "caption" }, `${title}, seed ${picture.seed}`),
    el("div", { class: "bar small" },
      el("button", { onclick: () => reuse(picture) }, "Same seed"),
      el("button", { disabled: !editor(), onclick: () => change(picture.url) }, "Change"),
      el("button", { class: "walks", onclick: () => choose("first", picture, item) }, "From here"),
      el("button", { class: "walks", onclick: () => choose("last", picture, item) }, "To here")),
  );
  $("gallery-empty").hidden = true;
  $("gallery").prepend(item);
  while ($("gallery").children.length > MOST_KEPT) $("gallery").lastChild.remove();
}

/** Set all controls to what drew a picture. */
function reuse(picture) {
  $("draw-model").value = picture.model;
  adapt();
  $("draw-prompt").value = picture.prompt;
  form.seed.value = picture.seed;
  form.fresh.checked = false;
  form.sampler.value = picture.sampler;
  setSlider(form.steps, picture.steps);
  if (picture.guidance !== undefined) setSlider(form.guidance, picture.guidance);
  say($("draw-status"), `Seed ${picture.seed} is set again; draw.`);
}

// ---- changing a picture -------------------------------------------------------------------------

/** The run that changes pictures: the chosen one, or the first that reads a prompt. */
function editor() {
  return [chosen(), ...models].find((model) => model.abilities.includes("draw"));
}

async function change(url) {
  await attempt($("draw-status"), async () => {
    $("draw-model").value = editor().id;
    adapt();
    await mask.take(url);
    $("edit-part").hidden = false;
    setSlider(strength, CHANGED);
  });
}

function forget() {
  mask.picture = null;
  mask.clear();
  $("edit-part").hidden = true;
  $("edit-file").value = "";
}

// ---- the walk -----------------------------------------------------------------------------------

const NAMES = { first: "from", last: "to" };

function choose(end, picture, item) {
  ends[end]?.item.classList.remove(NAMES[end]);
  item.classList.add(NAMES[end]);
  ends[end] = { picture, item };
  $("walk").disabled = !(ends.first && ends.last && walkers.length);
  say($("walk-status"), `${end === "first" ? "From" : "To"} seed ${picture.seed}.`);
}

async function walk() {
  const body = {
    model: $("walk-model").value,
    first: ends.first.picture.url,
    last: ends.last.picture.url,
    pictures: WALKED,
  };
  await attempt($("walk-status"), async () => {
    const { pictures } = await post("/api/walk", body);
    const images = pictures.map((src, i) =>
      el("img", { class: "pixels", src, alt: `${i} of ${pictures.length - 1} parts of the way` }),
    );
    $("walk-strip").replaceChildren(...images);
  });
}

export function start(found, withLatents) {
  models = found;
  walkers = withLatents;
  fill($("draw-model"), found.map((model) => [model.id]));
  fill($("walk-model"), withLatents.map((model) => [model.id]));
  $("walk-part").hidden = !withLatents.length;
  if (found.length) adapt();
}

const many = { guidance: (value) => (Number(value) === 1 ? "1, none" : value) };
showValues($("draw-settings"), many);
showValues($("edit"), {
  brush: (value) => `${value} px`,
  strength: (value) => `${Math.round(100 * value)}% drawn again`,
});
showValues(document.querySelector("#pictures .film-bar"), {
  film: (value) => `${value} of ${Math.max(0, film.moments.length - 1)}`,
});
takeFiles($("edit-drop"), $("edit-file"), change);
$("mask").addEventListener("painted", () => {
  if (Number(strength.value) === CHANGED) setSlider(strength, 1);
});
$("mask-clear").addEventListener("click", () => {
  mask.clear();
  if (Number(strength.value) === 1) setSlider(strength, CHANGED);
});
$("edit-remove").addEventListener("click", forget);
$("draw-model").addEventListener("change", adapt);
$("draw-stop").addEventListener("click", () => running?.abort());
$("walk").addEventListener("click", walk);
for (const id of ["draw-form", "draw-settings", "edit"]) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
}
