/* The page of one latent. */

import { loadContexts, loadLatent } from "./data.js";
import { putExamples, putHistogram, putLogits } from "./portrait.js";
import { count, percent, put, putToken, short, spoken } from "./text.js";

/* Load all that the page shows; return the function that puts it into an element. */
export async function loadFeature(index, facts, columns, words, pane) {
  const latent = await loadLatent(index, pane.sae, pane.latent);
  const contexts = await loadContexts(facts.contexts_from, latent.examples);
  return (parent) => putFeature(parent, facts, columns, words, pane, latent, contexts);
}

function putFeature(parent, facts, columns, words, pane, latent, contexts) {
  putHead(parent, facts, pane, latent);
  const tiles = put(parent, "dl", { class: "tiles" });
  const tile = (name, value, note) => {
    const box = put(tiles, "div");
    put(box, "dt", {}, name);
    const said = put(box, "dd", {}, value);
    if (note) put(box, "dd", { class: "small" }, note);
    return said;
  };
  tile("fires on", percent(latent.density), `${count(latent.rows)} of ${count(facts.rows)} ${facts.split === "train" ? "training" : "held-out"} rows`);
  tile("largest value", short(latent.max), `mean ${short(latent.mean)}`);
  const top = tile("top token", "");
  if (latent.rows) putToken(top, words, latent.top_token, { class: "chip" });
  else top.textContent = "–";

  const figures = put(parent, "div", { class: "figures" });
  if (latent.rows) {
    const width = latent.max / latent.histogram.length;
    const label = (i) => `${short(i * width)} to ${short((i + 1) * width)}: ${count(latent.histogram[i])} rows`;
    putHistogram(figures, latent.histogram, latent.max, label, latent.quantile_edges);
  } else put(figures, "p", { class: "note dead" }, `Dead: it fires on none of the ${count(facts.rows)} rows.`);
  putLogits(figures, words, latent);
  putNeighbours(figures, columns, words, pane, latent);
  putExamples(parent, words, latent.examples, contexts, latent.max, latent.quantile_edges ?? []);
}

function putHead(parent, facts, pane, latent) {
  const head = put(parent, "div", { class: "feature-head" });
  put(head, "h1", { tabindex: -1 }, `Latent ${latent.latent}`);
  const ways = put(head, "nav", { "aria-label": "Other latents" });
  const other = (label, to, enabled) => {
    const attributes = enabled ? pane.link(to) : { "aria-disabled": "true", role: "link" };
    put(ways, "a", attributes, label);
  };
  put(ways, "a", { ...pane.link(null), class: "back" }, "all latents");
  other("previous", latent.latent - 1, latent.latent > 0);
  other("next", latent.latent + 1, latent.latent + 1 < facts.d_sae);
}

function putNeighbours(parent, columns, words, pane, latent) {
  const section = put(parent, "section", { class: "neighbours" });
  put(section, "h2", {}, "Nearest decoder directions");
  const list = put(section, "ol", { class: "bars" });
  (latent.neighbours ?? []).forEach((other, i) => {
    const cosine = latent.cosines[i], row = put(list, "li"), token = columns.top_token[other];
    row.style.setProperty("--v", Math.max(0, cosine).toFixed(3));
    const said = token === null ? "dead" : `top token ${spoken(words, token)}`;
    put(row, "a", { ...pane.link(other), "aria-label": `Latent ${other}, ${said}` }, String(other));
    if (token === null) put(row, "span", { class: "badge" }, "dead");
    else putToken(row, words, token, { class: "chip" });
    put(row, "span", { class: "value" }, short(cosine));
  });
}
