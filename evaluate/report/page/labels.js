/* ---- Direct labels: each is put near its own line, where it crosses no line, point or label. ----
   `ink`: what is drawn already, [x, y, owner]. A label near another series' ink would be read as that series' label. */
function label(svg, box, text, spots, ink, owner) {
  const node = put(svg, "text", { class: "label", color: owner.color }, text);
  const w = node.getComputedTextLength() + 6, h = 17;
  let best = null;
  spots.forEach(([px, py], nth) => {
    for (const [dx, dy, anchor] of [[12, -11, 0], [-12, -11, 1], [12, 21, 0], [-12, 21, 1], [14, 5, 0], [-14, 5, 1]]) {
      const x0 = px + dx - anchor * w, y0 = py + dy - h + 4;
      if (x0 < box.left || x0 + w > box.right + 12 || y0 < box.top - 14 || y0 + h > box.bottom - 3) continue;
      let cost = nth * 0.6;
      for (const [x, y, whose] of ink) {
        const away = Math.max(x0 - x, x - x0 - w, y0 - y, y - y0 - h);
        if (away < 4) cost += 10; else if (away < 16 && whose !== owner) cost += 1;
      }
      if (!best || cost < best.cost) best = { cost, x: x0 + 3, y: py + dy, x0, y0 };
    }
  });
  if (!best || (best.cost > 20 && data.series.length > 2)) return node.remove(); // the boxes above the plots name every line
  node.setAttribute("x", best.x);
  node.setAttribute("y", best.y);
  for (let i = 0; i <= w; i += 6) for (const j of [2, 9, 16]) ink.push([best.x0 + i, best.y0 + j, owner]);
}

function along(points, step = 5) {
  const all = [...points];
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const n = Math.ceil(Math.hypot(x1 - x0, y1 - y0) / step);
    for (let k = 1; k < n; k++) all.push([x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n]);
  }
  return all;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
