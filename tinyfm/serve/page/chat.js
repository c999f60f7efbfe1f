// The chat, by the public API: POST /v1/chat/completions, streamed.

import { $, attempt, el } from "./dom.js";
import { events } from "./api.js";
import { settings } from "./text.js";

let models = [];
let messages = []; // {role, content}
let running = null;

function chosen() {
  return models.find((model) => model.id === $("text-model").value) ?? models[0];
}

function mode(chat) {
  $("mode-chat").setAttribute("aria-pressed", chat);
  $("mode-write").setAttribute("aria-pressed", !chat);
  $("chat-mode").hidden = !chat;
  $("write-mode").hidden = chat;
  if (!chat) return;
  const ready = models.length > 0;
  $("chat-log").hidden = $("chat-form").hidden = !ready;
  $("chat-status").textContent = ready
    ? `You talk with ${chosen().id}.`
    : "No run that learned to chat is served: fine-tune one, python train.py gpt --task chat " +
      "--init-from runs/gpt --out runs/chat, and name it too.";
}

function bubble(role, content) {
  const element = el("p", { class: `message ${role}` }, el("strong", {}, role), el("span", {}, content));
  $("chat-log").append(element);
  return element.lastChild;
}

async function ask(question) {
  const asked = messages; // a conversation started meanwhile is another list
  asked.push({ role: "user", content: question });
  bubble("user", question);
  const answer = bubble("assistant", "");
  const s = settings();
  const body = {
    model: chosen().id,
    messages: asked,
    max_tokens: s.maxTokens,
    temperature: s.temperature,
    top_k: s.topK,
    top_p: s.topP,
    min_p: s.minP,
    seed: s.seed + asked.length,
    stream: true,
  };
  running = new AbortController();
  $("chat-stop").disabled = false;
  await attempt($("chat-status"), async () => {
    for await (const event of events("/v1/chat/completions", body, running.signal)) {
      answer.textContent += event.choices[0]?.delta?.content ?? "";
      $("chat-log").scrollTop = $("chat-log").scrollHeight;
    }
  });
  $("chat-stop").disabled = true;
  if (answer.textContent) asked.push({ role: "assistant", content: answer.textContent });
  else asked.pop(); // the question was not answered: do not send it again
}

export function start(found) {
  models = found;
}

$("mode-write").addEventListener("click", () => mode(false));
$("mode-chat").addEventListener("click", () => mode(true));
$("text-model").addEventListener("change", () => mode(!$("chat-mode").hidden));
$("chat-stop").addEventListener("click", () => running?.abort());
$("chat-clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("chat-log").replaceChildren();
});
$("chat-input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  $("chat-form").requestSubmit();
});
$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("chat-input").value.trim();
  if (!question || !$("chat-stop").disabled) return;
  $("chat-input").value = "";
  ask(question);
});
