"""The features folder of every SAE of a run: what each latent fires on, how strongly, and which tokens it promotes.

docs/features.md describes the files. Neither the language model nor the text is read. What only they know, texts of
tokens and effects on logits, is passed in as a `Vocabulary`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
from torch import nn

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.evaluate import Listen, Progress, check_run, ignore, load_saes, rows_of_split
from gsae.store import SPLITS, Split, Store, StoreSet
from gsae.train import weights_sha256

from .columns import decoder_columns, example_columns, firing_columns
from .features_json import FACTS, SCHEMA, FeatureFacts, read_facts, write_facts
from .firings import FiringsPass, Ints, read_firings, write_firings
from .parquet import GROUP, arrow, examples_schema, latents_schema, write_contexts, write_vocabulary, writing
from .portrait import portrait
from .settings import FeatureSettings
from .vocabulary import Vocabulary

DEFAULTS = FeatureSettings()


def check_features(run: Path, store: Store | StoreSet, names: Sequence[str] = (), split: Split = "heldout") -> str:
    """Return the site of a run's SAEs (of `names`, if given), after checking that their features can be found.

    Call it before the language model is loaded. Raises what `find_features` raises before its first pass.
    """
    arrow()
    return check_run(run, store, names, split)


def find_features(
    run: Path,
    store: Store | StoreSet,
    vocabulary: Vocabulary,
    *,
    names: Sequence[str] = (),
    split: Split = "heldout",
    settings: FeatureSettings = DEFAULTS,
    listen: Listen = ignore,
    device: str = "cpu",
) -> list[FeatureFacts]:
    """Describe every latent of a run's SAEs (of `names`, if given) on the rows of a split; return each features.json.

    Raises NotFoundError (no SAEs, none of that name, or the store lacks their site), IncompatibleError (the SAEs were
    trained from another store) and UsageError (no rows in the split, or no pyarrow).
    """
    arrow()
    saes = load_saes(run, store, names, device)
    site = rows_of_split(store, saes.input.site, split)
    searches = [
        FeatureSearch(
            name,
            run / "features" / name,
            weights_sha256(one.folder),
            FiringsPass(one.sae, site, saes.input.norm_limit, device),
            store,
            vocabulary,
            settings,
        )
        for name, one in saes.saes.items()
    ]
    return [_describe(search, listen) for search in searches]


@dataclass(frozen=True)
class FeatureSearch:
    """One SAE and its rows, the folder for what is found, and how much is kept."""

    name: str
    folder: Path
    weights_sha256: str
    firings: FiringsPass
    store: Store | StoreSet
    vocabulary: Vocabulary
    settings: FeatureSettings

    def origin(self) -> dict[str, str]:
        """Return what the firings follow from."""
        site, limit = self.firings.site, self.firings.norm_limit
        return {
            "sae": self.name,
            "weights_sha256": self.weights_sha256,
            "norm_limit": "" if limit == inf else repr(limit),
            "store_digest": self.store.digest,
            "site": site.name,
            "split": site.split,
        }

    def facts(self, rows: int) -> FeatureFacts:
        """Return the contents of features.json; rows: how many the SAE ran on."""
        sae, site, plan = self.firings.sae, self.firings.site, self.store.plan
        return FeatureFacts(
            schema=SCHEMA,
            sae=self.name,
            architecture=sae.architecture,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            weights_sha256=self.weights_sha256,
            site=site.name,
            module=site.spec.module,
            hook_name=site.spec.hook_name,
            model=plan.model.id,
            dataset=plan.dataset.id,
            store_digest=self.store.digest,
            context_size=plan.context_size,
            split=site.split,
            rows=rows,
            rows_skipped=site.rows - rows,
            contexts=int((self.store.split() == SPLITS.index(site.split)).sum()),
            **dict(self.settings),
            has_tokens=self.vocabulary.texts is not None,
            has_logits=self.vocabulary.logit_effects is not None,
        )


def _describe(search: FeatureSearch, listen: Listen) -> FeatureFacts:
    """Write the features folder of one SAE, unless a complete one was made from the same."""
    folder, total = search.folder, search.firings.site.rows
    files, rows = write_firings(
        search.firings,
        folder / "activations",
        search.origin(),
        lambda done: listen(Progress("activations", done, total, search.name)),
    )
    facts = search.facts(rows)
    if _complete(folder) == facts:
        return facts
    (folder / FACTS).unlink(missing_ok=True)  # from here on the folder is not complete
    contexts = _write_latents(search, files, rows, listen)
    size = search.store.plan.context_size
    parts = np.split(contexts, range(GROUP, len(contexts), GROUP))
    tokens = ((part, search.store.tokens_around(part * size, 0, size - 1)) for part in parts)
    write_contexts(folder / "contexts.parquet", tokens)
    (folder / "vocabulary.parquet").unlink(missing_ok=True)
    if search.vocabulary.texts is not None:
        write_vocabulary(folder / "vocabulary.parquet", search.vocabulary.texts)
    write_facts(folder, facts)
    return facts


def _complete(folder: Path) -> FeatureFacts | None:
    """Return the features.json of a folder, None where the folder is written again."""
    try:
        return read_facts(folder)
    except (NotFoundError, CorruptError, IncompatibleError):
        return None


def _write_latents(search: FeatureSearch, files: Sequence[Path], rows: int, listen: Listen) -> Ints:
    """Write latents.parquet and examples.parquet; return the contexts that have examples, ascending."""
    pa, _ = arrow()
    sae, size, settings = search.firings.sae, search.store.plan.context_size, search.settings
    effects, W_dec, seen = search.vocabulary.logit_effects, sae.params.W_dec, set[int]()
    unit = nn.functional.normalize(W_dec, dim=1)
    with (
        writing(search.folder / "latents.parquet", latents_schema()) as latents,
        writing(search.folder / "examples.parquet", examples_schema()) as examples,
    ):
        for first in range(0, sae.d_sae, GROUP):
            last = min(first + GROUP, sae.d_sae)
            portraits = [
                portrait(latent, sources, values, size, settings) if len(values) else None
                for firings in read_firings(files, first, last)
                for latent, sources, values in firings
            ]
            columns = firing_columns(portraits, first, rows, search.store)
            columns |= decoder_columns(W_dec, unit, first, last, settings, effects)
            latents.write_table(pa.table(columns, schema=latents_schema()))
            shown = example_columns(portraits, first, size)
            examples.write_table(pa.table(shown, schema=examples_schema()))
            seen.update(np.unique(shown["context"]).tolist())
            listen(Progress("latents", last, sae.d_sae, search.name))
    return np.array(sorted(seen), np.int64)
