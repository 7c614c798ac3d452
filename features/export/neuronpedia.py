"""What an SAE's latents fire on as a folder that Neuronpedia imports: jsonl.gz in batches.

The layout is that of Neuronpedia's own exports: MODEL/SOURCE/ with a line a table row in release, model, sourceset and
source.jsonl, and below features/ and activations/ in batches. source.jsonl is written last, and an import needs it.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, IncompatibleError, UsageError
from gsae.features.find.latents_json import in_batches, read_latents, read_texts
from gsae.features.find.parquet import GROUP
from gsae.features.find.reader import public, read_facts, reading
from gsae.files import replace_file, replace_text

CREATOR = "clkht01d40000jv08hvalcvly"  # whom an instance of one's own takes imported rows to be of
NOTE = "gsae.json"
EXAMPLE = ("quantile", "rank", "context", "position", "positions", "values")
BATCH_BYTES, TOKEN_BYTES = (
    1 << 27,
    32,
)  # an import holds a batch as one jsonb value, of at most 2^28; of a token and its value
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


def to_neuronpedia(features: Path, out: Path) -> Path:
    """Write RUN/features/NAME as OUT/MODEL/SOURCE of Neuronpedia's; return that folder.

    A stopped export goes on at the first batch that is missing. Holds the contexts of all examples in memory. Raises
    NotFoundError (no features), UsageError (no texts of tokens), IncompatibleError (`out` holds something else, or the
    features are of a newer schema) and CorruptError.
    """
    facts = read_facts(features)
    if not facts["has_tokens"]:
        raise UsageError(f"{features} has no texts of tokens. Run `gsae features` with the model's tokenizer at hand.")
    tables = _tables(facts)
    source = tables["source"]
    folder = _folder(out / source["modelId"] / source["id"], facts)
    texts = read_texts(features / "vocabulary.parquet")
    contexts = _Contexts(features / "contexts.parquet", facts["context_size"])
    described = read_latents(features, example=EXAMPLE, exact=True)
    for number, latents in enumerate(in_batches(described, _latents_a_batch(facts))):
        shown = [
            _activation(latent, dict(zip(EXAMPLE, example, strict=True)), texts, contexts, facts, source)
            for latent in latents
            for example in latent["examples"]
        ]
        _write_batch(folder / "activations" / f"batch-{number}.jsonl.gz", shown)
        _write_batch(
            folder / "features" / f"batch-{number}.jsonl.gz", [_feature(row, texts, source) for row in latents]
        )
    for name, row in tables.items():  # the source last
        _replace(folder / f"{name}.jsonl", json.dumps(row) + "\n")
    return folder


def _tables(facts: Row) -> dict[str, Row]:
    """One row each of the tables that features hang on, the source last.

    A store does not know how many layers its model has, which a row has to say: as many as lead to the site.
    """
    digits = re.search(r"\d+", facts["site"])
    layer = int(digits[0]) if digits else 0
    owner, _, name = public(facts["model"]).rpartition("/")
    model, sae = _slug(name), _slug(facts["sae"])
    kind = _slug(re.sub(r"\.\d+$", "", facts["site"]))
    of = {"visibility": "PUBLIC", "creatorId": CREATOR}
    release = {"name": "gsae", "description": "Sparse autoencoders", "descriptionShort": "SAEs", "urls": []}
    set_ = {"modelId": model, "name": f"{kind}-{sae}", "releaseName": "gsae", "creatorName": "gsae"}
    source = {"modelId": model, "id": f"{layer}-{set_['name']}", "setName": set_["name"]}
    shown = {"id": model, "displayNameShort": name, "displayName": public(facts["model"]), "owner": owner or "unknown"}
    prompts = {"num_prompts": facts["contexts"], "num_tokens_in_prompt": facts["context_size"]}
    return {
        "release": release | {"creatorNameShort": "gsae", "creatorName": "gsae"} | of,
        "model": shown | {"layers": layer + 1, "neuronsPerLayer": 0, "instruct": False} | of,
        "sourceset": set_ | {"description": f"{facts['site']}, {facts['sae']}"} | of,
        "source": source | {"dataset": public(facts["dataset"])} | prompts | of,
    }


def _slug(text: str) -> str:
    """Letters, digits and dashes alone: it becomes a folder and a part of a URL."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _folder(folder: Path, facts: Row) -> Path:
    """Make the folder with a note of what it is from; raise IncompatibleError where it is from something else."""
    try:
        for name in ("features", "activations"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        note = json.dumps(facts, indent=2) + "\n"
        empty = all(path.is_dir() and not any(path.iterdir()) for path in folder.iterdir())
        if not empty and (not (folder / NOTE).exists() or (folder / NOTE).read_text(encoding="utf-8") != note):
            raise IncompatibleError(f"{folder} holds something else; choose another folder.")
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{folder} is a file, or below one; an export needs a folder of its own.") from None
    _replace(folder / NOTE, note)
    return folder


def _replace(path: Path, text: str) -> None:
    replace_text(path, text)


class _Contexts:
    """The tokens of the contexts that examples stand in."""

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


def _latents_a_batch(facts: Row) -> int:
    """Return how many latents' examples Postgres takes at a time."""
    tokens: int = (facts["top"] + facts["quantiles"] * facts["samples"]) * facts["context_size"]
    return min(GROUP, max(1, BATCH_BYTES // (TOKEN_BYTES * max(1, tokens))))


def _feature(row: Row, texts: Sequence[str | None], source: Row) -> Row:
    largest, bars = row["max"] or 0.0, row["histogram"] or []
    names = {"modelId": source["modelId"], "layer": source["id"], "index": str(row["latent"])}
    figures = {
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
    return names | kept | figures | {name: [] for name in NOT_KNOWN}


def _activation(
    latent: Row, row: Row, texts: Sequence[str | None], contexts: _Contexts, facts: Row, source: Row
) -> Row:
    tokens = contexts[row["context"]]
    values = [0.0] * len(tokens)
    for position, value in zip(row["positions"], row["values"], strict=True):
        values[position] = _exact(value)
    largest, quantile, edges = max(values), row["quantile"], latent["quantile_edges"]
    sampled = quantile is not None
    identity = [facts["weights_sha256"], facts["store_digest"], latent["latent"], quantile, row["rank"]]
    return {
        "id": "c" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24],
        "modelId": source["modelId"],
        "layer": source["id"],
        "index": str(latent["latent"]),
        "creatorId": CREATOR,
        "tokens": [texts[token] for token in tokens],
        "values": values,
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest),
        "minValue": min(values),
        "binMin": _exact(edges[quantile]) if sampled else None,
        "binMax": _exact(edges[quantile + 1]) if sampled else None,
        "binContains": 1 / facts["quantiles"] if sampled else None,
        "qualifyingTokenIndex": row["position"] if sampled else None,
        "dataIndex": str(row["context"]),
        "dataSource": public(facts["dataset"]),
        "dfaValues": [],
        "lossValues": [],
    }


def _exact(value: float) -> float:
    """The shortest of nine digits, which tell any two float32 apart."""
    return float(f"{value:.9g}")


def _write_batch(path: Path, rows: Iterable[Row]) -> None:
    if path.exists():
        return

    def write(temporary: Path) -> None:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            for row in rows:
                packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    replace_file(path, write)
