"""A blind comparison of two SAEs' features, as Rajamanoharan et al. 2024 compare Gated SAEs with the baseline.

Latents are drawn in pairs, one of each SAE, uniformly among those that fire often enough to be judged, and all are
shown in one shuffled order. A reader says of each whether it is interpretable: no, maybe or yes. What is served has
no names, numbers of latents, densities or neighbours, and of values only their ranks: their sizes would tell (a
baseline shrinks them), and so would a histogram (a Gated SAE has none of the least). Which SAE a trial shows is in
key.json, beside what is served and not below it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.evaluate import Progress
from gsae.features.find.latents_json import EXAMPLE, Latent, read_contexts, read_latents
from gsae.features.find.reader import read_facts, rows_fired
from gsae.files import replace_text

from .ratings import WORDS, Ratings
from .site import INDEX, SCHEMA, digest_of, feature_folders, publish, write_json, write_texts

KEY, RATINGS, SITE = "key.json", "ratings.jsonl", "site"
REDRAWS, CONFIDENCE = 10_000, 0.95
MINIMUM_ROWS = 20
ALIKE = ("store_digest", "split", "context_size", "site", "has_tokens", "has_logits")  # else the page tells them apart


@dataclass(frozen=True)
class Trial:
    """One latent to judge. sae: 0 or 1; pair: of which it is one half."""

    pair: int
    sae: int
    latent: int


@dataclass(frozen=True)
class Key:
    """What a comparison is of, and which SAE each trial shows.

    saes: the names of two; the difference is the first's mean less the second's.
    """

    saes: tuple[str, str]
    architectures: tuple[str, str]
    weights_sha256: tuple[str, str]
    seed: int
    minimum_rows: int
    trials: tuple[Trial, ...]


def build_blind(
    run: Path,
    names: Sequence[str],
    out: Path | None = None,
    *,
    pairs: int = 50,
    seed: int = 0,
    minimum_rows: int = MINIMUM_ROWS,
    listen: Callable[[Progress], None] = lambda event: None,
) -> Path:
    """Draw a comparison of two SAEs of a run and write it to `out`, RUN/blind if None; return the folder.

    `out` gets key.json, site/ to be served, and ratings.jsonl once there are any. One that is already there goes on.
    Raises UsageError (not two SAEs, too few latents), NotFoundError, IncompatibleError (SAEs that were looked at on
    other rows, or `out` is another comparison).
    """
    out = out or run / "blind"
    folders = _two(feature_folders(run, names))
    facts = [read_facts(folder) for folder in folders]
    for field in ALIKE:
        if facts[0][field] != facts[1][field]:
            raise IncompatibleError(
                f"{facts[0]['sae']} and {facts[1]['sae']} cannot be compared blind: {field} differs."
            )
    key = _draw(facts, [rows_fired(folder) for folder in folders], pairs, seed, minimum_rows)
    if (out / KEY).exists() and read_key(out) != key:
        raise IncompatibleError(f"{out} is another comparison (SAEs, pairs, seed or rows). Give another --out.")
    if (out / RATINGS).exists() and not (out / KEY).exists():
        raise CorruptError(f"{out / RATINGS} has ratings of trials that nothing tells: {KEY} is gone.")
    text = json.dumps(asdict(key), indent=2) + "\n"
    digest = digest_of([*facts, asdict(key)])
    publish(out / SITE, digest, lambda folder: _fill(folder, folders, facts, key, digest, listen))
    replace_text(out / KEY, text)
    return out


def ratings_of(out: Path) -> Ratings:
    """Open the ratings of a comparison's folder."""
    return Ratings(out / RATINGS, len(read_key(out).trials))


def read_key(out: Path) -> Key:
    """Return key.json of a comparison's folder; raises NotFoundError and CorruptError."""
    path = out / KEY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["trials"] = [Trial(**trial) for trial in found["trials"]]
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return Key(**(found | lists))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{out} is no blind comparison. `gsae browse RUN --blind` makes one.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read: {error}.") from None


def compare_ratings(out: Path, seed: int = 0) -> dict[str, Any]:
    """Return what the ratings so far say, ready for JSON.

    counts: no, maybe and yes of each SAE. difference: over the pairs of which both are rated, the mean of the first's
    rating less the second's on 0, 1, 2. interval: its 95 % by redrawing pairs, None with fewer than two.
    """
    key, found = read_key(out), ratings_of(out).current()
    halves: dict[int, dict[int, int]] = {}
    counts = [dict.fromkeys(WORDS, 0) for _ in key.saes]
    for number, rating in found.items():
        trial = key.trials[number]
        counts[trial.sae][WORDS[rating]] += 1
        halves.setdefault(trial.pair, {})[trial.sae] = rating
    both = np.array([half[0] - half[1] for _, half in sorted(halves.items()) if len(half) == 2], np.float64)
    return {
        "saes": list(key.saes),
        "architectures": list(key.architectures),
        "rated": len(found),
        "trials": len(key.trials),
        "counts": dict(zip(key.saes, counts, strict=True)),
        "means": dict(zip(key.saes, map(_mean, counts), strict=True)),
        "pairs": len(both),
        "difference": float(both.mean()) if len(both) else None,
        "interval": _interval(both, seed),
        "confidence": CONFIDENCE,
    }


