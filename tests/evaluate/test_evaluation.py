"""`evaluate` writes for each SAE of a run what brute force over the held-out rows gives, and the same bytes twice."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, UsageError
from gsae.evaluate import Edit, Progress, check_run, evaluate, read_evaluations, site_of
from gsae.evaluate.evaluation import SCORES
from gsae.store import Store, open_stores
from gsae.store.format import row_order as order
from gsae.tests.support.saes import D_IN, D_SAE, MULTIPLE, reconstruct, training_notes, write_sae
from gsae.tests.support.stores import make_store, sparse_rows

KEYS = (
    "sae architecture d_in d_sae l1_coefficient lr seed site store_digest rows rows_skipped max_norm_multiple "
    "steps diverged diverged_because stopped "
    "l0 explained_variance mse gamma gamma_centred cossim l2_ratio dead dead_rows silent dense density all_rows "
    "without_largest ce_loss_score ce_loss_score_mean ce_loss_score_all_positions kl_div_score language_model "
    "standard_errors heldout_documents per_document"
)

SPLICED = ("tokens", "clean", "spliced", "zero", "kl_spliced", "kl_zero")


@pytest.fixture
def run(tmp_path: Path, tiny_store: Store) -> Path:
    for arch, seed in (("gated", 0), ("relu", 1)):
        write_sae(tmp_path / "run", arch, seed, training_notes(tiny_store))
    return tmp_path / "run"


def evaluated(run: Path, store: Store, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """What `evaluate` returns, as the plain values of eval.json."""
    return [result.model_dump() for result in evaluate(run, store, *arguments, **options)]


def effects(tokens: Tensor, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Stand in for a language model: its site is a table of tokens, its loss the distance from another table."""
    table = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0)) / 6
    x = table[tokens]
    losses = torch.stack([(site[:, :-1] - 1.2 * x[:, :-1]).square().sum(-1) for site in (x, *(e(x) for e in edits))])
    return losses, (losses - losses[:1]).abs()


