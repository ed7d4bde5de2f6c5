// The allocation: a grid of cells for each stack of layers, coloured by one measure at a time.
const cells = [];
const MANY = 40; // layers: from here on only every fifth is numbered where they stand side by side

function drawHeatmaps() {
  for (const stack of facts.stacks) document.getElementById("heatmaps").append(grid(stack));
  const first = cells[0];
  if (first) first.node.tabIndex = 0;
  const buttons = facts.measures.map((measure) => element("button", { type: "button", role: "radio", title: measure.unit }, measure.title));
  const choices = document.getElementById("measures");
  choices.append(...buttons);
  const choose = (index) => {
    buttons.forEach((button, other) => {
      button.setAttribute("aria-checked", String(other === index));
      button.tabIndex = other === index ? 0 : -1;
    });
    paint(facts.measures[index]);
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => choose(index)));
  choices.addEventListener("keydown", (event) => {
    const next = roving(buttons, event);
    if (next) {
      next.focus();
      choose(buttons.indexOf(next));
    }
  });
  if (buttons.length) choose(0);
}

/** Rows are kinds and columns are layers, or the other way round where the page is narrow: the style sheet decides. */
function grid(stack) {
  const many = stack.layers.length > MANY;
  const node = element("div", { class: many ? "grid many" : "grid", role: "group", "aria-label": stack.name || "outside the layers", "--layers": stack.layers.length, "--kinds": stack.kinds.length });
  node.append(element("div", { class: "corner", "--kind-at": -1, "--layer-at": -1 }, stack.name || "other"));
  stack.layers.forEach((layer, at) => node.append(element("div", { class: many && at % 5 ? "layer minor" : "layer", "--kind-at": -1, "--layer-at": at }, layer)));
  stack.kinds.forEach((kind, at) => node.append(element("div", { class: "name", "--kind-at": at, "--layer-at": -1 }, facts.kinds[kind])));
  const inside = stack.cells.map((cell) => {
    const made = element("div", { class: cell.kept ? "cell kept" : "cell", role: "img", tabindex: -1, "data-rows": cell.rows.join(" "), "--kind-at": cell.kind, "--layer-at": cell.layer }, element("span"));
    made.dataset.texts = JSON.stringify(facts.measures.map((measure) => [measure.title, `${cell.texts[measure.key]} ${measure.unit}`]));
    const entry = { ...cell, node: made };
    cells.push(entry);
    return entry;
  });
  node.append(...inside.map((cell) => cell.node), ...outlines(stack));
  if (stack.layers.length > 1) {
    node.append(element("div", { class: "total corner", "--kind-at": -1, "--layer-at": stack.layers.length }, "all"));
    stack.totals.forEach((total, at) => {
      const made = element("div", { class: "total", "--kind-at": at, "--layer-at": stack.layers.length });
      cells.push({ total, node: made });
      node.append(made);
    });
  }
  node.addEventListener("keydown", move);
  return node;
}

/** A frame round neighbouring cells of one layer whose linears run as one kernel. */
function outlines(stack) {
  const at = new Map(stack.cells.map((cell) => [`${cell.layer} ${cell.kind}`, cell]));
  const together = (one, other) => one && other && one.rows.some((row) => other.rows.some((each) => facts.rows[row].group.includes(each)));
  const found = [];
  stack.layers.forEach((_, layer) => {
    let start = 0;
    stack.kinds.forEach((_, kind) => {
      if (together(at.get(`${layer} ${kind}`), at.get(`${layer} ${kind + 1}`))) return;
      if (kind > start) found.push(element("div", { class: "outline", "--kind-at": start, "--kind-span": kind - start + 1, "--layer-at": layer }));
      start = kind + 1;
    });
  });
  return found;
}

function paint(measure) {
  const colourable = cells.filter((cell) => !cell.total && !cell.kept && cell.values[measure.key] !== null && (!measure.log || cell.values[measure.key] > 0));
  const values = colourable.map((cell) => cell.values[measure.key]);
  const scale = scaled(values, measure.log);
  const known = new Set(colourable);
  for (const cell of cells) {
    if (cell.total) {
      cell.node.textContent = cell.total.texts[measure.key];
      continue;
    }
    cell.node.classList.toggle("unknown", !known.has(cell) && !cell.kept);
    cell.node.style.setProperty("--t", known.has(cell) ? scale(cell.values[measure.key]).toFixed(4) : 0);
    cell.node.firstChild.textContent = cell.texts[measure.key];
    const name = cell.rows.length > 1 ? `${facts.rows[cell.rows[0]].name} and ${cell.rows.length - 1} more` : facts.rows[cell.rows[0]].name;
    cell.node.setAttribute("aria-label", `${name}: ${cell.texts[measure.key]} ${measure.unit}`);
    if (measure.key === "bits") colourBoxes(cell);
  }
  legend(measure, colourable);
}

/** The boxes of the block have the colours of the bits of their cells. */
function colourBoxes(cell) {
  for (const row of cell.rows) {
    for (const box of document.querySelectorAll(`.box.coloured[data-row="${row}"]`)) box.style.setProperty("--t", cell.node.style.getPropertyValue("--t"));
  }
}

function legend(measure, colourable) {
  const sorted = [...colourable].sort((one, other) => one.values[measure.key] - other.values[measure.key]);
  const text = (cell) => cell?.texts[measure.key] ?? "–";
  const ramp = Array.from({ length: 24 }, (_, step) => element("span", { class: "cell", "--t": step / 23 }));
  const log = measure.log ? ", logarithmic" : "";
  document.getElementById("legend").replaceChildren(
    text(sorted[0]), element("span", { class: "ramp" }, ...ramp), text(sorted.at(-1)), element("span", {}, `${measure.unit}${log}`));
}

/** Arrow keys go to the nearest cell in their direction, whichever way the grid lies. */
function move(event) {
  const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  const way = ways[event.key];
  const here = document.activeElement;
  if (!way || !here.classList.contains("cell")) return;
  event.preventDefault();
  const middle = (node) => {
    const box = node.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(here);
  let best = null;
  let least = Infinity;
  for (const cell of cells) {
    if (cell.total || cell.node === here) continue;
    const [dx, dy] = middle(cell.node).map((value, axis) => value - [x, y][axis]);
    const along = dx * way[0] + dy * way[1];
    const across = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
    if (along > 2 && across < along && along + 2 * across < least) [best, least] = [cell.node, along + 2 * across];
  }
  if (best) {
    here.tabIndex = -1;
    best.tabIndex = 0;
    best.focus();
  }
}
