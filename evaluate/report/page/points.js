/* ---- Points: one metric against L0. `strands`: the SAEs of a series that each line joins. ---- */
const error = (i, key) => 1.96 * (data.saes[i].errors[key] ?? 0);

function scatter(host, { key, title, axis, strands, reference, gap, hint, times = 1, format = fixed(3) }) {
  const shown = data.saes.map((sae, i) => i).filter((i) => visible(i) && data.saes[i].l0 > 0 && has(data.saes[i][key]));
  if (!shown.length) return void host.replaceChildren(put(null, "p", { class: "note" }, "None of the shown SAEs has this value."));
  const l0 = shown.map((i) => data.saes[i].l0), values = shown.flatMap((i) => [-1, 1].map((sign) => times * (data.saes[i][key] + sign * error(i, key))));
  let [low, high] = padded(reference ? [...values, reference.at] : times === 1 ? values : [...values, 0, 1], 0.1);
  if (times !== 1) low = 0;
  const { svg, box, sx, sy, width } = frame(host, {
    title: `${title}. ${shown.length} points; arrow keys move between them.`,
    x: { scale: logarithmic, low: Math.min(...l0) / 1.18, high: Math.max(...l0) * 1.18, title: "L0: active latents per token (log scale)" },
    y: { scale: linear, low, high, title: axis },
  });
  const place = (i) => [sx(data.saes[i].l0), sy(times * data.saes[i][key])];
  const ink = shown.flatMap((i) => { const [x, y] = place(i), s = seriesOf[i]; return [[x - 5, y, s], [x + 5, y, s], [x, y - 5, s], [x, y + 5, s]]; });
  if (hint) put(svg, "text", { class: "hint", x: box.left + 8, y: box.top + 14 }, hint);
  if (hint) ink.push(...along([[box.left + 8, box.top + 10], [box.left + 60, box.top + 10]]));
  if (reference) {
    put(svg, "line", { class: "reference", x1: box.left, x2: box.right, y1: sy(reference.at), y2: sy(reference.at) });
    put(svg, "text", { class: "hint", x: box.right, y: sy(reference.at) - 7, "text-anchor": "end" }, reference.text);
    ink.push(...along([[box.left, sy(reference.at)], [box.right, sy(reference.at)]]), ...along([[box.right - 110, sy(reference.at) - 11], [box.right, sy(reference.at) - 11]]));
  }
  for (const series of live()) {
    const edge = (series.bands[key] ?? []).map(([x, bottom, top]) => [sx(x), sy(bottom), sy(top)]);
    if (edge.length) put(svg, "path", { class: "band", color: series.color, d: `${path([...edge.map(([x, y]) => [x, y]), ...edge.map(([x, , y]) => [x, y]).reverse()])}Z` });
  }
  for (const series of live()) {
    for (const strand of strands(series)) {
      const points = strand.filter((i) => shown.includes(i)).map(place);
      ink.push(...along(points).map(([x, y]) => [x, y, series]));
      put(svg, "path", { class: "line", d: path(points), color: series.color, "stroke-dasharray": series.dash });
    }
  }
  if (gap) {
    const [x0, x1, y] = [sx(gap.gated), sx(gap.baseline), sy(gap.score)];
    put(svg, "path", { class: "gap", d: `M${x0},${y}H${x1}M${x0},${y - 5}v10M${x1},${y - 5}v10` });
    const text = put(svg, "text", { class: "gap-label", x: (x0 + x1) / 2, y: y - 7, "text-anchor": "middle" }, `${gap.ratio.toFixed(1)}×`);
    const half = text.getComputedTextLength() / 2;
    ink.push(...along([[x0, y], [x1, y]]), ...along([[(x0 + x1) / 2 - half, y - 11], [(x0 + x1) / 2 + half, y - 11]]));
  }
  for (const i of shown) {
    const [x, y] = place(i), tall = Math.abs(sy(error(i, key) * times) - sy(0)), l0 = data.saes[i].l0, wide = error(i, "l0");
    const [x0, x1] = [sx(Math.max(l0 - wide, l0 / 2)), sx(l0 + wide)];
    if (tall > 6) put(svg, "path", { class: "bar", color: seriesOf[i].color, d: `M${x},${y - tall}V${y + tall}M${x - 3.5},${y - tall}h7M${x - 3.5},${y + tall}h7` });
    if (x1 - x0 > 12) put(svg, "path", { class: "bar", color: seriesOf[i].color, d: `M${x0},${y}H${x1}M${x0},${y - 3.5}v7M${x1},${y - 3.5}v7` });
  }
  const dots = [...shown].sort((a, b) => data.saes[a].l0 - data.saes[b].l0).map((i, nth) => {
    const sae = data.saes[i], series = seriesOf[i], [x, y] = place(i);
    const beaten = key in series.fronts && !series.fronts[key].includes(i);
    const about = [series.label, ...["l1_coefficient", "seed", "l0"].map((k) => told[k](sae)), `${axis.split(" (")[0]} ${format(sae[key])}`];
    const dot = put(svg, "g", {
      class: beaten ? "dot beaten" : "dot", transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, color: series.color,
      tabindex: nth ? -1 : 0, role: "img", "aria-label": about.join(", "), "data-sae": i,
    });
    put(dot, "path", { d: series.shape });
    return dot;
  });
  for (const series of live()) {
    const own = series.saes.filter((i) => shown.includes(i)).map(place).sort((a, b) => b[0] - a[0]);
    label(svg, box, width < 480 && single(series) ? names[series.architecture] : series.label, own, ink, series);
  }
  if (dots.some((dot) => dot.classList.contains("beaten"))) {
    put(host, "p", { class: "legend" }, "Hollow: another SAE of the same line has a higher score with at most as many latents.");
  }
  const around = shown.map((i) => [i, ...place(i)]);
  svg.addEventListener("pointermove", (event) => {
    const at = inside(svg, event);
    const [near, distance] = around.reduce((best, [i, x, y]) => { const d = Math.hypot(x - at.x, y - at.y); return d < best[1] ? [i, d] : best; }, [null, 28]);
    if (near === null) return leave();
    describe(near, svg, ...place(near));
  });
  svg.addEventListener("pointerleave", leave);
  walk(svg, dots, (dot) => describe(Number(dot.dataset.sae), svg, ...place(Number(dot.dataset.sae))));
}
