"""A blind comparison of two SAEs' features, as Rajamanoharan et al. 2024 compare Gated SAEs with the baseline.

Latents are drawn in pairs, one of each SAE, uniformly among those that fire often enough to be judged. All are shown in
one shuffled order, and a reader says of each whether it is interpretable: no, maybe or yes. What is served has no
names, numbers of latents, densities or neighbours, and only the ranks of values: their sizes would reveal a baseline,
which shrinks them, and a histogram would reveal a Gated SAE, which has no small values. key.json, which says what each
trial shows, stands beside the served folder and not below it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, IncompatibleError, UsageError
from gsae.evaluate import Listen, Progress, ignore
from gsae.features.find.features_json import FeatureFacts, read_facts
from gsae.features.find.latents_json import EXAMPLE, Latent, read_contexts, read_latents
from gsae.features.find.reader import rows_fired

from .blind_key import KEY, BlindKey, Trial, read_key, write_key
from .blind_result import RATINGS
from .folder import INDEX, SCHEMA, digest_of, make_folder, write_json
from .settings import BlindSettings
from .site import feature_folders, write_texts

SITE = "site"
ALIKE = (
    "store_digest",
    "split",
    "context_size",
    "site",
    "has_tokens",
    "has_logits",
)  # else the page shows which is which


DEFAULTS = BlindSettings()


def build_blind(
    run: Path,
    names: Sequence[str],
    out: Path | None = None,
    settings: BlindSettings = DEFAULTS,
    listen: Listen = ignore,
) -> Path:
    """Draw a comparison of two SAEs of a run and write it to `out`, RUN/blind if None; return the folder.

    names: of the two, or empty where the run has just two with features. `out` gets key.json, site/ to be served, and
    ratings.jsonl with the first rating. The same comparison continues where it is already there. Raises UsageError (not
    two SAEs, or too few latents), NotFoundError, and IncompatibleError (the SAEs' features are of different rows, or
    `out` is another comparison).
    """
    out = out or run / "blind"
    folders = _two(run, names)
    first, second = facts = [read_facts(folder) for folder in folders]
    for field in ALIKE:
        if getattr(first, field) != getattr(second, field):
            raise IncompatibleError(f"{first.sae} and {second.sae} cannot be compared blind: {field} differs.")
    key = _draw(facts, [rows_fired(folder) for folder in folders], settings)
    if (out / KEY).exists() and read_key(out) != key:
        raise IncompatibleError(f"{out} is another comparison (SAEs, pairs, seed or rows). Give another --out.")
    if (out / RATINGS).exists() and not (out / KEY).exists():
        raise CorruptError(f"{out / RATINGS} has ratings, but {KEY}, which says what was rated, is gone.")
    digest = digest_of([*(one.values() for one in facts), key.model_dump()])
    make_folder(out / SITE, digest, lambda folder: _fill(folder, folders, facts, key, digest, listen))
    write_key(out, key)
    return out


def _two(run: Path, names: Sequence[str]) -> list[Path]:
    """Return the features folders of the two SAEs to compare, a Gated one first where the other is not."""
    folders = feature_folders(run, names)
    if len(folders) != 2:
        there = ", ".join(folder.name for folder in feature_folders(run))
        raise UsageError(
            f"A blind comparison is of two SAEs, not {len(folders)}. Give --sae twice; {run} has features of {there}."
        )
    return sorted(folders, key=lambda folder: not read_facts(folder).architecture.startswith("gated"))


def _draw(facts: Sequence[FeatureFacts], rows: Sequence[NDArray[np.int64]], settings: BlindSettings) -> BlindKey:
    """Draw the trials; rows: for each SAE on how many rows each latent fires, (d_sae,)."""
    rng, pairs = np.random.default_rng(settings.seed), settings.pairs
    chosen = []
    for one, fired in zip(facts, rows, strict=True):
        able = np.flatnonzero(fired >= settings.minimum_rows)
        if pairs > len(able):
            raise UsageError(
                f"{one.sae} has {len(able):,} latents that fire on at least {settings.minimum_rows} rows, fewer than "
                f"--pairs {pairs}."
            )
        chosen.append(rng.choice(able, pairs, replace=False).tolist())
    halves = [Trial(pair=pair, sae=sae, latent=chosen[sae][pair]) for pair in range(pairs) for sae in (0, 1)]
    first, second = facts
    return BlindKey(
        saes=(first.sae, second.sae),
        architectures=(first.architecture, second.architecture),
        weights_sha256=(first.weights_sha256, second.weights_sha256),
        seed=settings.seed,
        minimum_rows=settings.minimum_rows,
        trials=tuple(halves[i] for i in rng.permutation(len(halves))),
    )


def _fill(
    out: Path,
    folders: Sequence[Path],
    facts: Sequence[FeatureFacts],
    key: BlindKey,
    digest: str,
    listen: Listen,
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
    blind = {"trials": len(key.trials), "vocabulary": vocabularies[0], "context_size": facts[0].context_size}
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
    """Return the share of the latent's values below each value, interpolated between the edges of its quantiles."""
    edges = latent["quantile_edges"]
    ranks: list[float] = np.interp(values, edges, np.linspace(0, 1, len(edges))).round(2).tolist()
    return ranks
