// The text tab: tokens of what is typed, the next token's probabilities, attention. One pane for a
// run; two panes read the same text side by side. writing.js continues the text.

import { $, attempt, barParts, copy, el, fill, later, percent, roving, showValues, visible } from "./dom.js";
import { post } from "./api.js";
import { fromBase64, order, probabilities } from "./sampling.js";
import { Writer } from "./writing.js";

const SHOWN = 10; // likeliest tokens
const HUES = 6; // background colours of tokens, in turn

/** What the sliders say. */
export function settings() {
  const form = $("sampling").elements;
  const value = (name) => Number(form[name].value);
  return {
    temperature: value("temperature"),
    topK: value("topK"),
    topP: value("topP"),
    minP: value("minP"),
    maxTokens: value("maxTokens"),
    seed: value("seed"),
  };
}

/** How a token is said: by its text, with blanks named. */
function spoken(piece) {
  return piece.text.trim() === "" ? JSON.stringify(piece.text) : piece.text;
}

class Pane {
  constructor(model) {
    this.model = model;
    this.root = copy("pane");
    this.find = (selector) => this.root.querySelector(selector);
    this.status = this.find("p[role=status]");
    this.find("h2").textContent = model.id;
    this.logits = null;
    this.weights = null;
    this.writer = new Writer(this, showWriting);
    const numbers = (n) => Array.from({ length: n }, (_, i) => [String(i)]);
    fill(this.find(".layer"), numbers(model.layers));
    fill(this.find(".head"), numbers(model.heads));
    this.find(".layer").value = model.layers - 1;
    for (const name of [".layer", ".head"]) {
      this.find(name).addEventListener("change", () => this.readAttention());
    }
    const tokens = this.find(".tokens");
    roving(tokens, ".token");
    for (const name of ["pointerover", "focusin"]) {
      tokens.addEventListener(name, (event) => this.look(event.target.closest(".token")));
    }
    tokens.addEventListener("pointerleave", () => this.look(null));
  }

  /** Show what the model makes of the text. */
  async read(text) {
    const body = { model: this.model.id, text };
    this.text = text;
    await attempt(this.status, async () => {
      const { tokens } = await post("/api/tokens", body);
      if (this.text !== text) return; // typed on meanwhile
      this.showTokens(tokens);
      const { logits, likeliest } = await post("/api/next", body);
      if (this.text !== text) return;
      this.logits = fromBase64(logits);
      this.likeliest = likeliest.slice(0, SHOWN);
      this.showNext();
      await this.readAttention();
    });
  }

  showTokens(pieces) {
    const count = pieces.length;
    const over = count > this.model.context ? `; it sees the latest ${this.model.context} or fewer` : "";
    this.find(".count").textContent = `${count} ${count === 1 ? "token" : "tokens"}${over}`;
    const elements = pieces.map((piece, i) =>
      el(
        "span",
        {
          class: `token hue${i % HUES}${piece.shown ? "" : " bytes"}`,
          role: "listitem",
          tabindex: i ? -1 : 0,
          "aria-label": `${spoken(piece)}, token ${piece.id}`,
        },
        el("span", { class: "piece" }, visible(piece.text)),
        el("span", { class: "id" }, piece.id),
      ),
    );
    this.find(".tokens").replaceChildren(...elements);
  }

  /** The bars of the likeliest tokens under the sliders' settings. No request is made. */
  showNext() {
    this.find(".next").hidden = !$("show-next").checked;
    if (!this.logits) return;
    const p = probabilities(this.logits, settings());
    const rows = this.likeliest.map((piece) => this.bar(piece, p[piece.id]));
    this.find(".next ol").replaceChildren(...rows);
  }

