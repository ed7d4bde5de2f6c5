// Plots of one point for each linear: rate and distortion, and sensitivity and bits. They are drawn again when their place changes width.
const HEIGHT = 360;
const LEFT = 66;
const RIGHT = 12;
const TOP = 12;
const BOTTOM = 42;
let onlyKind = null;

/** One axis: from values to pixels, with ticks. */
function axis(values, from, to, logarithmic, room = 0.06) {
  const of = logarithmic ? Math.log10 : (value) => value;
  let [low, high] = [of(Math.min(...values)), of(Math.max(...values))];
  const margin = (high - low || 1) * room;
  [low, high] = [low - margin, high + margin];
  const ticks = logarithmic ? decades(low, high) : steps(low, high, Math.abs(to - from) / 34);
  return { low, high, from, to, ticks, at: (value) => from + ((of(value) - low) / (high - low)) * (to - from) };
}

function decades(low, high) {
  const factors = high - low > 2.5 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
    }
  }
  return found;
}

function steps(low, high, most) {
  const rough = (high - low) / Math.max(most, 1);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each >= rough);
  const found = [];
  for (let index = Math.ceil(low / step); index * step <= high; index++) found.push(index * step);
  return found;
}

/** 0.25, 30, 10⁻⁷, 3·10⁻⁷. */
function digits(value) {
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4)) return String(Number(value.toPrecision(3)));
  const [factor, power] = value.toExponential(0).split("e");
  const raised = [...power.replace("+", "")].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(sign)])).join("");
  return factor === "1" ? `10${raised}` : `${factor}·10${raised}`;
}

/** Lines and numbers of both axes, and their titles; that of x only if it has one. */
function scales(svg, x, y, titleX, titleY) {
  for (const tick of x.ticks) {
    svg.append(shape("line", { class: "tick", x1: x.at(tick), x2: x.at(tick), y1: y.to, y2: y.from }));
    if (titleX) svg.append(shape("text", { x: x.at(tick), y: y.from + 16, "text-anchor": "middle" }, digits(tick)));
  }
  for (const tick of y.ticks) {
    svg.append(shape("line", { class: "tick", x1: x.from, x2: x.to, y1: y.at(tick), y2: y.at(tick) }));
    svg.append(shape("text", { x: x.from - 8, y: y.at(tick) + 4, "text-anchor": "end" }, digits(tick)));
  }
  if (titleX) svg.append(shape("text", { x: (x.from + x.to) / 2, y: y.from + 36, "text-anchor": "middle" }, titleX));
  svg.append(shape("text", { transform: `translate(12 ${(y.from + y.to) / 2}) rotate(-90)`, "text-anchor": "middle" }, titleY));
}

function point(row, x, y, ring = false) {
  const kind = facts.rows[row].kind;
  const dim = onlyKind === null || onlyKind === kind ? "" : " dim";
  return shape("circle", { class: `point${ring ? " ring" : ""}${dim}`, "data-row": row, "data-kind": kind, "--kind": kind, cx: x.toFixed(1), cy: y.toFixed(1), r: ring ? 3.6 : 4.4 });
}

/** A line through values, only as far as the axes show it, with its name at a share of its length. */
function curve(x, y, of, { name, share, dx, dy, side }) {
  const inverse = (pixel) => x.low + ((pixel - x.from) / (x.to - x.from)) * (x.high - x.low);
  const places = [];
  for (let pixel = x.from; pixel <= x.to; pixel += 2) {
    const height = y.at(of(inverse(pixel)));
    if (height <= y.from + 0.5 && height >= y.to - 0.5) places.push([pixel, height]);
  }
  if (places.length < 2) return [];
  const path = shape("path", { class: "bound", d: `M${places.map(([left, top]) => `${left.toFixed(1)},${top.toFixed(1)}`).join("L")}` });
  if (!name) return [path];
  const [left, top] = places[Math.round(share * (places.length - 1))];
  return [path, shape("text", { class: "bound-name", x: left + dx, y: top + dy, "text-anchor": side }, name)];
}