def heldout_rows(store: Store) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The rows as they were made, and the context of each, without reading them from the store."""
    tokens, plan = store.tokens(), store.plan
    rows = sparse_rows(tokens.size, D_IN).astype(np.float64).reshape(*tokens.shape, D_IN)
    stored = order.row_mask(tokens, plan.tokenizer.excluded_ids, ()) & (store.split() == 1)[:, None]
    return rows[stored], np.nonzero(stored)[0]


def test_eval_json_holds_what_brute_force_gives(run: Path, tiny_store: Store) -> None:
    results = evaluated(run, tiny_store, None, None)
    x, context = heldout_rows(tiny_store)
    keep = np.linalg.norm(x, axis=1) < training_notes(tiny_store)["norm_limit"]
    assert 100 < keep.sum() < len(x) - 100
    contexts = np.flatnonzero(tiny_store.split())  # each is a document
    assert [result["sae"] for result in results] == ["gated-0", "relu-1"]
    for result, (arch, seed) in zip(results, (("gated", 0), ("relu", 1)), strict=True):
        f, y = reconstruct(arch, seed, x)
        mu = x[keep].mean(0)
        sse, sst = ((x - y) ** 2).sum(1), ((x - mu) ** 2).sum(1)
        assert result["rows"] == keep.sum()
        assert result["rows_skipped"] == (~keep).sum()
        # A pre-activation of nearly 0 may have another sign in float32.
        assert result["l0"] == pytest.approx((f[keep] > 0).sum() / keep.sum(), abs=3 / keep.sum())
        assert result["explained_variance"] == pytest.approx(1 - sse[keep].sum() / sst[keep].sum(), rel=1e-6)
        assert result["mse"] == pytest.approx(sse[keep].mean(), rel=1e-6)
        assert result["silent"] == (f[keep] == 0).all(0).mean()
        assert result["dense"] == ((f[keep] > 0).mean(0) > 0.1).mean()
        assert result["dead"] == 0.25
        assert result["all_rows"]["rows"] == len(x)
        assert result["all_rows"]["mse"] == pytest.approx(sse.mean(), rel=1e-6)
        sums = result["per_document"]
        assert result["heldout_documents"] == len(contexts)
        assert sums["rows"] == [int((keep & (context == c)).sum()) for c in contexts]
        assert sums["sse"] == pytest.approx([sse[keep & (context == c)].sum() for c in contexts], rel=1e-6)
        assert sums["sst"] == pytest.approx([sst[keep & (context == c)].sum() for c in contexts], rel=1e-6)
        assert sum(sums["l0"]) / result["rows"] == result["l0"]
        below = np.argsort(np.linalg.norm(x, axis=1))[: len(x) - len(x) // 1000]
        rest = result["without_largest"]
        assert rest["rows"] == len(below) < len(x)
        assert rest["mse"] == pytest.approx(sse[below].mean(), rel=1e-6)
        about = ((x[below] - x[below].mean(0)) ** 2).sum()
        assert rest["explained_variance"] == pytest.approx(1 - sse[below].sum() / about, rel=1e-6)
        assert sum(result["density"]["latents"]) + result["density"]["silent"] == D_SAE


def test_parts_of_a_document_are_one_draw(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", contexts=84, parts=3, window_rows=2048, rows=sparse_rows)
    write_sae(tmp_path / "run", "gated", 0, training_notes(store))
    (found,) = evaluated(tmp_path / "run", store, effects, None)
    contexts = np.flatnonzero(store.split())
    assert found["heldout_documents"] == found["language_model"]["documents"] == len(contexts) / 3 == 4
    assert found["language_model"]["contexts"] == len(contexts) == 12
    x, context = heldout_rows(store)
    keep = np.linalg.norm(x, axis=1) < training_notes(store)["norm_limit"]
    _, y = reconstruct("gated", 0, x)
    sse = ((x - y) ** 2).sum(1)
    mine = [keep & (context // 3 == document) for document in np.unique(contexts // 3)]
    sums = found["per_document"]
    assert sums["rows"] == [int(rows.sum()) for rows in mine]
    assert sums["sse"] == pytest.approx([sse[rows].sum() for rows in mine], rel=1e-6)
    # The error is over 4 documents, not 12 contexts (Cochran 1977, 2.46).
    off = np.array(sums["sse"]) - found["mse"] * np.array(sums["rows"])
    assert found["standard_errors"]["mse"] == pytest.approx(np.sqrt(4 / 3 * (off**2).sum()) / found["rows"], rel=1e-9)
    for key, of in (("ce_loss_score", ("spliced", "clean", "zero")), ("kl_div_score", ("kl_spliced", None, "kl_zero"))):
        lost, clean, zero = (np.array(sums[name]) if name else np.zeros(4) for name in of)
        assert found[key] == pytest.approx(1 - (lost - clean).sum() / (zero - clean).sum())


def test_many_documents_leave_a_bounded_number_of_sums(
    run: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(run, tiny_store, effects, None)
    monkeypatch.setattr("gsae.evaluate.per_document.MAX_SUMS", 7)
    monkeypatch.setattr(
        "gsae.evaluate.spliced_documents.GROUP_TOKENS", 100
    )  # and other groups of contexts for the model
    for few, many in zip(evaluated(run, tiny_store, effects, None), whole, strict=True):
        for key, column in few["per_document"].items():
            assert len(column) == 7 < len(many["per_document"][key])
            assert sum(column) == pytest.approx(sum(many["per_document"][key]))
        assert few["standard_errors"] == pytest.approx(many["standard_errors"], rel=1e-5)


def test_stores_of_two_context_sizes_are_refused(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / str(n), contexts=40, context_size=n) for n in (16, 32)]
    both = open_stores([store.path for store in stores])
    write_sae(tmp_path / "run", "relu", 0, training_notes(stores[0], store_digest=both.digest))
    assert "one context size" in assert_refused(tmp_path / "run", both, IncompatibleError)


def test_the_files_are_what_is_returned_and_the_same_bytes_twice(run: Path, tiny_store: Store) -> None:
    results = evaluated(run, tiny_store, effects, 4)
    files = sorted(run.glob("saes/*/eval.json"))
    first = [file.read_bytes() for file in files]
    assert [json.loads(text) for text in first] == results
    assert [result.model_dump() for result in read_evaluations(run)] == results
    assert all(list(result) == KEYS.split() for result in results)
    evaluate(run, tiny_store, effects, 4)
    assert [file.read_bytes() for file in files] == first
    assert {path.name for path in run.glob("saes/*/*")} == {"cfg.json", "eval.json", "sae_weights.safetensors"}


def test_without_a_language_model_only_what_needs_it_is_missing(run: Path, tiny_store: Store) -> None:
    for bare, whole in zip(
        evaluated(run, tiny_store, None, None), evaluated(run, tiny_store, effects, None), strict=True
    ):
        missing = {key for key in whole if bare[key] != whole[key]}
        assert missing == {*SCORES, "language_model", "standard_errors", "per_document"}
        assert {bare[key] for key in missing - {"per_document", "standard_errors"}} == {None}
        assert set(bare["standard_errors"]) == {"l0", "explained_variance", "mse", "gamma"}
        assert set(whole["standard_errors"]) - set(bare["standard_errors"]) > set(SCORES)
        sums = bare["per_document"]
        assert {key for key in sums if sums[key] is None} == {*SPLICED, "mean"}
        assert whole["language_model"]["contexts"] == len(sums["rows"])


def test_a_limited_number_of_contexts_is_a_subset_of_all(run: Path, tiny_store: Store) -> None:
    some, every = evaluated(run, tiny_store, effects, 3)[0], evaluated(run, tiny_store, effects, None)[0]
    assert some["language_model"]["contexts"] == 3
    ran = np.flatnonzero(some["per_document"]["tokens"])
    laid = order.permutation(len(some["per_document"]["rows"]), tiny_store.plan.seed, order.Stream.HELDOUT_CONTEXTS)
    assert ran.tolist() == sorted(laid[:3].tolist())
    for key in (*SPLICED, "mean"):
        column, whole = np.array(some["per_document"][key]), np.array(every["per_document"][key])
        assert column[ran] == pytest.approx(whole[ran], rel=1e-6)
        assert column.sum() == column[ran].sum()
    totals = {key: sum(some["per_document"][key]) for key in (*SPLICED, "mean")}
    lost = (totals["spliced"] - totals["clean"]) / (totals["zero"] - totals["clean"])
    assert some["ce_loss_score"] == pytest.approx(1 - lost)
    lost = (totals["spliced"] - totals["clean"]) / (totals["mean"] - totals["clean"])
    assert some["ce_loss_score_mean"] == pytest.approx(1 - lost)
    for key, name in (("clean", "without_sae"), ("spliced", "with_sae"), ("zero", "with_ablation")):
        assert some["language_model"][f"ce_loss_{name}"] == pytest.approx(totals[key] / totals["tokens"])


def test_mean_ablation_puts_in_the_mean_of_the_kept_train_rows(run: Path, tiny_store: Store) -> None:
    seen: list[Tensor] = []

    def listening(tokens: Tensor, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
        seen.extend(edit(torch.full((*tokens.shape, D_IN), 1e-3)) for edit in edits)
        return effects(tokens, edits)

    evaluate(run, tiny_store, listening, 1)
    mean = tiny_store.site("mlp.1").moments.within(MULTIPLE).mean
    assert np.allclose(seen[1][0][1:].median(0).values, mean, atol=1e-6)
    assert torch.equal(seen[1][0][0], torch.full((D_IN,), 1e-3))  # BOS keeps its own


def test_progress_is_reported_to_the_end(run: Path, tiny_store: Store) -> None:
    events: list[Progress] = []
    evaluate(run, tiny_store, effects, 5, events.append)
    last = {event.stage: event for event in events}
    rows = tiny_store.site("mlp.1", split="heldout").rows
    assert list(last) == ["norms", "rows", "contexts"]
    assert last["norms"] == Progress("norms", rows, rows)
    assert last["rows"] == Progress("rows", rows, rows)
    assert last["contexts"] == Progress("contexts", 5, 5)


def test_an_sae_that_diverged_has_null_values(run: Path, tiny_store: Store) -> None:
    write_sae(run, "gated", 7, training_notes(tiny_store), scale=float("nan"))
    evaluate(run, tiny_store, effects, 2)
    found = json.loads((run / "saes/gated-7/eval.json").read_text())
    assert found["mse"] is None
    assert found["ce_loss_score"] is None
    assert found["per_document"]["sse"] is None
    assert found["per_document"]["clean"] is not None


def test_the_site_of_a_run_is_known_before_its_model_is_loaded(run: Path, tiny_store: Store) -> None:
    assert site_of(run) == check_run(run, tiny_store) == "mlp.1"


def assert_refused(run: Path, store: Store, kind: type[GsaeError], contexts: int | None = None) -> str:
    """Assert that an evaluation is refused, and before that a check of the run; return the message."""
    with pytest.raises(kind) as caught:
        evaluate(run, store, None, contexts)
    assert not list(run.glob("saes/*/eval.json"))
    if contexts is None:
        with pytest.raises(kind, match=re.escape(str(caught.value))):
            check_run(run, store)
    return str(caught.value)


def test_a_run_without_saes_says_to_train(tmp_path: Path, tiny_store: Store) -> None:
    assert "gsae train" in assert_refused(tmp_path, tiny_store, NotFoundError)


def test_a_store_of_another_digest_is_refused_naming_both(run: Path, tiny_store: Store) -> None:
    write_sae(run, "relu", 9, training_notes(tiny_store, store_digest="ab" * 32))
    message = assert_refused(run, tiny_store, IncompatibleError)
    assert "ab" * 32 in message
    assert tiny_store.digest in message


def test_a_site_that_the_store_lacks_is_refused(tmp_path: Path, tiny_store: Store) -> None:
    write_sae(tmp_path, "relu", 0, training_notes(tiny_store, site="mlp.40"))
    assert "It has: mlp.1" in assert_refused(tmp_path, tiny_store, NotFoundError)


def test_saes_of_several_norm_limits_are_refused(run: Path, tiny_store: Store) -> None:
    write_sae(run, "relu", 9, training_notes(tiny_store, max_norm_multiple=0.0, norm_limit=None))
    assert "relu-9" in assert_refused(run, tiny_store, IncompatibleError)


def test_an_sae_that_was_not_trained_here_is_refused(run: Path, tiny_store: Store) -> None:
    write_sae(run, "relu", 9, {})
    assert "metadata.gsae.site is missing" in assert_refused(run, tiny_store, IncompatibleError)


def test_no_contexts_to_run_are_refused(run: Path, tiny_store: Store) -> None:
    assert "contexts is 0" in assert_refused(run, tiny_store, UsageError, contexts=0)


def test_a_store_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", contexts=60, heldout_rows=0)
    write_sae(tmp_path / "run", "relu", 0, training_notes(store))
    assert "no held-out rows" in assert_refused(tmp_path / "run", store, UsageError)


def test_no_norm_limit_keeps_every_row(tmp_path: Path, tiny_store: Store) -> None:
    write_sae(tmp_path, "relu", 0, training_notes(tiny_store, max_norm_multiple=0.0, norm_limit=None))
    (result,) = evaluated(tmp_path, tiny_store, None, None)
    assert result["rows_skipped"] == 0
    assert result["rows"] == tiny_store.site("mlp.1", split="heldout").rows
    assert {key: result[key] for key in result["all_rows"]} == result["all_rows"]
