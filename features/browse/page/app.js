/* The page: its address determines what is shown, in one pane or in two side by side.

   #/SAE?sort=...                       the table of an SAE
   #/SAE/f/LATENT?sort=...              a latent; the table's settings wait for the way back
   #/compare/SAE/SAE?a.f=LATENT&b.sort=...   two panes, each with settings of its own */

import { putBlind } from "./blind.js";
import { load, loadTable, loadWords } from "./data.js";
import { hideTip } from "./examples.js";
import { loadFeature } from "./feature.js";
import { putTable } from "./table.js";
import { $, count, put } from "./text.js";

const OPTIONS = ["sort", "dir", "find", "low", "high", "show"];
const mounted = []; // for each pane: its element, and the address of what it shows

const whole = (text) => /^\d{1,9}$/.test(text ?? "") ? Number(text) : NaN;

export function parse(hash) {
  const [, path, query] = /^#?\/?([^?]*)\??(.*)$/s.exec(hash);
  const parts = path.split("/"), given = new URLSearchParams(query);
  const read = (sae, latent, prefix) => ({
    sae: whole(sae),
    latent: latent === null || latent === undefined ? null : whole(latent),
    options: Object.fromEntries(OPTIONS.filter((key) => given.get(prefix + key)).map((key) => [key, given.get(prefix + key)])),
  });
  if (parts[0] === "compare") return ["a.", "b."].map((prefix, i) => read(parts[1 + i], given.get(`${prefix}f`), prefix));
  return [read(parts[0] || "0", parts[1] === "f" ? parts[2] ?? "" : null, "")];
}

export function format(panes) {
  const query = new URLSearchParams(), two = panes.length === 2;
  panes.forEach(({ latent, options }, i) => {
    const prefix = two ? ["a.", "b."][i] : "";
    if (two && latent !== null) query.set(`${prefix}f`, latent);
    for (const key of OPTIONS) if (options[key]) query.set(prefix + key, options[key]);
  });
  const [first] = panes, latent = two || first.latent === null ? "" : `/f/${first.latent}`;
  const path = two ? `#/compare/${panes[0].sae}/${panes[1].sae}` : `#/${first.sae}${latent}`;
  return query.size ? `${path}?${query}` : path;
}

/* What the parts of a pane get: what it shows, and functions that change only its half of the address. */
function paneOf(panes, i) {
  const changed = (change) => format(parse(location.hash).map((pane, k) => k === i ? { ...pane, ...change } : pane));
  const publish = (write) => (options) => {
    const address = changed({ latent: null, options });
    write(address);
    mounted[i].address = format([parse(address)[i]]);
    relink();
  };
  return {
    ...panes[i],
    name: i === 0 ? "a" : "b",
    /* Return the attributes of a link to a latent of the SAE; null: to the table of latents. */
    link: (latent) => ({ href: changed({ latent }), "data-to": latent ?? "" }),
    go: (change) => { location.hash = changed(change); },
    replace: publish((address) => history.replaceState(null, "", address)),
    push: publish((address) => history.pushState(null, "", address)),
  };
}

/* A link contains what all panes show, so all links are updated when a pane changes. */
function relink() {
  const panes = parse(location.hash);
  mounted.forEach(({ element }, i) => {
    const { link } = paneOf(panes, i);
    for (const a of element.querySelectorAll("a[data-to]")) a.href = link(a.dataset.to === "" ? null : Number(a.dataset.to)).href;
  });
  putTop();
}

let index = null;

function route() {
  const panes = parse(location.hash), area = $("#panes");
  hideTip();
  area.classList.toggle("two", panes.length === 2);
  while (mounted.length > panes.length) mounted.pop().element.remove();
  panes.forEach((pane, i) => {
    const address = format([pane]);
    mounted[i] ??= { element: put(area, "section", { class: "pane", "aria-label": `Pane ${i + 1}` }), address: null };
    if (mounted[i].address === address && panes.length === mounted[i].of) return;
    const moved = mounted[i].address !== null;
    Object.assign(mounted[i], { address, of: panes.length });
    show(mounted[i], paneOf(panes, i), moved);
  });
  relink();
}

