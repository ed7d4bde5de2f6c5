// The table of all linears: sorted by the column whose title is pressed, and filtered by what is typed.
function watchTable() {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const lines = [...body.rows];
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const order = title.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of titles) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", order);
      lines.sort(byColumn(column, title.classList.contains("number"), order === "ascending" ? 1 : -1));
      body.append(...lines);
    });
  });
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const update = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const line of lines) line.hidden = !words.every((word) => line.textContent.toLowerCase().includes(word));
    const left = lines.filter((line) => !line.hidden).length;
    count.textContent = words.length ? `${left} of ${lines.length} linears` : `${lines.length} linears`;
  };
  filter.addEventListener("input", update);
  update();
}

/** Compares two lines; what is not known comes last whichever the direction. Layer 2 comes before layer 10. */
function byColumn(column, numeric, direction) {
  const words = new Intl.Collator("en", { numeric: true });
  return (one, other) => {
    const [a, b] = [one, other].map((line) => line.cells[column].dataset.value);
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return direction * (numeric ? Number(a) - Number(b) : words.compare(a, b));
  };
}
