/* ---- The table ---- */
const table = $("#table");
const heads = [["name", "SAE", word, "word"], ["architecture", "architecture", word, "word"], ...columns];
const order = { by: null, up: true };
const cells = data.saes.map((sae, i) => {
  const row = put(null, "tr", { "data-sae": i, color: seriesOf[i].color });
  heads.forEach(([key, , format], nth) => {
    const text = key === "architecture" ? names[sae.architecture] : format(sae[key]);
    put(row, nth ? "td" : "th", nth ? { class: typeof sae[key] === "string" ? "word" : undefined } : { scope: "row", title: text, class: "name" }, text);
  });
  return row;
});
const headRow = put($("thead", table), "tr");
heads.forEach(([key, text]) => {
  const words = data.saes.some((sae) => typeof sae[key] === "string");
  const head = put(headRow, "th", { scope: "col", class: words ? "word" : undefined });
  put(head, "button", { type: "button" }, text).addEventListener("click", () => {
    Object.assign(order, { by: key, up: order.by === key ? !order.up : true });
    for (const other of headRow.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    fillRows();
  });
});
function fillRows() {
  const at = data.saes.map((_, i) => i), { by, up } = order;
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  if (by) at.sort((i, j) => {
    if (by === "name") return up ? i - j : j - i; // in the order of the data (architecture, width, λ), not alphabetical
    const [a, b] = [data.saes[i][by], data.saes[j][by]];
    return has(a) && has(b) ? (up ? compare(a, b) : compare(b, a)) || i - j : has(b) - has(a) || i - j;
  });
  $("tbody", table).replaceChildren(...at.map((i) => cells[i]));
}
fillRows();

/* ---- CSV: the rows of the table in its order, unrounded, with the metrics that have no column in it. A cell that a
   spreadsheet would take for a formula gets an apostrophe. ---- */
function csv() {
  const keys = ["run", "name", "architecture", "site", ...new Set([...columns.map(([key]) => key), ...Object.keys(data.saes[0] ?? {})])];
  const own = [...new Set(keys)].filter((key) => !["errors", "density"].includes(key)), errors = Object.keys(data.saes[0]?.errors ?? {});
  const cell = (value) => typeof value === "number" || !has(value) ? value ?? "" : `"${`${/^[=+\-@\t\r]/.test(value) ? "'" : ""}${value}`.replaceAll('"', '""')}"`;
  const rows = [...$("tbody", table).children].map((row) => data.saes[row.getAttribute("data-sae")]);
  const lines = rows.map((sae) => [...own.map((key) => cell(sae[key])), ...errors.map((key) => cell(sae.errors[key]))].join(","));
  return [[...own, ...errors.map((key) => `${key}_standard_error`)].join(","), ...lines].join("\r\n") + "\r\n";
}
$("#csv").addEventListener("click", () => {
  const address = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  put(null, "a", { href: address, download: "gsae-report.csv" }).click();
  URL.revokeObjectURL(address);
});
