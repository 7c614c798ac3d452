/* The table of an SAE's latents, sorted and filtered. Only the visible rows are in the document. */

import { count, percent, put, putToken, short } from "./text.js";

const ROW = 32, SPARE = 8; // height in pixels, as in app.css; rows kept beyond the visible ones
const scrolls = new Map(); // scroll position of a table, by what it showed

const COLUMNS = [
  { key: "latent", name: "latent", first: "asc" },
  { key: "token", name: "top token", first: "asc" },
  { key: "density", name: "fires on", first: "desc" },
  { key: "rows", name: "rows", first: "desc" },
  { key: "max", name: "largest", first: "desc" },
  { key: "mean", name: "mean", first: "desc" },
];
const KEYS = new Set(COLUMNS.map(({ key }) => key));

/* Return the latents that `options` selects, sorted. A latent without a value comes last in either direction. */
export function chosen(columns, total, words, options) {
  const { rows, max, mean, top_token: tokens } = columns;
  const find = (options.find ?? "").toLowerCase(), low = share(options.low, 0), high = share(options.high, 1);
  const fits = new Map();
  const says = (token) => {
    if (!fits.has(token)) fits.set(token, (words(token) ?? String(token)).toLowerCase().includes(find));
    return fits.get(token);
  };
  const found = [];
  for (let i = 0; i < rows.length; i++) {
    const alive = rows[i] > 0, density = rows[i] / total;
    if (options.show === "alive" && !alive) continue;
    if (options.show === "dead" && alive) continue;
    if (density < low || density > high) continue;
    if (find && String(i) !== find && !(tokens[i] !== null && says(tokens[i]))) continue;
    found.push(i);
  }
  const key = KEYS.has(options.sort) ? options.sort : "latent";
  const way = options.dir === "desc" ? -1 : 1;
  if (key === "latent") return way === 1 ? found : found.reverse();
  const values = key === "token" ? ranks(tokens, words) : { density: rows, rows, max, mean }[key];
  return found.sort((a, b) => {
    const x = values[a], y = values[b];
    if (x === y) return a - b;
    if (x === null || y === null) return x === null ? 1 : -1;
    return x < y ? -way : way;
  });
}

/* Return a typed percentage as a share. */
function share(typed, otherwise) {
  const value = Number(typed);
  return typed === undefined || typed === "" || Number.isNaN(value) ? otherwise : value / 100;
}

function ranks(tokens, words) {
  const text = (token) => words(token) ?? String(token).padStart(9, "0");
  const order = [...new Set(tokens)].filter((token) => token !== null).map((token) => [text(token), token]);
  order.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  const rank = new Map(order.map(([, token], i) => [token, i]));
  return tokens.map((token) => token === null ? null : rank.get(token));
}

