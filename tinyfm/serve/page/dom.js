// Building blocks of the page. Text from a model, a file or the user only ever goes into a text
// node, so none of it can become HTML.

/** The element with this id. */
export function $(id) {
  return document.getElementById(id);
}

/** A new element. Attributes of the value null are left out; "on..." are listeners. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A copy of a <template>. */
export function copy(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

/**
 * Say something in an element with role="status". A mistake is marked by a word, not by colour alone.
 * A screen reader reads each change aloud, so the same text is not set again.
 */
export function say(element, text, wrong = false) {
  const said = wrong ? `Error: ${text}` : text;
  if (element.textContent !== said) element.textContent = said;
  element.classList.toggle("wrong", wrong);
}

/** Call `work`; if it fails, say why in `element`. What was stopped by the user is no failure. */
export async function attempt(element, work) {
  if (element.classList.contains("wrong")) say(element, "");
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") say(element, error.message, true);
  }
}

/** The parts of a bar, for a row or a button: its name, its length (a share of 1), and what stands behind it. */
export function barParts(name, share, text) {
  const length = el("span", { class: "fill" });
  length.style.width = `${100 * share}%`;
  return [
    el("span", { class: "name" }, name),
    el("span", { class: "track" }, length),
    el("span", { class: "share" }, text),
  ];
}

/** A function that calls `work` once, when it was not called for `wait` milliseconds. */
export function later(work, wait = 250) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

/** Fill a <select>; keep what was chosen if it still exists. */
export function fill(select, options) {
  const before = select.value;
  select.replaceChildren(
    ...options.map(([value, text]) => el("option", { value }, text ?? value)),
  );
  if (options.some(([value]) => value === before)) select.value = before;
}

/** Show the value of each slider in the <output> beside it, by `format` where one is given. */
export function showValues(root, formats = {}) {
  for (const slider of root.querySelectorAll("input[type=range]")) {
    const output = slider.parentElement.querySelector("output");
    if (!output) continue;
    const show = () => {
      const format = formats[slider.name] ?? ((value) => value);
      output.textContent = format(slider.value);
      slider.setAttribute("aria-valuetext", output.textContent);
    };
    slider.addEventListener("input", show);
    slider.addEventListener("show", show);
    show();
  }
}

/** Set a slider, and have its value shown. */
export function setSlider(slider, value) {
  slider.value = value;
  slider.dispatchEvent(new Event("show"));
}

/** One stop of the tab key for a whole row of elements: arrow keys move within it. */
export function roving(container, selector) {
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const items = [...container.querySelectorAll(selector)];
    const at = items.indexOf(document.activeElement);
    if (at < 0) return;
    let next = at + (step ?? 0);
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = items.length - 1;
    if (next === at || !items[next]) return;
    event.preventDefault();
    items[next].focus();
  });
  container.addEventListener("focusin", (event) => {
    for (const item of container.querySelectorAll(selector)) {
      item.tabIndex = item === event.target ? 0 : -1;
    }
  });
}

/** Text in which blanks can be seen: those that a token starts or ends with, and line ends. */
export function visible(text) {
  return text
    .replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length))
    .replace(/\n/g, "↵")
    .replace(/\t/g, "→");
}

/** 0.1234 -> "12.3%" */
export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(100 * share).toFixed(1)}%`;
}

/** 1234567 -> "1.235 M" */
export function short(n, unit = "") {
  for (const [scale, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (n >= scale) return `${Number((n / scale).toPrecision(4))} ${letter}${unit}`;
  }
  return `${Number(n.toPrecision(4))} ${unit}`.trimEnd();
}

/** Seconds in words, in the largest unit that gives more than 2 of it: "20 min". */
export function duration(seconds) {
  const units = [[31_557_600, "years"], [86_400, "days"], [3600, "h"], [60, "min"]];
  for (const [scale, name] of units) {
    if (seconds > 2 * scale) return `${Number((seconds / scale).toPrecision(3))} ${name}`;
  }
  return `${Number(seconds.toPrecision(3))} s`;
}
