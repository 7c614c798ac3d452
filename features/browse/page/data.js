/* Files below data/, fetched when they are needed; the KEPT most recently used stay in memory. */

const KEPT = 300;
const kept = new Map();

export function load(path) {
  const found = kept.get(path) ?? fetched(path);
  kept.delete(path);
  kept.set(path, found); // the most recently used is the last
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  return found;
}

async function fetched(path) {
  try {
    const answer = await fetch(`data/${path}`);
    if (!answer.ok) throw new Error(`data/${path}: the server answers ${answer.status}.`);
    return await answer.json();
  } catch (error) {
    kept.delete(path);
    throw error instanceof TypeError ? new Error(`data/${path} cannot be reached. Is the server still running?`) : error;
  }
}

const file = (number) => `${String(number).padStart(5, "0")}.json`;

/* Return a function from a token id to its text, null where it has none. */
export async function loadWords(vocabulary) {
  const texts = vocabulary === null ? [] : await load(`vocabularies/${vocabulary}.json`);
  return (id) => texts[id] ?? null;
}

export const loadTable = (sae) => load(`${sae}/table.json`);

export async function loadLatent(index, sae, latent) {
  const each = index.latents_a_shard;
  return (await load(`${sae}/latents/${file(Math.floor(latent / each))}`))[latent % each];
}

/* Return a Map from the number of each context of the examples to its token ids. */
export async function loadContexts({ store, contexts_a_shard: each }, examples) {
  const shards = [...new Set(examples.map(([, context]) => Math.floor(context / each)))];
  const loaded = await Promise.all(shards.map((shard) => load(`contexts/${store}/${file(shard)}`)));
  return new Map(loaded.flatMap((contexts) => Object.entries(contexts)).map(([at, ids]) => [Number(at), ids]));
}

export const loadTrial = (trial) => load(`trials/${file(trial)}`);
