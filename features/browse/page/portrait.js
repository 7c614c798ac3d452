/* The parts of a latent's page: histogram, logit effects, examples by quantile. A blind trial has the last two. */

import { putExample } from "./examples.js";
import { count, put, putToken, short } from "./text.js";

const WIDTH = 600, HEIGHT = 200;

/* bins: heights of equal width from 0 to `largest`. label: a function from a bin to its title. edges: of the quantiles. */
export function putHistogram(parent, bins, largest, label, edges) {
  const figure = put(parent, "figure", { class: "histogram" });
  put(figure, "h2", {}, "How strongly it fires");
  const svg = put(figure, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" });
  svg.setAttribute("aria-label", `Histogram of ${bins.length} bins from 0 to ${short(largest)}`);
  const most = Math.max(...bins, 1e-9), width = WIDTH / bins.length;
  bins.forEach((size, i) => {
    const height = size ? Math.max(1.5, (HEIGHT - 4) * Math.sqrt(size / most)) : 0;
    const bar = put(svg, "g", { class: "bin" });
    put(bar, "rect", { class: "reach", x: i * width, y: 0, width, height: HEIGHT });
    const drawn = put(bar, "rect", { class: "bar", x: i * width + 0.75, y: HEIGHT - height, width: width - 1.5, height });
    drawn.style.setProperty("--v", ((i + 1) / bins.length).toFixed(3));
    put(bar, "title", {}, label(i));
  });
  for (const edge of edges.slice(1, -1)) {
    const x = WIDTH * edge / largest;
    put(svg, "path", { class: "edge", d: `M${x},0V${HEIGHT}` });
  }
  put(svg, "path", { class: "base", d: `M0,${HEIGHT}H${WIDTH}` });
  const scale = put(figure, "div", { class: "scale" });
  for (const value of [0, largest / 2, largest]) put(scale, "span", {}, short(value));
  put(figure, "figcaption", {}, "Rows by value. Heights are square roots of counts. Dashed lines cut the values into groups of equal size.");
}

/* Two lists: tokens with raised logits, tokens with lowered logits. shares: values are shares of the largest. */
export function putLogits(parent, words, latent, shares = false) {
  const section = put(parent, "section", { class: "logits" });
  put(section, "h2", {}, "Effect on the next token");
  if (!latent.promoted) {
    put(section, "p", { class: "note" }, "Effects on logits need the model's weights and a site as wide as the model's residual stream.");
    return;
  }
  const columns = put(section, "div", { class: "columns" });
  const largest = Math.max(...[...latent.promoted_logits, ...latent.suppressed_logits].map(Math.abs), 1e-9);
  for (const [key, title] of [["promoted", "Raises most"], ["suppressed", "Lowers most"]]) {
    const side = put(columns, "div", { class: key });
    put(side, "h3", {}, title);
    const list = put(side, "ol", { class: "bars" });
    latent[key].forEach((token, i) => {
      const value = latent[`${key}_logits`][i], row = put(list, "li");
      row.style.setProperty("--v", (Math.abs(value) / largest).toFixed(3));
      putToken(row, words, token, { class: "chip" });
      put(row, "span", { class: "value" }, shares ? `${Math.round(100 * value)}`.replace("-", "−") : short(value));
    });
  }
}

/* contexts: Map from an example's context to its token ids. edges: of the quantiles; empty where they are not shown. */
export function putExamples(parent, words, examples, contexts, largest, edges, shares = false) {
  const groups = new Map();
  for (const example of examples) {
    if (!groups.has(example[0])) groups.set(example[0], []);
    groups.get(example[0]).push(example);
  }
  const samples = [...groups.keys()].filter((key) => key !== null).sort((a, b) => b - a);
  for (const quantile of [...(groups.has(null) ? [null] : []), ...samples]) {
    const section = put(parent, "section", { class: "examples" });
    put(section, "h2", {}, quantile === null ? "Where it fires most" : quantileTitle(quantile, samples, edges));
    const list = put(section, "ol", { class: "list" });
    for (const example of groups.get(quantile)) {
      putExample(list, words, contexts.get(example[1]), example, largest, shares);
    }
  }
}

function quantileTitle(quantile, samples, edges) {
  const of = edges.length > 1 ? edges.length - 1 : Math.max(...samples) + 1;
  const range = edges.length > 1 ? `: ${short(edges[quantile])} to ${short(edges[quantile + 1])}` : "";
  const end = { 0: ", the weakest", [of - 1]: ", the strongest" }[quantile] ?? "";
  return `Quantile ${count(quantile + 1)} of ${of}${end}${range}`;
}
