"""What an SAE's latents fire on, as a folder that Neuronpedia imports.

The layout is that of Neuronpedia's own exports: MODEL/SOURCE/ with release.jsonl, model.jsonl, sourceset.jsonl and
source.jsonl, one line for each row of a table, and batches of rows below features/ and activations/ as jsonl.gz.
source.jsonl is written last, because an import needs it.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, UsageError
from gsae.evaluate import Listen, public_name
from gsae.features.find.features_json import FeatureFacts, read_facts
from gsae.features.find.latents_json import in_batches, read_latents, read_texts
from gsae.features.find.parquet import GROUP
from gsae.features.find.reader import reading
from gsae.files import replace_text, replacing

from .folder import make_export_folder, not_of_this_export
from .source import ExportSource

CREATOR = "clkht01d40000jv08hvalcvly"  # the user that a self-hosted instance gives imported rows to
NOTE = "gsae.json"
EXAMPLE = ("quantile", "rank", "context", "position", "positions", "values")
BATCH_BYTES = 1 << 27  # an import holds a batch as one jsonb value, of at most 2^28
TOKEN_BYTES = 32  # of a token and its value
NOT_KNOWN = (  # columns of a feature that need the weights, a second SAE or all logits
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class _Shown:
    """What all rows of an export refer to. source: the row of the source table. texts: of every token id."""

    facts: FeatureFacts
    source: Row
    texts: Sequence[str | None]
    contexts: "_Contexts"


def export(source: ExportSource, out: Path, listen: Listen) -> Path:
    """Export an SAE's features below the folder `out`; return the folder of its source."""
    return to_neuronpedia(source.features, out)


def to_neuronpedia(features: Path, out: Path) -> Path:
    """Write RUN/features/NAME as OUT/MODEL/SOURCE of Neuronpedia's; return that folder.

    A stopped export continues with the first batch that is missing. The contexts of all examples are held in memory.
    Raises NotFoundError (no features), UsageError (no texts of tokens), IncompatibleError (`out` holds something else,
    or the features are of a newer schema) and CorruptError.
    """
    facts = read_facts(features)
    if not facts.has_tokens:
        raise UsageError(f"{features} has no texts of tokens. Run `gsae features` with the model's tokenizer at hand.")
    tables = _tables(facts)
    source = tables["source"]
    folder = _folder(out / source["modelId"] / source["id"], facts)
    contexts = _Contexts(features / "contexts.parquet", facts.context_size)
    shown = _Shown(facts, source, read_texts(features / "vocabulary.parquet"), contexts)
    described = read_latents(features, example=EXAMPLE, exact=True)
    for number, latents in enumerate(in_batches(described, _latents_a_batch(facts))):
        activations = [
            _activation(shown, latent, dict(zip(EXAMPLE, example, strict=True)))
            for latent in latents
            for example in latent["examples"]
        ]
        _write_batch(folder / "activations" / f"batch-{number}.jsonl.gz", activations)
        _write_batch(folder / "features" / f"batch-{number}.jsonl.gz", [_feature(shown, row) for row in latents])
    for name, row in tables.items():  # the source last
        replace_text(folder / f"{name}.jsonl", json.dumps(row) + "\n")
    return folder


def _tables(facts: FeatureFacts) -> dict[str, Row]:
    """Return one row for each of the tables that features refer to, the source last.

    A row has to say how many layers the model has, which a store does not know: it says as many as lead to the site.
    """
    digits = re.search(r"\d+", facts.site)
    layer = int(digits[0]) if digits else 0
    owner, _, name = public_name(facts.model).rpartition("/")
    model, sae = _slug(name), _slug(facts.sae)
    kind = _slug(re.sub(r"\.\d+$", "", facts.site))
    of = {"visibility": "PUBLIC", "creatorId": CREATOR}
    release = {"name": "gsae", "description": "Sparse autoencoders", "descriptionShort": "SAEs", "urls": []}
    set_ = {"modelId": model, "name": f"{kind}-{sae}", "releaseName": "gsae", "creatorName": "gsae"}
    source = {"modelId": model, "id": f"{layer}-{set_['name']}", "setName": set_["name"]}
    public = public_name(facts.model)
    names = {"id": model, "displayNameShort": name, "displayName": public, "owner": owner or "unknown"}
    prompts = {"num_prompts": facts.contexts, "num_tokens_in_prompt": facts.context_size}
    return {
        "release": release | {"creatorNameShort": "gsae", "creatorName": "gsae"} | of,
        "model": names | {"layers": layer + 1, "neuronsPerLayer": 0, "instruct": False} | of,
        "sourceset": set_ | {"description": f"{facts.site}, {facts.sae}"} | of,
        "source": source | {"dataset": public_name(facts.dataset)} | prompts | of,
    }


