"use strict";
/* ---- Data, elements, numbers. Text from the data is only passed to textContent and setAttribute. ---- */
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);

function put(parent, tag, attributes = {}, text) {
  const svg = tag === "svg" || parent?.namespaceURI === "http://www.w3.org/2000/svg";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "color") node.style.setProperty("--c", value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

/* Append text with `code` in it. */
function say(parent, tag, attributes, text) {
  const node = put(parent, tag, attributes);
  text.split("`").forEach((part, i) => i % 2 ? put(node, "code", {}, part) : node.append(part));
  return node;
}

const has = (value) => value !== null && value !== undefined;
const none = "–";
const fixed = (digits) => (value) => has(value) ? value.toFixed(digits).replace("-", "−") : none;
const share = (value) => has(value) ? `${(100 * value).toFixed(1)} %` : none;
const short = (value) => has(value) ? String(Number(value.toPrecision(3))).replace("-", "−") : none;
const count = (value) => has(value) ? value.toLocaleString("en-US") : none;
const active = (value) => !has(value) ? none : value >= 100 ? count(Math.round(value)) : value.toFixed(value >= 10 ? 1 : 2);
const word = (value) => has(value) && value !== "" ? String(value) : none;

// Without a prototype, because the name of an architecture may be anything, such as __proto__.
const bare = (entries) => Object.assign(Object.create(null), entries);
const names = bare(data.names);
const colors = bare({ gated: ["--gated", "--gated-2", "--gated-3"], relu: ["--relu", "--relu-2", "--relu-3"] });
const spare = ["--third", "--fourth", "--fifth", "--sixth", "--seventh"];
for (const { architecture } of data.series) {
  colors[architecture] ??= [spare[(Object.keys(colors).length - 2) % spare.length]];
}

const columns = [
  ...(data.several.run ? [["run", "run", word]] : []),
  ...(data.several.site ? [["site", "site", word]] : []),
  ["d_sae", "d_sae", count], ["l1_coefficient", "λ (L1)", short], ["lr", "lr", short], ["seed", "seed", word],
  /* {{columns}} */
];
const told = Object.fromEntries(columns.map(([key, label, format]) => [key, (sae) => `${label} ${format(sae[key])}`]));
