"use strict";
// Sorting and filtering of long tables. Without this script they are plain tables, complete and in order.
for (const table of document.querySelectorAll("table.explore")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = new Intl.Collator("en", { numeric: true }).compare;
  const compare = (a, b, column) => {
    const [one, other] = [a.cells[column], b.cells[column]];
    const isNumber = "order" in one.dataset && "order" in other.dataset;
    return isNumber ? one.dataset.order - other.dataset.order : text(one.textContent, other.textContent);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...rows].sort((a, b) => sign * compare(a, b, column)));
    });
  });

  const label = document.createElement("label"), input = document.createElement("input");
  const shown = document.createElement("output");
  input.type = "search";
  input.placeholder = "name, operator, precision, kernel";
  label.className = "filter";
  label.append("Filter ", input, " ", shown);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
  table.parentElement.before(label);
}