/* pane: see paneOf in app.js. */
export function putTable(parent, facts, columns, words, pane) {
  let options = { ...pane.options }, order = [], active = 0, drawn = 0;
  const filters = putFilters(parent, options, (changed) => change(changed, pane.replace));
  const grid = put(parent, "div", { class: "grid", role: "grid", tabindex: 0, "aria-label": "Latents", "aria-colcount": COLUMNS.length });
  const head = put(put(grid, "div", { class: "head", role: "rowgroup" }), "div", { class: "row", role: "row", "aria-rowindex": 1 });
  for (const column of COLUMNS) {
    const cell = put(head, "div", { role: "columnheader", class: column.key });
    const button = put(cell, "button", { type: "button", tabindex: -1 }, column.name);
    button.addEventListener("click", () => change({ sort: column.key, dir: direction(column) }, pane.push));
  }
  const body = put(grid, "div", { class: "body", role: "rowgroup" });

  const sorted = () => KEYS.has(options.sort) ? options.sort : "latent";
  function direction({ key, first }) {
    if (sorted() !== key) return first;
    return (options.dir ?? "asc") === "asc" ? "desc" : "asc";
  }

  function change(changed, publish) {
    options = { ...options, ...changed };
    publish(options);
    active = 0;
    update();
    grid.scrollTop = 0;
  }

  function update() {
    order = chosen(columns, facts.rows, words, options);
    grid.setAttribute("aria-rowcount", order.length + 1);
    body.style.height = `${order.length * ROW}px`;
    filters.textContent = order.length === columns.rows.length
      ? `${count(order.length)} latents` : `${count(order.length)} of ${count(columns.rows.length)} latents`;
    [...head.children].forEach((cell, i) => {
      if (COLUMNS[i].key !== sorted()) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", options.dir === "desc" ? "descending" : "ascending");
    });
    draw();
  }

  function draw() {
    const shown = grid.clientHeight || 600;
    const first = Math.max(0, Math.floor(grid.scrollTop / ROW) - SPARE);
    const end = Math.min(order.length, first + Math.ceil(shown / ROW) + 2 * SPARE);
    body.replaceChildren();
    for (let at = first; at < end; at++) body.append(row(at));
    if (order.length === 0) put(body, "p", { class: "note" }, "No latent matches the filters.");
    const named = active >= first && active < end;
    if (named) grid.setAttribute("aria-activedescendant", rowId(active));
    else grid.removeAttribute("aria-activedescendant");
  }

  const rowId = (at) => `${pane.name}row${at}`;
  function row(at) {
    const latent = order[at], alive = columns.rows[latent] > 0, density = columns.rows[latent] / facts.rows;
    const line = put(null, "div", { role: "row", class: "row", id: rowId(at), "aria-rowindex": at + 2, "data-latent": latent });
    line.classList.toggle("active", at === active);
    line.classList.toggle("dead", !alive);
    line.style.top = `${at * ROW}px`;
    put(put(line, "div", { role: "gridcell", class: "latent" }), "a", { ...pane.link(latent), tabindex: -1 }, String(latent));
    const token = put(line, "div", { role: "gridcell", class: "token-cell" });
    if (alive) putToken(token, words, columns.top_token[latent], { class: "chip" });
    else put(token, "span", { class: "badge" }, "dead");
    const bar = put(line, "div", { role: "gridcell", class: "density" }, alive ? percent(density) : "0 %");
    bar.style.setProperty("--v", alive ? Math.max(0, 1 + Math.log10(density) / 5).toFixed(3) : 0);
    put(line, "div", { role: "gridcell", class: "rows" }, count(columns.rows[latent]));
    put(line, "div", { role: "gridcell", class: "max" }, short(columns.max[latent]));
    put(line, "div", { role: "gridcell", class: "mean" }, short(columns.mean[latent]));
    return line;
  }

  const open = (latent) => pane.go({ latent });
  const showing = () => JSON.stringify([pane.name, pane.sae, options]);
  body.addEventListener("click", (event) => {
    const line = event.target.closest(".row");
    if (line && !event.target.closest("a")) open(Number(line.dataset.latent));
  });
  grid.addEventListener("scroll", () => {
    scrolls.set(showing(), grid.scrollTop);
    cancelAnimationFrame(drawn);
    drawn = requestAnimationFrame(draw);
  });
  grid.addEventListener("keydown", (event) => {
    if (event.target.closest("button, a") || event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(grid.clientHeight / ROW) - 2), last = order.length - 1;
    const to = { ArrowUp: active - 1, ArrowDown: active + 1, PageUp: active - page, PageDown: active + page, Home: 0, End: last }[event.key];
    if (event.key === "Enter" && order.length) open(order[active]);
    if (to === undefined) return;
    event.preventDefault();
    active = Math.max(0, Math.min(last, to));
    const top = active * ROW, seen = grid.clientHeight - 2 * ROW; // the header row covers the first rows
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top > grid.scrollTop + seen) grid.scrollTop = top - seen;
    draw();
  });
  new ResizeObserver(draw).observe(grid);
  update();
  grid.scrollTop = scrolls.get(showing()) ?? 0;
  draw();
}

/* Add the controls; return the element that says how many latents are selected. */
function putFilters(parent, options, changed) {
  const form = put(parent, "div", { class: "filters", role: "search" });
  const field = (name, label, attributes) => {
    const box = put(put(form, "label", { class: name }, label), "input", { name, autocomplete: "off", ...attributes });
    box.value = options[name] ?? "";
    box.addEventListener("input", () => changed({ [name]: box.value }));
  };
  field("find", "find", { type: "search", placeholder: "token or latent", spellcheck: "false" });
  field("low", "fires on at least %", { inputmode: "decimal", placeholder: "0" });
  field("high", "at most %", { inputmode: "decimal", placeholder: "100" });
  const select = put(put(form, "label", { class: "show" }, "show"), "select", { name: "show" });
  for (const [value, label] of [["", "all"], ["alive", "alive"], ["dead", "dead"]]) put(select, "option", { value }, label);
  select.value = ["alive", "dead"].includes(options.show) ? options.show : "";
  select.addEventListener("change", () => changed({ show: select.value }));
  return put(form, "output", { class: "left", "aria-live": "polite" });
}
