"""`gsae features` writes what a brute-force search over the store in float64 finds, and the same bytes twice."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import CorruptError, NotFoundError, UsageError
from gsae.evaluate import Progress
from gsae.features import FeatureSettings, Vocabulary, find_features
from gsae.features.find import firings
from gsae.features.find.firings import read_firings
from gsae.features.find.portrait import portrait
from gsae.store import Store
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.saes import D_IN, D_SAE, reconstruct, training_notes, weights, write_sae
from gsae.tests.support.stores import make_store, normal_rows

SMALL = FeatureSettings(top=4, quantiles=3, samples=2, bins=7, neighbours=5, logits=3)
TOKENS = 50
ROUNDING = 2e-6  # of float32 sums whose terms are about 1
ARCHS = {"gated": 0, "relu": 1}


@pytest.fixture
def run(tmp_path: Path, tiny_store: Store) -> Path:
    for arch, seed in ARCHS.items():
        write_sae(tmp_path / "run", arch, seed, training_notes(tiny_store))
    return tmp_path / "run"


def unembedding() -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(9))


VOCABULARY = Vocabulary([f" word{token}" for token in range(TOKENS)], lambda directions: directions @ unembedding().T)


def table(run: Path, arch: str, name: str) -> list[dict[str, Any]]:
    return list(parquet.read_table(run / "features" / f"{arch}-{ARCHS[arch]}" / f"{name}.parquet").to_pylist())


def brute(store: Store, arch: str, split: Any = "heldout") -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sources and float64 features (rows, d_sae) of the rows within the norm limit."""
    site = store.site("mlp.1", split=split)
    x = site[:].double().numpy()
    kept = np.linalg.norm(x, axis=1) < training_notes(store)["norm_limit"]
    assert 0 < kept.sum() < len(kept)
    return site.sources(slice(None))[kept], reconstruct(arch, ARCHS[arch], x[kept])[0]


