/* ---- The plots, which are drawn again when their width changes. ---- */
const front = (key) => (series) => [series.fronts[key]];
const bySeed = (series) => {
  const strands = new Map();
  for (const i of series.saes) {
    const of = `${data.saes[i].seed}/${data.saes[i].lr}`;
    strands.set(of, [...(strands.get(of) ?? []), i]);
  }
  return [...strands.values()].map((strand) => strand.sort((a, b) => data.saes[a].l0 - data.saes[b].l0));
};
const figures = {
  "fig-ce": (host) => scatter(host, { key: "ce_loss_score", title: "Loss recovered against L0", axis: "loss recovered (1 = the model’s own loss)", strands: front("ce_loss_score"), gap: data.gaps.ce_loss_score, hint: "↖ better" }),
  "fig-ev": (host) => scatter(host, { key: "explained_variance", title: "Explained variance against L0", axis: "explained variance", strands: front("explained_variance"), gap: data.gaps.explained_variance, hint: "↖ better" }),
  "fig-gamma": (host, key) => scatter(host, { key, title: "Relative reconstruction bias against L0", axis: key === "gamma" ? "gamma (relative reconstruction bias)" : "gamma about the mean row", strands: bySeed, reference: { at: 1, text: "no shrinkage" } }),
  "fig-idle": (host, key) => scatter(host, { key, title: `Share of ${key} latents against L0`, axis: `${key} latents (%)`, strands: bySeed, times: 100, format: share }),
  "fig-density": densities,
  "fig-curves": (host, key) => curves(host, metrics.find(([k]) => k === key)),
};
function choices(figure, options) {
  const select = $(`#${figure} select`);
  for (const [value, text] of options) put(select, "option", { value }, text);
  if (options.length < 2) select.parentNode.hidden = true;
  select.addEventListener("change", () => draw(figure));
}
function draw(figure) {
  const root = document.getElementById(figure);
  figures[figure]($(".plot", root), $("select", root)?.value);
}
choices("fig-gamma", [["gamma", "gamma"], ["gamma_centred", "gamma, centred"]].filter(([key]) => data.saes.some((sae) => has(sae[key]))));
choices("fig-idle", ["dead", "silent", "dense"].filter((key) => data.saes.some((sae) => has(sae[key]))).map((key) => [key, `${key} latents`]));
choices("fig-density", [["all", "every SAE"], ...(data.series.length > 1 ? data.series.map((series, i) => [i, series.label]) : [])]);
choices("fig-curves", metrics.map(([key, axis]) => [key, axis.split(/[:(]/)[0].trim()]));

if (!data.saes.some((sae) => has(sae.ce_loss_score))) {
  $("#fig-ce .plot").append($("#missing").firstChild);
  delete figures["fig-ce"];
}
if (!metrics.length) { $("#fig-curves").remove(); delete figures["fig-curves"]; }
const widths = new Map();
const watch = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const figure = target.closest("figure").id;
    if (widths.get(figure) !== Math.round(contentRect.width)) { widths.set(figure, Math.round(contentRect.width)); draw(figure); }
  }
});
for (const figure of Object.keys(figures)) watch.observe($(`#${figure} .plot`));
function paper(on) {
  printing = on;
  for (const settings of document.querySelectorAll("details")) settings.open = on;
  Object.keys(figures).forEach(draw);
}
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
