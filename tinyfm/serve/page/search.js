// The search tab, by the public API: POST /v1/search finds pictures for words or for a picture, POST
// /v1/classify chooses among names.

import { $, attempt, barParts, el, fill, percent, say } from "./dom.js";
import { post } from "./api.js";
import { takeFiles } from "./mask.js";

let picture = ""; // to name, as a data URL

async function find(query, about) {
  const body = { model: $("search-model").value, n: Number($("search-n").value), ...query };
  await attempt($("search-status"), async () => {
    say($("search-status"), "Searching; the first time, all pictures are read.");
    const { data } = await post("/v1/search", body);
    $("found").replaceChildren(...data.map(result));
    say($("search-status"), `${data.length} pictures for ${about}, the most similar first.`);
  });
}

function result(found) {
  const url = found.image;
  const about = `pictures like “${found.caption}”`;
  return el(
    "li",
    {},
    el(
      "button",
      { class: "picture", title: "search by this picture", onclick: () => find({ image: url }, about) },
      el("img", { class: "pixels", src: url, alt: found.caption }),
    ),
    el("span", { class: "caption" }, `${found.score.toFixed(3)} ${found.caption}`),
    el("div", { class: "bar small" }, el("button", { onclick: () => take(url) }, "Name it")),
  );
}

function take(url) {
  picture = url;
  $("name-picture").src = url;
  $("name-picture").hidden = false;
  $("name-picture").scrollIntoView({ block: "nearest" });
}

async function name() {
  const labels = [...new Set($("labels").value.split("\n").map((line) => line.trim()))].filter(Boolean);
  await attempt($("name-status"), async () => {
    if (!picture) throw new Error("choose a picture first");
    const body = { model: $("search-model").value, image: picture, labels };
    const { answers } = await post("/v1/classify", body);
    const rows = answers[0].classes.map(({ label, probability }) =>
      el("li", {}, ...barParts(label, probability, percent(probability))),
    );
    $("named").replaceChildren(...rows);
  });
}

export function start(models) {
  fill($("search-model"), models.map((model) => [model.id]));
}

takeFiles($("name-drop"), $("name-file"), take);
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  find({ query: $("search-words").value }, `“${$("search-words").value}”`);
});
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  name();
});
