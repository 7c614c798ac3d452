/* ---- Pointer, keyboard, tooltip: one SAE is highlighted in every plot and in the table. ---- */
const tip = $("#tip");

function inside(svg, event) {
  const at = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  return { x: (event.clientX - at.left) * view.width / at.width, y: (event.clientY - at.top) * view.height / at.height };
}

function light(sae) {
  for (const node of document.querySelectorAll("[data-sae]")) node.classList.toggle("on", Number(node.dataset.sae) === sae);
}

function describe(sae, svg, x, y, first = []) {
  light(sae);
  tip.replaceChildren();
  put(tip, "strong", {}, data.saes[sae].name);
  const list = put(tip, "dl"), item = data.saes[sae];
  const settings = ["run", "site", "d_sae", "l1_coefficient", "lr", "seed"];
  const told = columns.filter(([key]) => first.length ? settings.includes(key) : !["silent", "dense", "kl_div_score"].includes(key));
  const rows = [...first, ["architecture", names[item.architecture]], ...told.map(([key, name, format]) => [name, format(item[key])])];
  for (const [name, value] of rows) { put(list, "dt", {}, name); put(list, "dd", {}, value); }
  tip.hidden = false;
  const at = svg.getBoundingClientRect(), scale = at.width / svg.viewBox.baseVal.width, size = tip.getBoundingClientRect();
  const [px, py] = [at.left + x * scale, at.top + y * scale];
  const left = px + 16 + size.width < document.documentElement.clientWidth - 8 ? px + 16 : Math.max(8, px - 16 - size.width);
  const room = innerHeight - size.height - 8;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${Math.max(8, Math.min(py - 20, room)) + scrollY}px`;
}

function leave() {
  tip.hidden = true;
  light(-1);
  for (const svg of document.querySelectorAll("svg.dim")) svg.classList.remove("dim");
}

/* Each plot is one tab stop; arrow keys, Home and End move inside it. */
function walk(svg, nodes, show) {
  nodes.forEach((node, nth) => {
    node.addEventListener("focus", () => show(node));
    node.addEventListener("blur", leave);
    node.addEventListener("keydown", (event) => {
      const to = { ArrowRight: nth + 1, ArrowUp: nth + 1, ArrowLeft: nth - 1, ArrowDown: nth - 1, Home: 0, End: nodes.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = nodes[(to + nodes.length) % nodes.length];
      nodes.forEach((other) => other.setAttribute("tabindex", other === next ? 0 : -1));
      next.focus();
    });
  });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") leave(); });