@pytest.mark.parametrize("split", ["heldout", "train"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_value_of_every_latent_equals_a_search_in_float64(
    run: Path, tiny_store: Store, arch: str, split: Any
) -> None:
    find_features(run, tiny_store, VOCABULARY, split=split, settings=SMALL)
    sources, features = brute(tiny_store, arch, split)
    tokens = tiny_store.tokens().reshape(-1)
    latents = table(run, arch, "latents")
    assert [row["latent"] for row in latents] == list(range(D_SAE))
    for row in latents:
        values = features[:, row["latent"]]
        above = values[values > 0]
        assert row["rows"] == len(above)
        assert row["density"] == len(above) / len(values)
        if not len(above):
            assert row["max"] is row["mean"] is row["histogram"] is row["quantile_edges"] is row["top_token"] is None
            continue
        assert row["max"] == pytest.approx(above.max(), rel=1e-5)
        assert row["mean"] == pytest.approx(above.mean(), rel=1e-5)
        edges = np.linspace(0, above.max(), SMALL.bins + 1)
        assert row["histogram"] == np.histogram(above, edges)[0].tolist()
        cuts = [len(above) * q // SMALL.quantiles for q in range(SMALL.quantiles)]
        np.testing.assert_allclose(row["quantile_edges"], np.sort(above)[[*cuts, -1]], rtol=1e-5, atol=ROUNDING)
        assert row["top_token"] == tokens[sources[np.argmax(values)]]


@pytest.mark.parametrize("arch", ARCHS)
def test_examples_are_the_strongest_contexts_and_samples_of_each_quantile(
    run: Path, tiny_store: Store, arch: str
) -> None:
    find_features(run, tiny_store, VOCABULARY, settings=SMALL)
    sources, features = brute(tiny_store, arch)
    size = tiny_store.plan.context_size
    by_latent = defaultdict(list)
    for row in table(run, arch, "examples"):
        by_latent[row["latent"]].append(row)
    for latent in range(D_SAE):
        values = features[:, latent]
        fires = values > 0
        firing = np.sort(values[fires])
        strongest = {int(c): values[sources // size == c].max() for c in np.unique(sources[fires] // size)}
        top = [row for row in by_latent[latent] if row["kind"] == "top"]
        assert [row["rank"] for row in top] == list(range(len(top)))
        assert [row["context"] for row in top] == sorted(strongest, key=lambda c: -strongest[c])[: SMALL.top]
        samples = [row for row in by_latent[latent] if row["kind"] == "sample"]
        assert len(samples) == sum(min(2, len(part)) for part in quantiles(firing))
        for row in samples:
            part = quantiles(firing)[row["quantile"]]
            assert part[0] - ROUNDING <= row["value"] <= part[-1] + ROUNDING
        assert len({(row["context"], row["position"]) for row in samples}) == len(samples)
        for row in top + samples:
            mine = fires & (sources // size == row["context"])
            order = np.argsort(sources[mine])
            assert row["positions"] == (sources[mine] % size)[order].tolist()
            np.testing.assert_allclose(row["values"], values[mine][order], rtol=1e-5, atol=ROUNDING)
            assert row["value"] == row["values"][row["positions"].index(row["position"])]


def quantiles(ordered: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [ordered[len(ordered) * q // 3 : len(ordered) * (q + 1) // 3] for q in range(3)]


def test_contexts_and_vocabulary_hold_the_tokens_of_every_example(run: Path, tiny_store: Store) -> None:
    find_features(run, tiny_store, VOCABULARY, settings=SMALL)
    contexts = table(run, "gated", "contexts")
    assert {row["context"] for row in table(run, "gated", "examples")} == {row["context"] for row in contexts}
    assert [row["context"] for row in contexts] == sorted(row["context"] for row in contexts)
    for row in contexts:
        assert row["token_ids"] == tiny_store.tokens()[row["context"]].tolist()
    assert [row["text"] for row in table(run, "gated", "vocabulary")] == VOCABULARY.texts


@pytest.mark.parametrize("arch", ARCHS)
def test_neighbours_and_logits_follow_from_the_decoder(run: Path, tiny_store: Store, arch: str) -> None:
    find_features(run, tiny_store, VOCABULARY, settings=SMALL)
    W_dec = weights(arch, ARCHS[arch])["W_dec"].double().numpy()
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines, logits = unit @ unit.T, W_dec @ unembedding().double().numpy().T
    np.fill_diagonal(cosines, -np.inf)
    for row in table(run, arch, "latents"):
        latent = row["latent"]
        assert row["neighbours"] == np.argsort(-cosines[latent])[:5].tolist()
        np.testing.assert_allclose(row["cosines"], np.sort(cosines[latent])[::-1][:5], atol=1e-6)
        assert row["promoted"] == np.argsort(-logits[latent])[:3].tolist()
        assert row["suppressed"] == np.argsort(logits[latent])[:3].tolist()
        np.testing.assert_allclose(row["suppressed_logits"], np.sort(logits[latent])[:3], rtol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_search_continues_to_the_same_bytes(
    run: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firings, "FILE_ROWS", 100)
    find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL)
    folder = run / "features" / "gated-0"
    whole = contents(folder)
    assert sum("activations" in name for name in whole) > 4
    for stage in ("activations", "latents"):
        for path in folder.rglob("*"):
            if path.is_file():
                path.unlink()

        def stop(event: Progress, stage: str = stage) -> None:
            if event.stage == stage and event.done > 300 * (stage == "activations"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL, listen=stop)
        assert not (folder / "features.json").exists()
        kept = {path: path.stat().st_ino for path in folder.glob("activations/*")}
        assert kept
        find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL)
        assert contents(folder) == whole
        assert {path: path.stat().st_ino for path in kept} == kept


def test_a_complete_folder_is_kept_and_one_of_other_weights_is_replaced(run: Path, tiny_store: Store) -> None:
    (before,) = find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL)
    folder = run / "features" / "gated-0"
    inodes = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL) == [before]
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in inodes} == inodes
    figures = table(run, "gated", "latents")
    saved = run / "saes" / "gated-0"
    for path in saved.iterdir():
        path.unlink()
    saved.rmdir()
    write_sae(run, "gated", 0, training_notes(tiny_store), scale=1.5)
    (after,) = find_features(run, tiny_store, VOCABULARY, names=["gated-0"], settings=SMALL)
    assert after.weights_sha256 != before.weights_sha256
    assert table(run, "gated", "latents") != figures


def test_ranges_of_any_size_cover_all_latents(run: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    find_features(run, tiny_store, Vocabulary(), names=["gated-0"])
    files = sorted((run / "features" / "gated-0" / "activations").iterdir())
    whole = [(latent, s.tolist(), v.tolist()) for part in read_firings(files, 0, D_SAE) for latent, s, v in part]
    assert [latent for latent, _, _ in whole] == list(range(D_SAE))
    monkeypatch.setattr(firings, "RANGE_ENTRIES", 150)
    parts = list(read_firings(files, 0, D_SAE))
    assert len(parts) > 5
    assert [(latent, s.tolist(), v.tolist()) for part in parts for latent, s, v in part] == whole
    some = [(latent, s.tolist(), v.tolist()) for part in read_firings(files, 7, 19) for latent, s, v in part]
    assert some == whole[7:19]


def test_equal_values_are_ordered_by_context_and_position() -> None:
    sources, values = np.arange(0, 60, 2), np.ones(30, np.float32)
    found = portrait(3, sources, values, 10, FeatureSettings(top=3, quantiles=2, samples=3, bins=4))
    assert found.examples.source[:3].tolist() == [0, 10, 20]
    assert found.examples.quantile.tolist() == [-1] * 3 + [0] * 3 + [1] * 3
    assert found.histogram.tolist() == [0, 0, 0, 30]
    assert found.quantile_edges.tolist() == [1, 1, 1]
    drawn = found.examples.source[3:].tolist()
    assert len(set(drawn)) == 6
    assert drawn[:3] == sorted(drawn[:3])
    assert max(drawn[:3]) < min(drawn[3:])


def test_without_the_model_there_are_neither_texts_nor_logits(run: Path, tiny_store: Store) -> None:
    found = find_features(run, tiny_store, Vocabulary(), settings=SMALL)
    assert {(facts.has_tokens, facts.has_logits) for facts in found} == {(False, False)}
    assert not list(run.glob("features/*/vocabulary.parquet"))
    assert {row["promoted"] for row in table(run, "relu", "latents")} == {None}


def test_a_row_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    def rows(n: int, d_in: int) -> NDArray[Any]:
        x = normal_rows(n, d_in)
        x[::5, 3] = np.nan
        return x

    store = make_store(tmp_path / "store", rows=rows)
    write_sae(tmp_path / "run", "gated", 0, training_notes(store) | {"norm_limit": None, "max_norm_multiple": 0.0})
    (facts,) = find_features(tmp_path / "run", store, Vocabulary(), settings=SMALL)
    x = store.site("mlp.1", split="heldout")[:].float().numpy()
    assert facts.rows_skipped == int((~np.isfinite(x).all(axis=1)).sum()) > 0
    assert facts.rows + facts.rows_skipped == len(x)


def test_what_cannot_be_found_is_refused(run: Path, tiny_store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"no SAE 'gated-7'\. It has gated-0, relu-1"):
        find_features(run, tiny_store, Vocabulary(), names=["gated-7"])
    find_features(run, tiny_store, Vocabulary(), names=["gated-0"])
    files = sorted((run / "features" / "gated-0" / "activations").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(CorruptError, match="Delete it and run"):
        list(read_firings(files, 0, D_SAE))
    files[0].unlink()
    with pytest.raises(NotFoundError, match="gsae features"):
        list(read_firings(files, 0, D_SAE))


def test_what_cannot_be_found_is_refused_before_the_language_model_is_loaded(
    run: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr("gsae.harvest.load_planned", load)
    refused(
        3, "no SAE 'gated-7'. It has gated-0, relu-1.", "features", run, "--store", tiny_store.path, "--sae", "gated-7"
    )
    other = make_store(run / "other", contexts=20).path
    refused(5, "was trained from a store with digest", "features", run, "--store", other)
    refused(5, "was trained from a store with digest", "eval", run, "--store", other)


def test_missing_pyarrow_names_the_extra(run: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"gsae\[features\]"):
        find_features(run, tiny_store, Vocabulary())
    assert not (run / "features").exists()


def test_the_command_prints_what_it_made(run: Path, tiny_store: Store) -> None:
    done = gsae("features", run, "--no-model", "--store", tiny_store.path, "--sae", "relu-1", "--json")
    assert done.returncode == 0, done.stderr
    (facts,) = json.loads(done.stdout)
    assert facts == json.loads((run / "features" / "relu-1" / "features.json").read_text())
    assert [path.name for path in (run / "features").iterdir()] == ["relu-1"]
