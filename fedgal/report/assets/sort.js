/* A click on the head of a column sorts its table. */
for (const table of document.querySelectorAll("main table")) {
  const body = table.tBodies[0], heads = table.tHead && table.tHead.rows[table.tHead.rows.length - 1].cells;
  if (!body || !heads || body.rows.length < 3 || table.querySelector("[rowspan], [colspan]")) continue;
  [...heads].forEach((head, i) => {
    const value = (row) => {
      const text = row.cells[i].textContent.trim(), number = parseFloat(text.replace("−", "-").replace(/^[<≤] */, ""));
      return isNaN(number) ? text : number;
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
}
