// Continues a text token by token, from the public API: POST /v1/completions, streamed, with the
// log-probability of each token and of its alternatives. A token can be exchanged for one of them;
// the text then branches there and is written on.

import { attempt, barParts, el, percent, roving, visible } from "./dom.js";
import { events } from "./api.js";

const ALTERNATIVES = 10; // asked for with each token

/** The class that tints a token by its probability; page.css also underlines it, for all eyes. */
function tint(p) {
  if (p > 0.5) return "p4";
  if (p > 0.2) return "p3";
  return p > 0.05 ? "p2" : "p1";
}

/** Whether a token is only a part of a character: the API then names its bytes. */
function isPart(name) {
  return name.startsWith("bytes:\\x");
}

export class Writer {
  /** changed() is called when the writing starts and when it ends. */
  constructor(pane, changed) {
    this.pane = pane;
    this.changed = changed;
    this.tokens = []; // {name, text, logprob, top: {name: logprob}, chosen}
    this.running = null;
    roving(pane.find(".written .text"), "button");
  }

  stop() {
    this.running?.abort();
  }

  /** Continue a prompt, after tokens that are kept. */
  async write(prompt, settings, kept = []) {
    this.stop();
    const control = new AbortController();
    this.running = control;
    this.changed();
    this.prompt = prompt;
    this.settings = settings;
    this.tokens = kept;
    this.show();
    const body = {
      model: this.pane.model.id,
      prompt: prompt + kept.map((token) => token.text).join(""),
      max_tokens: settings.maxTokens,
      temperature: settings.temperature,
      top_k: settings.topK,
      top_p: settings.topP,
      min_p: settings.minP,
      seed: settings.seed,
      logprobs: ALTERNATIVES,
      stream: true,
    };
    const started = performance.now();
    let count = 0;
    await attempt(this.pane.status, async () => {
      for await (const event of events("/v1/completions", body, control.signal)) {
        const found = event.choices[0]?.logprobs;
        if (!found) continue;
        found.tokens.forEach((name, i) => {
          const text = i ? "" : event.choices[0].text; // what became certain with the token
          this.add({ name, text, logprob: found.token_logprobs[i], top: found.top_logprobs[i] });
        });
        count += found.tokens.length;
        const seconds = (performance.now() - started) / 1000;
        this.pane.find(".speed").textContent = `${count} tokens, ${(count / seconds).toFixed(0)} a second`;
      }
    });
    if (this.running === control) this.running = null;
    this.changed();
  }

  show() {
    this.pane.find(".written").hidden = false;
    this.pane.find(".branch").hidden = true;
    this.pane.find(".speed").textContent = "";
    const start = el("span", { class: "given" }, this.prompt);
    this.pane.find(".written .text").replaceChildren(start, ...this.tokens.flatMap((token, i) => this.parts(token, i)));
  }

  add(token) {
    this.tokens.push(token);
    const text = this.pane.find(".written .text");
    text.append(...this.parts(token, this.tokens.length - 1));
    text.scrollTop = text.scrollHeight;
  }

  /** A token as a button, and the line ends that are in it. */
  parts(token, i) {
    const p = Math.exp(token.logprob);
    const text = isPart(token.name) ? token.text || "‹›" : token.name;
    const label = text.trim() === "" ? JSON.stringify(text) : text;
    const button = el(
      "button",
      {
        class: `${tint(p)}${token.chosen ? " chosen" : ""}`,
        tabindex: i ? -1 : 0,
        title: percent(p),
        "aria-label": `${label}, ${percent(p)}${token.chosen ? ", chosen by you" : ""}`,
        onclick: () => this.open(i),
      },
      text.replace(/\n/g, "↵"),
    );
    const ends = text.split("\n").slice(1).map(() => el("br"));
    return [button, ...ends];
  }

  /** Show what could have stood in the place of token i. */
  open(i) {
    const token = this.tokens[i];
    const branch = this.pane.find(".branch");
    this.pane.root.querySelectorAll(".written .text button").forEach((button, j) => {
      button.classList.toggle("open", i === j);
    });
    const top = Object.entries(token.top ?? {}).sort((a, b) => b[1] - a[1]);
    branch.hidden = false;
    branch.querySelector("h3").textContent = `In place of “${visible(token.name)}”`;
    const rows = top.map(([name, logprob]) => {
      const p = Math.exp(logprob);
      const same = name === token.name;
      const button = el(
        "button",
        {
          "aria-current": same ? "true" : null,
          disabled: isPart(name),
          onclick: () => this.branch(i, name, logprob),
        },
        ...barParts(visible(name), p, same ? `${percent(p)}, here` : percent(p)),
      );
      return el("li", {}, button);
    });
    branch.querySelector("ol").replaceChildren(...rows);
    branch.querySelector("button")?.focus();
  }

  /** Write on from another token in place i. */
  branch(i, name, logprob) {
    const chosen = { name, text: name, logprob, top: this.tokens[i].top, chosen: true };
    this.write(this.prompt, this.settings, [...this.tokens.slice(0, i), chosen]);
  }
}