def _mean(counts: dict[str, int]) -> float | None:
    rated = sum(counts.values())
    return sum(score * counts[word] for score, word in enumerate(WORDS)) / rated if rated else None


def _interval(differences: NDArray[np.float64], seed: int) -> list[float] | None:
    """Percentiles of the mean of pairs drawn again with replacement."""
    n = len(differences)
    if n < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, n, (REDRAWS, n))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return [float(edge) for edge in np.quantile(differences[draws].mean(axis=1), tails)]


def _two(folders: list[Path]) -> list[Path]:
    """Return the two SAEs to compare, a Gated one first where the other is not."""
    if len(folders) != 2:
        names = ", ".join(folder.name for folder in folders)
        raise UsageError(f"A blind comparison is of two SAEs, not {len(folders)}: give --sae twice, of {names}.")
    return sorted(folders, key=lambda folder: not str(read_facts(folder)["architecture"]).startswith("gated"))


def _draw(
    facts: Sequence[dict[str, Any]], rows: Sequence[NDArray[np.int64]], pairs: int, seed: int, minimum_rows: int
) -> Key:
    rng = np.random.default_rng(seed)
    chosen = []
    for one, fired in zip(facts, rows, strict=True):
        able = np.flatnonzero(fired >= minimum_rows)
        if not 1 <= pairs <= len(able):
            raise UsageError(
                f"{one['sae']} has {len(able):,} latents that fire on at least {minimum_rows} rows: --pairs {pairs} "
                "cannot be drawn of them."
            )
        chosen.append(rng.choice(able, pairs, replace=False).tolist())
    halves = [Trial(pair, sae, chosen[sae][pair]) for pair in range(pairs) for sae in (0, 1)]
    first, second = facts
    return Key(
        (first["sae"], second["sae"]),
        (first["architecture"], second["architecture"]),
        (first["weights_sha256"], second["weights_sha256"]),
        seed,
        minimum_rows,
        tuple(halves[i] for i in rng.permutation(len(halves))),
    )


def _fill(
    out: Path,
    folders: Sequence[Path],
    facts: Sequence[dict[str, Any]],
    key: Key,
    digest: str,
    listen: Callable[[Progress], None],
) -> None:
    """Write a site that shows trials by number."""
    vocabularies = write_texts(out, folders, facts)
    done = 0
    for sae, folder in enumerate(folders):
        numbers = {trial.latent: n for n, trial in enumerate(key.trials) if trial.sae == sae}
        latents = {numbers[one["latent"]]: one for one in read_latents(folder, numbers)}
        at = EXAMPLE.index("context")
        wanted = {example[at] for latent in latents.values() for example in latent["examples"]}
        tokens = dict(read_contexts(folder / "contexts.parquet", wanted))
        for n, latent in latents.items():
            write_json(out / "data" / "trials" / f"{n:05d}.json", _anonymous(latent, tokens))
            done += 1
            listen(Progress("latents", done, len(key.trials), None))
    if len(set(vocabularies)) > 1:
        raise IncompatibleError("The two SAEs' tokens have different texts. Run `gsae features` for both again.")
    blind = {"trials": len(key.trials), "vocabulary": vocabularies[0], "context_size": facts[0]["context_size"]}
    write_json(out / INDEX, {"schema": SCHEMA, "made_of": digest, "blind": blind, "saes": []})


def _anonymous(latent: Latent, tokens: dict[int, list[int]]) -> dict[str, Any]:
    """Return what a judge may see of a latent: ranks of its values, logits as shares of the largest."""
    contexts: dict[int, int] = {}
    examples = []
    for quantile, context, position, value, positions, values in latent["examples"]:
        number, (rank, *ranks) = contexts.setdefault(context, len(contexts)), _ranks([value, *values], latent)
        examples.append([quantile, number, position, rank, positions, ranks])
    sides = [f"{side}_logits" for side in ("promoted", "suppressed")]
    largest = max((abs(v) for side in sides for v in latent[side] or ()), default=0.0)
    return {
        "examples": examples,
        "contexts": [tokens[context] for context in contexts],
        **{side: latent[side] for side in ("promoted", "suppressed")},
        **{side: latent[side] and [round(value / (largest or 1.0), 3) for value in latent[side]] for side in sides},
    }


def _ranks(values: list[float], latent: Latent) -> list[float]:
    """Return which share of the latent's values is below each, between its quantiles in proportion."""
    edges = latent["quantile_edges"]
    ranks: list[float] = np.interp(values, edges, np.linspace(0, 1, len(edges))).round(2).tolist()
    return ranks
