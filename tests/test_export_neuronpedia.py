"""What is exported for Neuronpedia: a row for every latent and example, with the texts and features of the store."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from gsae.evaluate import Words, find_features, to_neuronpedia
from gsae.store import IncompatibleError, Store, UsageError
from gsae.tests.command import gsae
from gsae.tests.test_evaluation import D_SAE, noted, write_sae
from gsae.tests.test_features import SMALL, WORDS


@pytest.fixture
def features(tmp_path: Path, tiny_store: Store) -> Path:
    write_sae(tmp_path / "run", "gated", 0, noted(tiny_store))
    find_features(tmp_path / "run", tiny_store, WORDS, kept=SMALL)
    return tmp_path / "run" / "features" / "gated-0"


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_every_latent_and_every_example_has_its_row(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    folder = to_neuronpedia(features, tmp_path / "out")
    (source,) = lines(folder / "source.jsonl")
    assert folder == tmp_path / "out" / source["modelId"] / source["id"]
    (sourceset,) = lines(folder / "sourceset.jsonl")
    assert source["setName"] == sourceset["name"]
    latents = parquet.read_table(features / "latents.parquet").to_pylist()
    rows = lines(folder / "features" / "batch-0.jsonl.gz")
    assert [row["index"] for row in rows] == [str(latent) for latent in range(D_SAE)]
    for row, latent in zip(rows, latents, strict=True):
        assert (row["modelId"], row["layer"]) == (source["modelId"], source["id"])
        assert row["frac_nonzero"] == latent["density"]
        assert row["maxActApprox"] == pytest.approx(latent["max"] or 0, rel=1e-8)
        assert row["freq_hist_data_bar_heights"] == (latent["histogram"] or [])
        assert row["pos_str"] == [WORDS.texts[token] for token in latent["promoted"]]
        assert row["topkCosSimIndices"] == latent["neighbours"]
    examples = parquet.read_table(features / "examples.parquet").to_pylist()
    shown = lines(folder / "activations" / "batch-0.jsonl.gz")
    assert len({row["id"] for row in shown}) == len(shown) == len(examples)
    for row, example in zip(shown, examples, strict=True):
        tokens = tiny_store.tokens()[example["context"]]
        assert row["index"] == str(example["latent"])
        assert row["tokens"] == [WORDS.texts[token] for token in tokens]
        above = {position: value for position, value in enumerate(row["values"]) if value}
        assert list(above) == example["positions"]
        assert list(above.values()) == pytest.approx(example["values"], rel=1e-8)
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert row["qualifyingTokenIndex"] == (example["position"] if example["kind"] == "sample" else None)


def test_the_same_export_writes_the_same_bytes_and_another_is_refused(features: Path, tmp_path: Path) -> None:
    folders = [to_neuronpedia(features, tmp_path / name) for name in ("one", "two")]
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert contents[0] == contents[1]
    (folders[0] / "source.jsonl").unlink()
    to_neuronpedia(features, tmp_path / "one")
    assert (folders[0] / "source.jsonl").read_bytes() == contents[1][Path("source.jsonl")]
    (folders[0] / "gsae.json").write_text("{}")
    with pytest.raises(IncompatibleError, match="something else"):
        to_neuronpedia(features, tmp_path / "one")


def test_without_texts_there_is_nothing_to_show(features: Path, tiny_store: Store, tmp_path: Path) -> None:
    run = features.parent.parent
    find_features(run, tiny_store, Words(), kept=SMALL)
    with pytest.raises(UsageError, match="tokenizer at hand"):
        to_neuronpedia(features, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it(features: Path, tmp_path: Path) -> None:
    done = gsae("export", features.parent.parent / "gated-0", "--format", "neuronpedia", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "source.jsonl").exists()
