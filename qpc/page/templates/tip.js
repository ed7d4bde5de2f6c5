// Details of whatever the pointer or the focus is on: elements with data-row (one linear), data-rows (several) or data-tip.
const tip = document.getElementById("tip");
const wanted = "[data-tip], .cell[data-rows], .point[data-row], .box[data-row]";

function shown(target) {
  if (target.dataset.tip) return JSON.parse(target.dataset.tip);
  const rows = rowsOf(target);
  if (rows.length === 1) return [facts.rows[rows[0]].name, facts.rows[rows[0]].details];
  const first = facts.rows[rows[0]];
  const details = JSON.parse(target.dataset.texts || "[]");
  return [`${first.name} and ${rows.length - 1} more`, details];
}

function rowsOf(target) {
  const rows = target.dataset.rows ?? target.dataset.row;
  return rows === undefined ? [] : rows.split(" ").map(Number);
}

function show(target) {
  const [title, details] = shown(target);
  const list = element("dl", {}, ...details.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
  tip.replaceChildren(element("b", {}, title), list);
  tip.hidden = false;
  place(target);
  light(rowsOf(target).flatMap((row) => (facts.rows[row].group.length ? facts.rows[row].group : [row])));
}

/** Above the target where there is room, else below. */
function place(target) {
  const box = target.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(box.left + box.width / 2 - own.width / 2, 8), innerWidth - own.width - 8);
  const above = box.top - own.height - 10;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 8 ? above : Math.min(box.bottom + 10, innerHeight - own.height - 8)}px`;
}

/** Show nothing. A line of the table that the pointer is on lights up what stands for its linear. */
function hide(line) {
  tip.hidden = true;
  light(line?.dataset?.row ? [line.dataset.row] : []);
}

/** The pointer is on nothing that has details, perhaps because the page has moved below it: then those of the focus are shown. */
function leave(line) {
  if (!line && !tip.hidden && document.activeElement?.matches(wanted)) show(document.activeElement);
  else hide(line);
}

/** What the focus is on keeps its details: the focus itself may have scrolled it into view. */
function scrolled() {
  if (tip.hidden) return;
  if (document.activeElement?.matches(wanted)) place(document.activeElement);
  else hide();
}

function watchTips() {
  for (const type of ["pointerover", "focusin"]) {
    document.addEventListener(type, (event) => {
      const target = event.target.closest?.(wanted);
      if (target) show(target);
      else if (type === "pointerover") leave(event.target.closest?.("tr[data-row]"));
    });
  }
  document.addEventListener("focusout", () => hide());
  document.addEventListener("scroll", scrolled, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}
