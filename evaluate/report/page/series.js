/* ---- Series: a family of colours and a shape for each architecture; shade and dashes for its runs, sites and widths. ---- */
const shapes = bare({ gated: "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z", relu: "M0,-6.2L6.2,0L0,6.2L-6.2,0Z", "gated-untied": "M0,-6L5.6,4.4H-5.6Z", "gated-unfrozen": "M0,6L5.6,-4.4H-5.6Z", "rescale-shift": "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", other: "M-4.6,-4.6H4.6V4.6H-4.6Z" });
const dashes = [null, "7 5", "2 5", "9 4 2 4"];
const seen = bare({});
const seriesOf = [];
for (const series of data.series) {
  const nth = seen[series.architecture] = (seen[series.architecture] ?? -1) + 1;
  series.dash = dashes[nth % dashes.length];
  series.color = `var(${colors[series.architecture][nth % colors[series.architecture].length]})`;
  series.shape = shapes[series.architecture] ?? shapes.other;
  for (const sae of series.saes) seriesOf[sae] = series;
}
const single = (series) => seen[series.architecture] === 0;

/* ---- The series that the plots show: all, except those with a cleared box. ---- */
const hidden = new Set();
const live = () => data.series.filter((series) => !hidden.has(series));
const visible = (i) => !hidden.has(seriesOf[i]);
for (const series of data.series.length > 2 ? data.series : []) {
  const field = $("#lines"), row = put(field, "label", { class: "name", color: series.color });
  field.hidden = false;
  const box = put(row, "input", { type: "checkbox", checked: "" });
  const sample = put(row, "svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
  put(sample, "path", { class: "line", d: "M0,6H26", "stroke-dasharray": series.dash });
  put(put(sample, "g", { class: "dot", transform: "translate(13,6)" }), "path", { d: series.shape });
  row.append(series.label);
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(series); else hidden.add(series);
    Object.keys(figures).forEach(draw);
  });
}
