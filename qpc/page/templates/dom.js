// What the other scripts share: the facts of the checkpoint, and how elements are made. Text is only ever set as text.
const facts = JSON.parse(document.getElementById("facts").textContent);

/** An element of HTML with attributes, CSS variables (names that begin with --) and children; strings become text. */
function element(name, attributes = {}, ...children) {
  return furnished(document.createElement(name), attributes, children);
}

/** The same for SVG. */
function shape(name, attributes = {}, ...children) {
  return furnished(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function furnished(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Light up everything that stands for some rows, and nothing else. */
function light(rows) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  for (const row of rows) {
    for (const each of document.querySelectorAll(`[data-row="${row}"], [data-rows~="${row}"]`)) each.classList.add("lit");
  }
}

/** A function from values to [0, 1]; the middle where all are the same. */
function scaled(values, logarithmic) {
  const of = logarithmic ? Math.log : (value) => value;
  const low = of(Math.min(...values));
  const high = of(Math.max(...values));
  return (value) => (high > low ? (of(value) - low) / (high - low) : 0.5);
}

/** Step through a row of buttons of which one can be reached by Tab. */
function roving(buttons, event) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const at = buttons.indexOf(document.activeElement);
  if (!(event.key in steps) || at < 0) return null;
  event.preventDefault();
  return buttons[(at + steps[event.key] + buttons.length) % buttons.length];
}