  /** A bar that adds its token to the text. */
  bar(piece, share) {
    const out = share === 0;
    const button = el(
      "button",
      {
        class: out ? "out" : "",
        title: `token ${piece.id}: add it to the text`,
        disabled: !piece.shown,
        onclick: () => append(piece.text),
      },
      ...barParts(visible(piece.text), share, out ? "left out" : percent(share)),
    );
    return el("li", {}, button);
  }

  async readAttention() {
    const shown = $("show-attention").checked;
    this.find(".attention").hidden = !shown;
    this.weights = null;
    this.look(null);
    if (!shown || this.text === undefined) return;
    const number = (name) => Number(this.find(name).value);
    const body = { model: this.model.id, text: this.text };
    await attempt(this.status, async () => {
      const found = await post("/api/attention", {
        ...body,
        layer: number(".layer"),
        head: number(".head"),
      });
      if (body.text !== this.text) return;
      this.weights = found.weights;
      this.look(this.find(".token:focus"));
    });
  }

  /** Show how much the token `from` attends to each token before it: by the height of a bar. */
  look(from) {
    const tokens = [...this.find(".tokens").children];
    const skipped = this.weights ? tokens.length - this.weights.length : 0;
    const row = from && this.weights?.[tokens.indexOf(from) - skipped];
    const most = row ? Math.max(...row) : 1;
    if (row) this.find(".attention .hint").textContent = this.inWords(row, skipped);
    tokens.forEach((token, i) => {
      const weight = row?.[i - skipped] ?? 0;
      token.classList.toggle("attended", Boolean(row));
      token.classList.toggle("from", Boolean(row) && token === from);
      token.style.setProperty("--weight", weight / most);
      token.title = row ? percent(weight) : "";
    });
  }

  /** The three tokens that get most attention: "It attends to with 55%, The 21%, ..." */
  inWords(row, skipped) {
    const pieces = this.root.querySelectorAll(".tokens .piece");
    const most = order(row).slice(0, 3);
    const parts = most.map((i) => `${pieces[i + skipped].textContent} ${percent(row[i])}`);
    return `It attends most to ${parts.join(", ")}.`;
  }
}

let panes = [];
let models = [];

function append(text) {
  $("prompt").value += text;
  read();
}

function read() {
  return Promise.all(panes.map((pane) => pane.read($("prompt").value)));
}

/** One pane for each of the one or two runs that are chosen. */
function arrange() {
  stop();
  const names = [$("text-model").value, $("text-other").value].filter(Boolean);
  panes = names.map((name) => new Pane(models.find((model) => model.id === name)));
  $("panes").replaceChildren(...panes.map((pane) => pane.root));
  $("panes").classList.toggle("two", panes.length > 1);
  showWriting();
  read();
}

function stop() {
  for (const pane of panes) pane.writer.stop();
}

function write() {
  for (const pane of panes) pane.writer.write($("prompt").value, settings());
}

/** One button starts and one stops, whichever can. */
function showWriting() {
  const writing = panes.some((pane) => pane.writer.running);
  $("write").disabled = writing;
  $("write-stop").disabled = !writing;
}

export function start(found) {
  models = found;
  fill($("text-model"), found.map((model) => [model.id]));
  fill($("text-other"), [["", "no other"], ...found.map((model) => [model.id])]);
  if (found.length) arrange();
}

const off = (least) => (value) => (Number(value) === least ? "off" : value);
showValues($("sampling"), {
  temperature: (value) => (Number(value) ? value : "0, the likeliest"),
  topK: off(0),
  topP: off(1),
  minP: off(0),
});
$("sampling").addEventListener("input", () => panes.forEach((pane) => pane.showNext()));
$("sampling").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("input", later(read));
$("text-model").addEventListener("change", arrange);
$("text-other").addEventListener("change", arrange);
$("show-next").addEventListener("change", () => panes.forEach((pane) => pane.showNext()));
$("show-attention").addEventListener("change", () => panes.forEach((pane) => pane.readAttention()));
$("write").addEventListener("click", write);
$("write-stop").addEventListener("click", stop);
