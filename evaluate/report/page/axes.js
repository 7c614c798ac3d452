/* ---- Scales: linear with round ticks, logarithmic with 1, 2, 5 in each decade. ---- */
function linear(low, high, from, to, wanted) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= wanted);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const scale = (value) => from + (value - low) / span * (to - from);
  return Object.assign(scale, { ticks, format: fixed(digits), low, high });
}

function logarithmic(low, high, from, to, wanted) {
  const [a, b] = [Math.log(low), Math.log(high)];
  const at = (multiples) => {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) for (const m of multiples) ticks.push(m * 10 ** p);
    return ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  };
  const ticks = [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]].map(at).find((t) => t.length <= wanted) ?? at([1]);
  const scale = (value) => from + (Math.log(value) - a) / (b - a || 1) * (to - from);
  return Object.assign(scale, { ticks, format: (v) => count(Number(v.toPrecision(3))), low, high });
}

/* ---- Frame: axes, grid, titles. Drawn at the element's width, so that text has the same size on screen and paper. ---- */
let printing = false;

function frame(host, { title, x, y, right = 14, tall = 0.56 }) {
  host.replaceChildren();
  const width = Math.max(260, printing ? (host.closest(".wide") ? 690 : 333) : Math.round(host.clientWidth)), height = Math.round(Math.min(430, Math.max(290, width * tall)));
  const left = 50, top = 30, bottom = 46;
  const box = { left, top, right: width - right, bottom: height - bottom };
  const svg = put(host, "svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  const sx = x.scale(x.low, x.high, box.left, box.right, Math.max(3, Math.floor((box.right - box.left) / 62)));
  const sy = y.scale(y.low, y.high, box.bottom, box.top, Math.max(3, Math.floor((box.bottom - box.top) / 44)));
  for (const tick of sy.ticks) {
    put(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: sy(tick), y2: sy(tick) });
    put(svg, "text", { x: box.left - 9, y: sy(tick) + 4, "text-anchor": "end" }, sy.format(tick));
  }
  put(svg, "line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  for (const tick of sx.ticks) {
    put(svg, "line", { class: "base", x1: sx(tick), x2: sx(tick), y1: box.bottom, y2: box.bottom + 5 });
    put(svg, "text", { x: sx(tick), y: box.bottom + 19, "text-anchor": "middle" }, sx.format(tick));
  }
  put(svg, "text", { class: "axis-title", x: 0, y: 12 }, y.title);
  put(svg, "text", { class: "axis-title", x: box.right, y: height - 7, "text-anchor": "end" }, x.title);
  return { svg, box, sx, sy, width, height };
}

function padded(values, share) {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) * 0.1 || 1) * share;
  return [low - pad, high + pad];
}
