/* ---- Texts ---- */
document.title = `${data.headline} – gsae report`;
$("#kicker").textContent = data.kicker;
$("#headline").textContent = data.headline;
for (const text of data.summary) put($("#summary"), "p", { class: "lead" }, text);
for (const { figure, label, note } of data.tiles) {
  const box = put($("#tiles"), "div");
  put(box, "dt", {}, label);
  put(box, "dd", { class: "figure" }, figure);
  put(box, "dd", { class: "small" }, note);
}
if (!data.tiles.length) $("#tiles").remove();
for (const text of data.missing) say($("#missing"), "p", { class: "note" }, text);
for (const { run, facts, settings } of data.provenance) {
  const box = put($("#provenance"), "div");
  if (data.provenance.length > 1) put(box, "h3", { class: "name" }, run);
  const list = put(box, "dl", { class: "facts" });
  for (const [label, value] of facts) { put(list, "dt", {}, label); put(list, "dd", {}, value); }
  const more = put($("#provenance"), "details");
  put(more, "summary", {}, data.provenance.length > 1 ? `All settings of ${run} (config.toml)` : "All settings of the run (config.toml)");
  const all = put(more, "dl", { class: "facts" });
  for (const [label, value] of settings) { put(all, "dt", {}, label); put(all, "dd", {}, value); }
}
$("#commands").textContent = data.commands.join("\n");
