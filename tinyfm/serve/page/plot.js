// Two small plots as SVG, drawn with the page's own text colours, so that they suit light and dark.
// A plotting library would be larger than this page: what is needed is lines with axes, and bars.
// Each line has its own dashes besides its colour, and its name as a tip.

const NS = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4"];
const MOST_DOTS = 12; // of a line whose points are marked
export const COLOURS = 6; // --line0 ... in page.css

function svg(tag, attributes = {}, text = "") {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== "") element.textContent = text;
  return element;
}

/** Give a line the colour and dashes of a style: 36 differ from each other. */
function stroke(line, style) {
  line.style.stroke = `var(--line${style % COLOURS})`;
  line.style.strokeDasharray = DASHES[(style + Math.floor(style / COLOURS)) % DASHES.length];
}

/** Round numbers between low and high, about `count` of them. */
export function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let t = Math.ceil(low / step); t * step <= high + step * 1e-9; t++) {
    found.push(Number((t * step).toPrecision(12)));
  }
  return found;
}

/** Powers of ten; where these are few, also 2 and 5 times them; in a narrow range, as without a logarithm. */
export function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const n of [1, 2, 5]) found.push(n * 10 ** power);
  }
  const within = found.filter((t) => t >= low && t <= high);
  if (within.length < 3) return ticks(low, high);
  return within.length > 8 ? within.filter((t) => Number.isInteger(Math.log10(t))) : within;
}

/**
 * Lines over steps: lines = [{name, points: [[x, y], ...], style: a number, faint}]. about: what a screen
 * reader says of the plot. width: in pixels, so that text has its usual size.
 */
export function linePlot(lines, { yName, log = false, about, width }) {
  const height = Math.max(240, 0.5 * width);
  const left = 62, right = 26, top = 24, bottom = 40;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about });
  const points = lines.flatMap((line) => line.points).filter(([, y]) => !log || y > 0);
  if (!points.length) {
    root.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to draw yet"));
    return root;
  }
  const scale = log ? Math.log10 : (y) => y;
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) [y0, y1] = [y0 * 0.9 - 1e-9, y1 * 1.1 + 1e-9];
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) =>
    height - bottom - ((scale(value) - scale(y0)) / (scale(y1) - scale(y0))) * (height - top - bottom);

  for (const t of ticks(x0, x1, width / 110)) {
    root.append(svg("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: height - bottom }));
    root.append(svg("text", { x: x(t), y: height - bottom + 18, "text-anchor": "middle" }, t.toLocaleString("en")));
  }
  for (const t of log ? logTicks(y0, y1) : ticks(y0, y1)) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }));
    root.append(svg("text", { x: left - 8, y: y(t) + 4, "text-anchor": "end" }, Number(t.toPrecision(3))));
  }
  root.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "step"));
  root.append(svg("text", { x: 4, y: 12 }, yName));

  for (const { name, points, style, faint } of lines) {
    const drawn = points.filter(([, value]) => !log || value > 0);
    const path = drawn.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    const colour = `var(--line${style % COLOURS})`;
    const line = svg("polyline", { class: faint ? "line faint" : "line", points: path });
    stroke(line, style);
    line.append(svg("title", {}, name));
    root.append(line);
    if (drawn.length <= MOST_DOTS) {
      for (const [a, b] of drawn) {
        const dot = svg("circle", { cx: x(a), cy: y(b), r: 3.5 });
        dot.style.fill = colour;
        dot.append(svg("title", {}, `${name}: ${Number(b.toPrecision(5))} at step ${a.toLocaleString("en")}`));
        root.append(dot);
      }
    }
  }
  return root;
}

/** The sample of a line for a list of names: the same colour and dashes. */
export function lineSample(style) {
  const root = svg("svg", { viewBox: "0 0 34 10", class: "sample", "aria-hidden": "true" });
  const line = svg("line", { class: "line", x1: 0, x2: 34, y1: 5, y2: 5 });
  stroke(line, style);
  root.append(line);
  return root;
}

/** One bar of parts side by side, against a limit: parts = [{name, value}]. */
export function stackedBar(parts, limit, { format, about, width }) {
  const height = 92;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about });
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  const most = Math.max(total, limit) * 1.02;
  let at = 0;
  parts.forEach((part, i) => {
    const wide = (part.value / most) * width;
    const box = svg("rect", { class: "part", x: at, y: 22, width: wide, height: 40 });
    box.style.fill = `var(--line${i % COLOURS})`;
    box.append(svg("title", {}, `${part.name}: ${format(part.value)}`));
    root.append(box);
    if (wide > 9 * part.name.length) {
      root.append(svg("text", { class: "inside", x: at + wide / 2, y: 46, "text-anchor": "middle" }, part.name));
    }
    at += wide;
  });
  const edge = (limit / most) * width;
  root.append(svg("line", { class: "limit", x1: edge, x2: edge, y1: 14, y2: 70 }));
  root.append(svg("text", { x: edge - 4, y: 12, "text-anchor": "end" }, `the GPU has ${format(limit)}`));
  root.append(svg("text", { x: 0, y: 84 }, `${format(total)} needed`));
  return root;
}