def _slug(text: str) -> str:
    """Return a text with only letters, digits and dashes, for a folder's name and a part of a URL."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _folder(folder: Path, facts: FeatureFacts) -> Path:
    """Make the folder, with a note of what it is made from; refuse one that was made from something else."""
    for name in ("features", "activations"):
        make_export_folder(folder / name)
    note = json.dumps(facts.values(), indent=2) + "\n"
    empty = all(path.is_dir() and not any(path.iterdir()) for path in folder.iterdir())
    if not empty and (not (folder / NOTE).exists() or (folder / NOTE).read_text(encoding="utf-8") != note):
        raise not_of_this_export(folder)
    replace_text(folder / NOTE, note)
    return folder


class _Contexts:
    """The tokens of the contexts that have examples."""

    def __init__(self, path: Path, context_size: int) -> None:
        with reading(path) as contexts:
            table = contexts.read()
        self._numbers: NDArray[np.int64] = table["context"].to_numpy()
        self._tokens = table["token_ids"].combine_chunks().flatten().to_numpy().reshape(-1, context_size)

    def __getitem__(self, context: int) -> list[int]:
        at = int(np.searchsorted(self._numbers, context))
        if at == len(self._numbers) or self._numbers[at] != context:
            raise CorruptError(f"contexts.parquet lacks context {context}. Run `gsae features` again.")
        return list(self._tokens[at].tolist())


def _latents_a_batch(facts: FeatureFacts) -> int:
    """Return for how many latents Postgres takes the examples at a time."""
    tokens = (facts.top + facts.quantiles * facts.samples) * facts.context_size
    return min(GROUP, max(1, BATCH_BYTES // (TOKEN_BYTES * max(1, tokens))))


def _feature(shown: _Shown, row: Row) -> Row:
    """Return the row of a latent."""
    source, texts = shown.source, shown.texts
    largest, bars = row["max"] or 0.0, row["histogram"] or []
    names = {"modelId": source["modelId"], "layer": source["id"], "index": str(row["latent"])}
    values = {
        "maxActApprox": _exact(largest),
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_heights": bars,
        "freq_hist_data_bar_values": [_exact(largest * (i + 0.5) / len(bars)) for i in range(len(bars))],
        "pos_str": [texts[token] for token in row["promoted"] or []],
        "pos_values": [_exact(value) for value in row["promoted_logits"] or []],
        "neg_str": [texts[token] for token in row["suppressed"] or []],
        "neg_values": [_exact(value) for value in row["suppressed_logits"] or []],
        "topkCosSimIndices": row["neighbours"],
        "topkCosSimValues": [_exact(value) for value in row["cosines"]],
    }
    kept = {"sourceSetName": source["setName"], "creatorId": CREATOR, "hasVector": False}
    return names | kept | values | {name: [] for name in NOT_KNOWN}


def _activation(shown: _Shown, latent: Row, row: Row) -> Row:
    """Return the row of one example of a latent, with the tokens and values of its whole context."""
    facts, source = shown.facts, shown.source
    tokens = shown.contexts[row["context"]]
    values = [0.0] * len(tokens)
    for position, value in zip(row["positions"], row["values"], strict=True):
        values[position] = _exact(value)
    largest, quantile, edges = max(values), row["quantile"], latent["quantile_edges"]
    sampled = quantile is not None
    identity = [facts.weights_sha256, facts.store_digest, latent["latent"], quantile, row["rank"]]
    return {
        "id": "c" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24],
        "modelId": source["modelId"],
        "layer": source["id"],
        "index": str(latent["latent"]),
        "creatorId": CREATOR,
        "tokens": [shown.texts[token] for token in tokens],
        "values": values,
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest),
        "minValue": min(values),
        "binMin": _exact(edges[quantile]) if sampled else None,
        "binMax": _exact(edges[quantile + 1]) if sampled else None,
        "binContains": 1 / facts.quantiles if sampled else None,
        "qualifyingTokenIndex": row["position"] if sampled else None,
        "dataIndex": str(row["context"]),
        "dataSource": public_name(facts.dataset),
        "dfaValues": [],
        "lossValues": [],
    }


def _exact(value: float) -> float:
    """Return a float32 rounded to nine digits, as many as tell any two apart."""
    return float(f"{value:.9g}")


def _write_batch(path: Path, rows: Iterable[Row]) -> None:
    """Write a batch, unless it is there already."""
    if not path.exists():
        with (
            replacing(path) as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,  # no name and time: the same rows give the same bytes
        ):
            for row in rows:
                packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
