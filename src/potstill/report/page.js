// A click on a column's head sorts its table: up, down, and as it was. Without scripts the tables stay as they are.
for (const table of document.querySelectorAll(".scroll > table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows].filter((row) => !row.hasAttribute("data-last"));
  const heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  const value = (row, column) => row.cells[column].dataset.value ?? "";
  const compare = (a, b, column, sign) => {
    const [x, y] = [value(a, column), value(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // where there is no figure, last in either order
    return sign * (column ? x - y : x.localeCompare(y, "en", { numeric: true }));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      body.prepend(...(next ? rows.toSorted((a, b) => compare(a, b, column, sign)) : rows));
    });
  });
}
