/* ---- One line for each SAE: training curves, density histograms ---- */
const metrics = [
  ["l0", "L0: active latents per token (log scale)", active], ["explained_variance", "explained variance", fixed(3)],
  ["gamma", "gamma", fixed(3)], ["dead", "dead latents (%)", share], ["loss", "loss (log scale)", short],
].filter(([key]) => data.curves.some((c) => c[key]?.some(has)));

function curves(host, [key, axis, format]) {
  const last = Math.max(0, ...data.curves.flatMap((c) => c.step));
  const times = key === "dead" ? 100 : 1, wantsLog = key === "l0" || key === "loss";
  const lines = data.curves.filter((c) => c[key] && visible(c.sae)).map((c) => ({ sae: c.sae, points: c.step.map((s, i) => [s, c[key][i]]).filter(([, v]) => has(v) && (!wantsLog || v > 0)) })).filter((c) => c.points.length);
  // Without the first tenth, because a curve may start at a hundred times its last value.
  const settled = lines.flatMap((c) => c.points.filter(([s], i, all) => s >= last / 10 || i === all.length - 1).map(([, v]) => v * times));
  if (!settled.length) return void host.replaceChildren(put(null, "p", { class: "note" }, "None of the shown SAEs has this value."));
  let [low, high] = padded(key === "gamma" ? [...settled, 1] : key === "dead" ? [...settled, 0, 1] : settled, 0.06);
  if (key === "dead") low = 0;
  if (wantsLog) [low, high] = [Math.min(...settled) / 1.15, Math.max(...settled) * 1.15];
  strings(host, lines, {
    title: `Training curves of ${lines.length} SAEs: ${axis}`, tall: 0.4, times, ended: true, reference: key === "gamma" ? 1 : null,
    x: { scale: linear, low: 0, high: last, title: "training step" }, y: { scale: wantsLog ? logarithmic : linear, low, high, title: axis },
    tell: ([step, value]) => [["step", count(step)], [axis.split(/[:(]/)[0].trim(), format(value)]],
  });
}

const power = (x) => `10${[...String(Math.round(x))].map((c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")}`;
const decades = (low, high, from, to) => {
  const ticks = [];
  for (let p = Math.ceil(low - 1e-9); p <= high + 1e-9; p++) ticks.push(p);
  return Object.assign((value) => from + (value - low) / (high - low || 1) * (to - from), { ticks, format: power, low, high });
};

function densities(host, which) {
  const lines = (which === "all" ? data.saes.map((sae, i) => i) : data.series[which].saes)
    .filter((i) => visible(i) && data.saes[i].density?.length).map((i) => ({ sae: i, points: data.saes[i].density }));
  const shares = lines.flatMap((line) => line.points.map(([x]) => x));
  if (!shares.length) return void host.replaceChildren(put(null, "p", { class: "note" }, "None of the shown SAEs has this value."));
  strings(host, lines, {
    title: `How often the latents of ${lines.length} SAEs fire`, tall: 0.56, times: 100, ended: false, reference: null,
    x: { scale: decades, low: Math.floor(Math.min(...shares)), high: 0, title: "share of the rows on which a latent fires (log scale)" },
    y: { scale: linear, low: 0, high: 105 * Math.max(...lines.flatMap((line) => line.points.map(([, y]) => y))), title: "share of the SAE’s latents (%)" },
    tell: ([x, y]) => [["fire on about", `${short(100 * 10 ** x)} % of rows`], ["latents", share(y)]],
  });
}

function strings(host, lines, { title, tall, times, ended, reference, x, y, tell }) {
  const few = ended && lines.length <= 22;
  const { svg, box, sx, sy } = frame(host, { title: `${title}. Arrow keys move between them.`, right: few ? 74 : 14, tall, x, y });
  const clip = put(put(put(svg, "defs"), "clipPath", { id: `within-${host.parentNode.id}` }), "rect", {
    x: box.left, y: box.top - 2, width: box.right - box.left + 2, height: box.bottom - box.top + 3,
  }).parentNode.id;
  if (reference !== null) put(svg, "line", { class: "reference", x1: box.left, x2: box.right, y1: sy(reference), y2: sy(reference) });
  for (const line of lines) {
    const series = seriesOf[line.sae], lambdas = series.saes.map((i) => data.saes[i].l1_coefficient ?? 0);
    const own = [...new Set(lambdas)].sort((a, b) => a - b), rank = own.indexOf(data.saes[line.sae].l1_coefficient ?? 0);
    line.color = `color-mix(in oklab, ${series.color} ${own.length > 1 ? Math.round(52 + 48 * rank / (own.length - 1)) : 100}%, var(--paper))`;
    line.at = line.points.map(([s, v]) => [sx(s), sy(v * times)]);
    line.told = line.points.map(tell);
    line.node = put(svg, "path", {
      class: "line thin curve", d: path(line.at), color: line.color, "stroke-dasharray": series.dash, "clip-path": `url(#${clip})`,
      tabindex: line === lines[0] ? 0 : -1, role: "img", "data-sae": line.sae,
      "aria-label": `${data.saes[line.sae].name}: ${summit(line, ended).map((pair) => pair.join(" ")).join(", ")}`,
    });
  }
  if (few) ends(svg, lines, box);
  else {
    const ink = lines.flatMap((line) => along(line.at).map(([px, py]) => [px, py, seriesOf[line.sae]]));
    for (const series of live()) label(svg, box, series.label, lines.filter((l) => seriesOf[l.sae] === series).flatMap((l) => [1, 0.85, 0.7, 0.55, 0.4, 0.25].map((part) => l.at[Math.floor(part * (l.at.length - 1))])), ink, series);
  }
  const show = (line, i) => {
    describe(line.sae, svg, line.at[i][0], Math.max(box.top, Math.min(box.bottom, line.at[i][1])), line.told[i]);
    svg.classList.add("dim");
  };
  svg.addEventListener("pointermove", (event) => {
    const at = inside(svg, event);
    let best = [null, 0, 26];
    for (const line of lines) {
      const i = line.at.reduce((near, [px], k) => Math.abs(px - at.x) < Math.abs(line.at[near][0] - at.x) ? k : near, 0);
      const distance = Math.abs(line.at[i][1] - at.y) + Math.max(0, Math.abs(line.at[i][0] - at.x) - 12);
      if (distance < best[2]) best = [line, i, distance];
    }
    if (best[0]) show(best[0], best[1]); else leave();
  });
  svg.addEventListener("pointerleave", leave);
  walk(svg, lines.map((l) => l.node), (node) => { const line = lines.find((l) => l.node === node); show(line, peak(line, ended)); });
}

/* The point that describes a whole line: the end of a curve, the highest point of a histogram. */
const peak = (line, ended) => ended ? line.points.length - 1 : line.points.reduce((best, [, v], i) => v > line.points[best][1] ? i : best, 0);
const summit = (line, ended) => line.told[peak(line, ended)];

/* λ at the end of each line. Labels that would overlap are moved apart, with a thin line back to the curve. */
function ends(svg, lines, box) {
  const gap = 13, sorted = [...lines].sort((a, b) => a.at.at(-1)[1] - b.at.at(-1)[1]);
  let floor = -Infinity;
  for (const line of sorted) { line.y = Math.max(floor + gap, Math.max(box.top, Math.min(box.bottom, line.at.at(-1)[1]))); floor = line.y; }
  let ceiling = box.bottom + gap / 2;
  for (const line of sorted.toReversed()) { line.y = Math.min(line.y, ceiling); ceiling = line.y - gap; }
  for (const line of sorted) {
    const [x, y] = [box.right, Math.max(box.top, Math.min(box.bottom, line.at.at(-1)[1]))];
    put(svg, "path", { class: "line ends", d: `M${x + 3},${y}L${x + 14},${line.y}`, "stroke-width": 1, color: line.color, "data-sae": line.sae }).style.strokeWidth = "1px";
    put(svg, "text", { class: "ends", x: x + 18, y: line.y + 4, color: seriesOf[line.sae].color, "data-sae": line.sae }, `λ ${short(data.saes[line.sae].l1_coefficient)}`);
  }
}