async function show(mount, pane, moved) {
  const { element } = mount;
  element.setAttribute("aria-busy", "true");
  const turn = mount.turn = (mount.turn ?? 0) + 1;
  const facts = index.saes[pane.sae];
  let fill;
  try {
    if (!facts) throw new Error(`There is no SAE ${pane.sae}. SAEs are numbered 0 to ${index.saes.length - 1}.`);
    const [columns, words] = await Promise.all([loadTable(pane.sae), loadWords(facts.vocabulary)]);
    if (pane.latent === null) fill = (parent) => putTable(parent, facts, columns, words, pane);
    else if (!(pane.latent < facts.d_sae)) throw new Error(`There is no such latent. This SAE has latents 0 to ${facts.d_sae - 1}.`);
    else fill = await loadFeature(index, facts, columns, words, pane);
  } catch (error) {
    fill = (parent) => putTrouble(parent, error);
  }
  if (turn !== mount.turn) return; // the address changed meanwhile
  element.replaceChildren();
  if (facts) putPaneHead(element, facts, pane);
  fill(element);
  element.removeAttribute("aria-busy");
  element.scrollTop = 0;
  if (!moved) return;
  if (mounted.length === 1) scrollTo(0, 0);
  $("h1, .grid", element)?.focus({ preventScroll: true });
}

function putTrouble(parent, error) {
  const box = put(parent, "div", { class: "note trouble", role: "alert" });
  put(box, "p", {}, error.message);
  put(box, "button", { type: "button" }, "Try again").addEventListener("click", () => {
    for (const mount of mounted) mount.address = null;
    route();
  });
}

function putPaneHead(parent, facts, pane) {
  const head = put(parent, "div", { class: "pane-head" });
  if (index.saes.length > 1) {
    const select = put(put(head, "label", { class: "sae" }, "SAE"), "select");
    index.saes.forEach((sae, n) => put(select, "option", { value: n }, sae.sae));
    select.value = pane.sae;
    select.addEventListener("change", () => { pane.go({ sae: Number(select.value), latent: null }); });
  } else put(head, "span", { class: "name" }, facts.sae);
  const said = [facts.architecture, `${count(facts.d_sae)} latents`, `${facts.site} of ${facts.model}`, `${count(facts.rows)} ${facts.split === "train" ? "training" : "held-out"} rows of ${facts.dataset}`];
  put(head, "p", { class: "facts" }, said.join(" · "));
}

/* The bar at the top and the window's title. */
function putTop() {
  const top = $("#top"), panes = parse(location.hash);
  top.replaceChildren();
  put(top, "a", { href: format([{ ...panes[0], latent: null }]), class: "brand" }, "gsae browse");
  if (index.saes.length > 1) {
    const ways = put(top, "nav", { "aria-label": "View" });
    const second = panes[1] ?? { sae: (panes[0].sae || 0) === 0 ? 1 : 0, latent: null, options: {} };
    for (const [label, shown] of [["one SAE", [panes[0]]], ["side by side", [panes[0], second]]]) {
      put(ways, "a", { href: format(shown), "aria-current": shown.length === panes.length ? "page" : null }, label);
    }
  }
  const said = panes.map(({ sae, latent }) => `${latent === null ? "" : `latent ${latent}, `}${index.saes[sae]?.sae ?? "?"}`);
  document.title = `${said.join(" and ")} – gsae browse`;
}

async function start() {
  try {
    index = await load("index.json");
    if (index.schema !== 1) throw new Error("data/index.json was written by another version of gsae than this page.");
  } catch (error) {
    $("#panes").replaceChildren();
    put($("#panes"), "p", { class: "note trouble", role: "alert" }, `${error.message} Reload the page to try again.`);
    return;
  }
  $("#waiting").remove();
  if (index.blind) return putBlind($("#panes"), index.blind);
  addEventListener("hashchange", route);
  route();
}

start();
