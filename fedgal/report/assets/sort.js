/* A click on the head of a column sorts its table; a box leaves only the columns in which rows differ. */
for (const table of document.querySelectorAll("main table")) {
  const body = table.tBodies[0], heads = table.tHead && table.tHead.rows[table.tHead.rows.length - 1].cells;
  if (!body || !heads || body.rows.length < 3 || table.querySelector("[rowspan], [colspan]")) continue;
  const rows = [...body.rows], text = (row, i) => row.cells[i].textContent.trim();
  [...heads].forEach((head, i) => {
    const value = (row) => {
      const number = parseFloat(text(row, i).replace("−", "-").replace(/^[<≤] */, ""));
      return isNaN(number) ? text(row, i) : number;
    };
    const compare = (a, b) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1);
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => down * compare(value(a), value(b))));
    };
    head.tabIndex = 0;
    head.classList.add("sorts");
    head.title = "Sort";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
  const same = [...heads].map((_, i) => i > 0 && rows.every((row) => text(row, i) === text(rows[0], i)));
  if (!same.some(Boolean) || same.filter((s) => !s).length < 2) continue;
  const box = document.createElement("input"), label = document.createElement("label");
  box.type = "checkbox";
  label.className = "only";
  label.append(box, "Only what differs");
  box.addEventListener("change", () => {
    for (const row of table.rows) [...row.cells].forEach((cell, i) => (cell.hidden = box.checked && same[i]));
  });
  (table.closest(".scroll") || table).before(label);
}
