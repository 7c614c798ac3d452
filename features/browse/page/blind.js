/* The blind comparison: one trial after another, rated no, maybe or yes. No data here says which SAE a trial shows. */

import { loadTrial, loadWords } from "./data.js";
import { hideTip } from "./examples.js";
import { putExamples, putLogits } from "./portrait.js";
import { $, put } from "./text.js";

const WORDS = ["no", "maybe", "yes"];
const TRIAL = /^#\/trial\/(\d{1,9})$/;

/* blind: { trials, vocabulary, context_size } of index.json. */
export async function putBlind(area, blind) {
  const page = put(area, "section", { class: "pane blind" });
  let words, rated;
  try {
    words = await loadWords(blind.vocabulary);
    rated = await ratings();
  } catch (error) {
    put(page, "p", { class: "note trouble", role: "alert" }, `${error.message} Ratings need \`gsae browse RUN --blind\`.`);
    return;
  }
  const unrated = (from) => {
    for (let k = 0; k < blind.trials; k++) if (!((from + k) % blind.trials in rated)) return (from + k) % blind.trials;
    return null;
  };
  const current = () => Math.min(Number(TRIAL.exec(location.hash)?.[1] ?? unrated(0) ?? 0), blind.trials - 1);
  let turn = 0, inSight = null; // the trial that is completely shown, which a key rates

  async function show() {
    const trial = current(), mine = ++turn;
    inSight = null;
    hideTip();
    let latent;
    try {
      latent = await loadTrial(trial);
    } catch (error) {
      latent = error;
    }
    if (mine !== turn) return;
    page.replaceChildren();
    putHead(page, trial, blind, rated, rate);
    document.title = `Trial ${trial + 1} of ${blind.trials} – gsae browse`;
    if (latent instanceof Error) return put(page, "p", { class: "note trouble", role: "alert" }, latent.message);
    putLogits(put(page, "div", { class: "figures" }), words, latent, true);
    putExamples(page, words, latent.examples, new Map(latent.contexts.entries()), 1, [], true);
    scrollTo(0, 0);
    $("h1", page).focus({ preventScroll: true });
    inSight = trial;
  }

  async function rate(trial, rating) {
    if (trial === null || trial !== inSight) return;
    inSight = null;
    try {
      rated = await ratings({ trial, rating });
    } catch (error) {
      $(".saved", page).textContent = `Not saved: ${error.message}`;
      inSight = trial;
      return;
    }
    const next = unrated(trial + 1);
    if (next === null || next === trial) show();
    else location.hash = `#/trial/${next}`;
  }

  addEventListener("hashchange", show);
  addEventListener("keydown", (event) => {
    const rating = { 1: 0, 2: 1, 3: 2, n: 0, m: 1, y: 2 }[event.key];
    if (rating !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat) rate(inSight, rating);
  });
  show();
}

function putHead(page, trial, blind, rated, rate) {
  const done = Object.keys(rated).length, head = put(page, "div", { class: "judge" });
  put(head, "h1", { tabindex: -1 }, `Trial ${trial + 1} of ${blind.trials}`);
  put(head, "p", {}, "Does it fire on one thing? Look at the weaker examples as well. 90 % means larger than 90 in 100 of its values.");
  const buttons = put(head, "div", { class: "ratings", role: "group", "aria-label": "Rating" });
  WORDS.forEach((word, rating) => {
    const button = put(buttons, "button", { type: "button", "aria-pressed": rated[trial] === rating ? "true" : "false" });
    button.append(word);
    put(button, "kbd", {}, String(rating + 1));
    button.addEventListener("click", () => rate(trial, rating));
  });
  const ways = put(head, "nav", { "aria-label": "Other trials" });
  if (trial > 0) put(ways, "a", { href: `#/trial/${trial - 1}` }, "previous");
  if (trial + 1 < blind.trials) put(ways, "a", { href: `#/trial/${trial + 1}` }, "next");
  put(head, "p", { class: "saved", role: "status" }, done < blind.trials
    ? `${done} of ${blind.trials} rated.` : `All ${done} are rated. Stop the command that serves this page to see the result.`);
}

/* Return the ratings; `one`: a rating to write first. */
async function ratings(one) {
  const posted = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(one) };
  const answer = await fetch("ratings", one ? posted : {});
  if (!answer.ok) throw new Error(`the server answers ${answer.status}.`);
  return answer.json();
}
