/* Texts of tokens on the page: they are never run as markup, and every character is visible. */

export const $ = (selector, root = document) => root.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";

/* Append a new element to `parent`. Text from the data is only passed to textContent and setAttribute. */
export function put(parent, tag, attributes = {}, text) {
  const svg = tag === "svg" || parent?.namespaceURI === SVG;
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

/* ---- Numbers ---- */
export const none = "–";
const has = (value) => value !== null && value !== undefined;
export const count = (value) => has(value) ? value.toLocaleString("en-US") : none;
export const digits = (n) => (value) => {
  if (!has(value)) return none;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-4 || size >= 1e6) return value.toExponential(n - 1).replaceAll("-", "−");
  return (size < 10 ** (n - 1) ? value.toPrecision(n) : String(Math.round(value))).replace("-", "−");
};
export const short = digits(3);
export const exact = digits(4);
export const percent = (share) => has(share) ? `${short(100 * share)} %` : none;

/* ---- Characters ---- */
const SIGNS = new Map([[" ", "·"], ["\n", "↵"], ["\t", "⇥"]]);
const UNSEEN = /[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}]/u;
const COMBINING = /^\p{M}/u;
const codePoint = (char) => `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const sign = (char) => SIGNS.get(char) ?? codePoint(char);

/* Return `text` in pieces [piece, whether it replaces an invisible character, that character]. */
function pieces(text, inProse) {
  const found = [], chars = [...text];
  let plain = "";
  chars.forEach((char, i) => {
    const next = chars[i + 1];
    const alone = next !== undefined && !UNSEEN.test(next) && (i === 0 || !UNSEEN.test(chars[i - 1]));
    const wordSpace = inProse && char === " " && alone;
    if (!UNSEEN.test(char) || wordSpace) {
      plain += COMBINING.test(char) && plain.trim() === "" ? `◌${char}` : char;
      return;
    }
    if (plain) found.push([plain, false]);
    plain = "";
    found.push([sign(char), true, char]);
  });
  if (plain) found.push([plain, false]);
  return found;
}

/* Return the text of a token as one line of plain characters, for titles and screen readers. */
export const spoken = (words, id) => {
  const text = words(id);
  return text === null ? `token ${id}` : pieces(text, false).map(([piece]) => piece).join("") || "(empty)";
};

/* Append a token, isolated from the writing direction of its neighbours. inProse: keep a space before a word. */
export function putToken(parent, words, id, attributes = {}, inProse = false) {
  const node = put(parent, "bdi", { ...attributes, class: `token ${attributes.class ?? ""}`.trim() });
  const text = words(id);
  if (text === null) put(node, "span", { class: "id" }, `${inProse ? " " : ""}${id}`);
  else if (text === "") put(node, "span", { class: "sign" }, "∅");
  else for (const [piece, isSign, char] of pieces(text, inProse)) {
    if (isSign) put(node, "span", { class: piece.startsWith("U+") ? "sign boxed" : "sign", title: codePoint(char) }, piece);
    else node.append(piece);
  }
  return node;
}