/** Above, the distortion of each linear along the bound of a Gaussian; below, how many decibels lie between. */
function drawRate(width) {
  const points = facts.rate;
  if (!points.length) return [element("p", { class: "lead" }, "Nothing was quantized.")];
  const bound = (bits) => 2 ** (-2 * bits);
  const decibels = (error, bits) => 10 * Math.log10(error / bound(bits));
  const felt = points.filter((each) => each.felt > 0);
  const middle = TOP + (HEIGHT - BOTTOM - TOP) * 0.5;
  const x = axis(points.map((each) => each.bits), LEFT, width - RIGHT, false);
  const y = axis(points.flatMap((each) => [each.distortion, bound(each.bits), ...(each.felt > 0 ? [each.felt] : [])]), middle - 10, TOP, true);
  const gaps = [0, ...points.map((each) => decibels(each.distortion, each.bits)), ...felt.map((each) => decibels(each.felt, each.bits))];
  const gap = axis(gaps, HEIGHT - BOTTOM, middle + 10, false, 0.1);
  const svg = shape("svg", { width, height: HEIGHT, role: "group", "aria-label": "distortion against bits, and decibels above the bound" });
  scales(svg, x, y, "", "squared error");
  scales(svg, x, gap, "stored bits per weight", "dB above");
  const [line, name] = curve(x, y, bound, { name: "Gaussian bound", share: 0.5, dx: 10, dy: -8, side: "start" });
  if (line) svg.append(line);
  svg.append(...curve(x, gap, () => 0, {}));
  for (const each of felt) {
    svg.append(point(each.row, x.at(each.bits), y.at(each.felt), true), point(each.row, x.at(each.bits), gap.at(decibels(each.felt, each.bits)), true));
  }
  for (const each of points) {
    svg.append(point(each.row, x.at(each.bits), y.at(each.distortion)), point(each.row, x.at(each.bits), gap.at(decibels(each.distortion, each.bits))));
  }
  if (name) svg.append(name);
  if (felt.length) {
    svg.append(shape("circle", { class: "point ring", "--colour": "var(--quiet)", cx: width - 168, cy: TOP + 10, r: 3.6, "pointer-events": "none" }));
    svg.append(shape("text", { x: width - 158, y: TOP + 14 }, "felt, after error feedback"));
  }
  return [svg];
}

function drawLaw(width) {
  if (!facts.law) return [element("p", { class: "lead" }, "No sensitivities are known.")];
  const { points, level } = facts.law;
  const x = axis(points.map((each) => each.felt), LEFT, width - RIGHT, true);
  const y = axis(points.map((each) => each.bits), HEIGHT - BOTTOM, TOP, false);
  const svg = shape("svg", { width, height: HEIGHT, role: "group", "aria-label": "bits against sensitivity" });
  scales(svg, x, y, facts.law.title, "stored bits per weight");
  const ideal = (power) => Math.max(0, Math.log2(10 ** power / level) / 2);
  const [line, name] = level > 0 ? curve(x, y, ideal, { name: "ideal quantizers", share: 0.9, dx: -12, dy: 4, side: "end" }) : [];
  if (line) svg.append(line);
  svg.append(...points.map((each) => point(each.row, x.at(each.felt), y.at(each.bits))));
  if (name) svg.append(name);
  return [svg];
}

/** Draw into the element of this name, as wide as it is. */
function fitted(id, draw) {
  const place = document.getElementById(id);
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(place.clientWidth);
    if (width === last || !width) return;
    last = width;
    place.replaceChildren(...draw(width));
  }).observe(place);
}

/** The names of the colours; pressing one leaves its points alone in both plots. */
function drawKinds() {
  const used = [...new Set([...facts.rate, ...(facts.law?.points ?? [])].map((each) => facts.rows[each.row].kind))].sort((one, other) => one - other);
  const buttons = used.map((kind) => element("button", { type: "button", "aria-pressed": "false", "data-only": kind }, element("i", { class: "dot", "--kind": kind }), facts.kinds[kind]));
  const list = document.getElementById("kinds");
  list.append(...buttons);
  list.hidden = !buttons.length;
  list.addEventListener("click", (event) => {
    const pressed = event.target.closest("button");
    if (!pressed) return;
    onlyKind = pressed.getAttribute("aria-pressed") === "true" ? null : Number(pressed.dataset.only);
    for (const button of buttons) button.setAttribute("aria-pressed", String(Number(button.dataset.only) === onlyKind));
    for (const each of document.querySelectorAll(".point[data-kind]")) each.classList.toggle("dim", onlyKind !== null && Number(each.dataset.kind) !== onlyKind);
  });
}
