/* Examples of a latent: contexts with tokens shaded by their values, which the pointer or the caret shows. */

import { $, count, exact, none, put, putToken, spoken } from "./text.js";

const BEFORE = 28, AFTER = 12; // tokens shown around the example's row before the whole context is opened

/* example: [quantile, context, position, value, positions, values]. largest: the value with full shade. */
export function putExample(parent, words, tokens, example, largest, shares = false) {
  const [, context, position, value, positions, values] = example;
  const figure = shares ? (v) => `${Math.round(100 * v)} %` : exact;
  const item = put(parent, "li", { class: "example" });
  if (!tokens) return put(item, "p", { class: "note" }, `The tokens of context ${context} are missing.`);
  const head = put(item, "div", { class: "where" });
  put(head, "b", {}, figure(value));
  if (!shares) put(head, "span", {}, `context ${count(context)}, token ${count(position)}`);
  const text = put(item, "p", { class: "text", tabindex: 0, role: "group" });
  text.setAttribute("aria-label", `${figure(value)} at ${spoken(words, tokens[position])}. Arrow keys move between tokens.`);
  const at = new Map(positions.map((p, i) => [p, values[i]]));
  const told = (p) => ({ token: tokens[p], place: p, value: at.has(p) ? figure(at.get(p)) : none });

  function draw(first, end) {
    text.replaceChildren();
    if (first > 0) put(text, "span", { class: "cut" }, "…");
    for (let p = first; p < end; p++) {
      const shade = at.has(p) ? Math.min(1, Math.max(0, at.get(p) / largest)) : 0;
      const kind = `${at.has(p) ? "fires " : ""}${p === position ? "peak" : ""}`;
      const node = putToken(text, words, tokens[p], { class: kind, "data-at": p }, true);
      if (at.has(p)) node.style.setProperty("--v", shade.toFixed(3));
    }
    if (end < tokens.length) put(text, "span", { class: "cut" }, "…");
  }

  const first = Math.max(0, position - BEFORE), end = Math.min(tokens.length, position + AFTER + 1);
  draw(first, end);
  if (first > 0 || end < tokens.length) {
    const more = put(head, "button", { type: "button", class: "more", "aria-expanded": "false" }, "whole context");
    more.addEventListener("click", () => {
      const whole = more.getAttribute("aria-expanded") === "false";
      more.setAttribute("aria-expanded", whole);
      more.textContent = whole ? "less" : "whole context";
      if (whole) draw(0, tokens.length); else draw(first, end);
    });
  }
  listen(text, words, told);
}

function listen(text, words, told) {
  let current = null;
  const show = (node) => {
    current?.classList.remove("on");
    current = node;
    if (!node) return hideTip();
    node.classList.add("on");
    showTip(node, words, told(Number(node.dataset.at)));
  };
  text.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
  text.addEventListener("pointerleave", () => show(null));
  text.addEventListener("blur", () => show(null));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const tokens = [...text.querySelectorAll(".token")], from = tokens.indexOf(current?.isConnected ? current : $(".peak", text));
    show(tokens[Math.min(tokens.length - 1, Math.max(0, current?.isConnected ? from + step : from))]);
  });
}

/* ---- The tooltip: the token under the pointer. ---- */
function showTip(node, words, { token, place, value }) {
  const tip = $("#tip"), box = node.getClientRects()[0];
  tip.replaceChildren();
  putToken(tip, words, token);
  const list = put(tip, "dl");
  for (const [name, said] of [["value", value], ["token id", token], ["position", place]]) {
    put(list, "dt", {}, name);
    put(list, "dd", {}, String(said));
  }
  tip.hidden = false;
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 8 : box.top - tip.offsetHeight - 8) + scrollY}px`;
}

export function hideTip() {
  $("#tip").hidden = true;
}
