// The page's frame: tabs, the key, and which run serves which tab. Each tab has a module, which is
// told of the runs once. There is no library and no build step: the browser reads these files as
// they are, and so can you.

import { $, attempt, say } from "./dom.js";
import { get, setKey } from "./api.js";
import * as text from "./text.js";
import * as chat from "./chat.js";
import * as pictures from "./pictures.js";
import * as search from "./search.js";
import * as runs from "./runs.js";
import * as costs from "./costs.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const opened = { runs: runs.open, costs: costs.open };

function show(tab, focus = false) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  const name = tab.getAttribute("aria-controls");
  history.replaceState(null, "", `#${name}`);
  opened[name]?.();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(tab);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(tabs.at(next % tabs.length), true);
  });
}

/** Show a tab's panel, or the sentence that says what is missing. */
function offer(name, some) {
  $(name).querySelector(".none").hidden = some;
  $(name).querySelector(".some").hidden = !some;
}

async function start() {
  await attempt($("page-status"), async () => {
    try {
      const models = await get("/api/models");
      const able = (...names) => models.filter((m) => names.some((n) => m.abilities.includes(n)));
      offer("text", able("complete").length > 0);
      offer("pictures", able("draw", "sample").length > 0);
      offer("search", able("search").length > 0);
      text.start(able("complete"));
      chat.start(able("chat"));
      pictures.start(able("draw", "sample"), able("draw", "rebuild"));
      search.start(able("search"));
      $("key-form").hidden = true;
      const first = { complete: "text", draw: "pictures", sample: "pictures", search: "search" };
      const name = models.flatMap((m) => m.abilities).map((a) => first[a]).find(Boolean) ?? "runs";
      const wanted = location.hash.slice(1) || name;
      show(tabs.find((tab) => tab.getAttribute("aria-controls") === wanted) ?? tabs[0]);
    } catch (error) {
      if (error.status !== 401) throw error;
      $("key-form").hidden = false;
      $("key").focus();
    }
  });
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  start();
});

window.addEventListener("unhandledrejection", (event) => {
  say($("page-status"), event.reason?.message ?? "something failed", true);
});

start();
