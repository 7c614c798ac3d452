"""The harvest: rows are the bits of the model, also after kills; bad input loses nothing."""

import itertools
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, SpaceError, UsageError
from gsae.harvest import BatchDone, BlockTokenised, Finished, HarvestConfig, harvest
from gsae.harvest.model.model_files import ModelFiles
from gsae.harvest.row_mover import HostCopier
from gsae.store import Store, open_store, open_stores, verify
from gsae.store.format.json_files import parse
from gsae.store.write import window_writer
from gsae.tests.support.children import files, finish, killed_at_random, load_batch_sensitive, slow_harvest

pytestmark = pytest.mark.slow

SITES = ("resid.1", "mlp.0", "attn.1")


def config(model: Path | str, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dataset": "builtin:pydoc",
        "sites": SITES,
        "rows": 6000,
        "context_size": 64,
        "heldout": 0.1,
        "window_rows": 512,
        "batch_size": 5,
    }
    return HarvestConfig(**(settings | changed))


@pytest.fixture(scope="module")
def harvested(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out: Path = tmp_path_factory.mktemp("harvest") / "store"
    return harvest(config(tiny_llama), out)


@pytest.mark.slow
def test_a_harvest_that_skips_the_documents_of_another_continues_it(tiny_llama: Path, tmp_path: Path) -> None:
    take = {"rows": None, "window_rows": 4096, "sites": ("mlp.0",)}
    whole, first, second = (
        harvest(config(tiny_llama, **take, **part), tmp_path / str(number))
        for number, part in enumerate([{}, {"max_documents": 30}, {"skip_documents": 30}])
    )
    assert whole is not None
    assert first is not None
    assert second is not None
    found = {name: np.concatenate([s.documents()[name] for s in (first, second)]) for name in ("id", "split")}
    mine = np.argsort(found["id"])
    every = np.argsort(whole.documents()["id"])
    assert all(np.array_equal(found[name][mine], whole.documents()[name][every]) for name in found)
    assert first.plan.dataset.max_documents == 30
    assert "skip_documents" not in whole.plan.dataset.model_dump()
    with pytest.raises(IncompatibleError, match=r"dataset\.max_documents was 30, now None"):
        harvest(config(tiny_llama, **take), tmp_path / "1")
    with pytest.raises(UsageError, match="gives no train rows"):
        harvest(config(tiny_llama, **take, skip_documents=10**6), tmp_path / "none")
    both = open_stores([first.path, second.path])
    assert both.site("mlp.0").rows == first.plan.rows + second.plan.rows


def test_the_time_in_which_a_batch_is_gathered_counts_as_waiting(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = HostCopier.stage

    def slowly(*given: Any) -> torch.Tensor:
        time.sleep(0.02)
        return staged(*given)

    monkeypatch.setattr(HostCopier, "stage", slowly)
    events: list[Any] = []
    harvest(config(tiny_llama, rows=1000, device="cpu"), tmp_path / "store", events.append)
    running = [e for e in events if isinstance(e, BatchDone)]
    batches = len(running) - 1  # the last event has no batch
    assert running[-1].seconds - running[-1].busy >= batches * 2 * 0.02


def test_a_harvest_without_a_stop_reads_no_record_at_its_end(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harvested: Store
) -> None:
    """Reading a record of a large model takes about a twentieth of the time that a GPU needs for its window."""
    read: list[str] = []

    def parsed(kind: type[Any], data: bytes, where: str) -> Any:
        read.append(kind.__name__)
        return parse(kind, data, where)

    monkeypatch.setattr(window_writer, "parse", parsed)
    harvest(config(tiny_llama), tmp_path / "store")
    assert "Record" not in read
    assert files(tmp_path / "store") == files(harvested.path)


def independent_rows(model: Path, tokens: np.ndarray, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every site's activations (contexts, context_size, d) of the full model with plain hooks, no early stop."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    found: dict[str, torch.Tensor] = {}
    layers = lm.model.layers
    layers[1].register_forward_hook(lambda m, a, out: found.update({"resid.1": out}))
    layers[0].mlp.register_forward_hook(lambda m, a, out: found.update({"mlp.0": out}))
    layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: found.update({"attn.1": a[0]}))
    with torch.no_grad():
        lm(torch.from_numpy(tokens).long())
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_the_bits_of_an_independent_forward_pass(harvested: Store, tiny_llama: Path, split: Any) -> None:
    tokens = harvested.tokens()
    expected = independent_rows(tiny_llama, tokens, torch.bfloat16)
    for name in SITES:
        for source, rows in harvested.site(name, split).in_order():
            same = expected[name].reshape(-1, rows.shape[1])[torch.from_numpy(source)]
            assert torch.equal(rows.view(torch.int16), same.view(torch.int16))


def test_rows_are_ordinary_tokens_each_once_and_as_many_as_asked(harvested: Store) -> None:
    tokens, split = harvested.tokens(), harvested.split()
    seen: list[np.ndarray] = []
    for number, name in enumerate(("train", "heldout")):
        source = np.concatenate([s for s, _ in harvested.site("mlp.0", name).in_order()])  # type: ignore[arg-type]
        assert len(np.unique(source)) == len(source) == harvested.site("mlp.0", name).rows  # type: ignore[arg-type]
        assert not np.isin(tokens.ravel()[source], harvested.plan.tokenizer.excluded_ids).any()
        assert (split[source // harvested.plan.context_size] == number).all()
        seen.append(source)
    assert len(seen[0]) == 6000
    documents = harvested.documents()
    of_row = [np.searchsorted(documents["start"], s, side="right") - 1 for s in seen]
    assert not set(documents["id"][of_row[0]]) & set(documents["id"][of_row[1]])
    assert len(seen[1]) > 0


def test_a_deep_verification_finds_nothing_and_the_folder_holds_only_the_store(harvested: Store) -> None:
    assert verify(harvested, deep=True) == []
    listed = {"manifest.json", *(f.path for f in harvested.manifest.files)}
    for window in harvested.manifest.windows:
        listed |= {window.record.path, *(a.file.path for a in window.arrays)}
    assert set(files(harvested.path)) == listed
    assert "/" + "tmp" not in (harvested.path / "plan.json").read_text()


def test_the_same_command_again_does_nothing_and_says_so(harvested: Store, tiny_llama: Path) -> None:
    before = files(harvested.path)
    events: list[Any] = []
    harvest(config(tiny_llama), harvested.path, events.append, load=lambda c: pytest.fail("the model was loaded"))
    assert events == [Finished(0)]
    assert files(harvested.path) == before


def test_events_count_every_row_once(tiny_llama: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    harvest(config(tiny_llama, rows=900, sites=("mlp.0",)), tmp_path / "s", events.append)
    running = [e for e in events if isinstance(e, BatchDone)]
    assert [e.rows for e in running] == sorted(e.rows for e in running)
    assert running[-1].rows == running[-1].total > 900
    assert any(isinstance(e, BlockTokenised) for e in events)


@pytest.mark.kill
@pytest.mark.parametrize("batch_sensitive", [False, True])
def test_a_harvest_killed_at_random_moments_ends_in_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, batch_sensitive: bool
) -> None:
    asked = config(tiny_llama, rows=4000, window_rows=256, sites=("mlp.0", "attn.1"))
    finish(slow_harvest, asked, tmp_path / "undisturbed", batch_sensitive)
    undisturbed = files(tmp_path / "undisturbed")
    out = tmp_path / "killed"
    arguments = (asked, out, batch_sensitive)
    assert killed_at_random(slow_harvest, arguments, out, len(undisturbed), kills=6, seed=batch_sensitive) >= 5
    assert files(out) == undisturbed


def test_the_output_of_the_batch_sensitive_model_depends_on_the_batch(tiny_llama: Path, tmp_path: Path) -> None:
    """Without this the test above could not fail: other batches must give other bytes."""
    ours = [
        harvest(config(tiny_llama, rows=600, batch_size=size), tmp_path / str(size), load=load_batch_sensitive)
        for size in (4, 5)
    ]
    rows = [dict(zip(*map(list, (s, x)), strict=True)) for s, x in (next(o.site("mlp.0").in_order()) for o in ours)]
    assert any(not torch.equal(rows[0][key], rows[1][key]) for key in rows[0])


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"seed": 1}, IncompatibleError, r"other settings: seed was 0, now 1"),
        ({"sites": ("mlp.0",)}, IncompatibleError, r"begun with other settings: sites was"),
        ({"dtype": "float16"}, IncompatibleError, r"model.dtype was 'bfloat16', now 'float16'"),
        ({"context_size": 32}, IncompatibleError, r"contexts.context_size was 64, now 32"),
        ({"rows": 7000}, IncompatibleError, r"requested_rows was 6000, now 7000"),
    ],
)
def test_a_setting_that_differs_from_the_stores_is_named_and_refused(
    harvested: Store, tiny_llama: Path, changed: dict[str, Any], error: type[GsaeError], said: str
) -> None:
    before = files(harvested.path)
    with pytest.raises(error, match=said):
        harvest(config(tiny_llama, **changed), harvested.path)
    assert files(harvested.path) == before


def test_a_store_of_other_hardware_is_continued_only_with_any_hardware(
    harvested: Store, tiny_llama: Path, tmp_path: Path
) -> None:
    """The plan on disk is changed as another machine would have written it."""
    from gsae.store.write import window_writer as writer

    hardware = harvested.plan.model.model_copy(update={"accelerator": "NVIDIA H100"})
    plan = harvested.plan.model_copy(update={"model": hardware})
    for name, data in files(harvested.path).items():
        if name.startswith(("contexts/", "documents/")) and not name.endswith("zarr.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    writer.write_plan(tmp_path, plan)
    with pytest.raises(IncompatibleError, match=r"accelerator was 'NVIDIA H100', now 'cpu .*--any-hardware"):
        harvest(config(tiny_llama), tmp_path)
    assert harvest(config(tiny_llama, any_hardware=True), tmp_path).plan == plan


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"model": "builtin:nothing"}, NotFoundError, "builtin:nothing"),
        ({"model": "/nowhere/at/all"}, NotFoundError, "no such local path"),
        ({"sites": ("mlp.7",)}, UsageError, "this model has layers 0 to 2"),
        ({"sites": ("mpl.1",)}, UsageError, "is not a site"),
        ({"dataset": "builtin:nothing"}, NotFoundError, "A text is one of: builtin:pydoc; "),
        ({"dataset": "/nowhere.jsonl"}, NotFoundError, "no text"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, changed: dict[str, Any], error: type[GsaeError], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        harvest(config(**({"model": tiny_llama} | changed)), tmp_path / "store")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


def test_an_empty_text_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UsageError, match="empty"):
        harvest(config(tiny_llama, dataset=str(tmp_path / "empty.jsonl")), tmp_path / "store")
    assert not (tmp_path / "store" / "plan.json").exists()


def test_a_folder_with_something_else_is_refused_untouched(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(IncompatibleError, match=r"no store: it has 'thesis\.tex'"):
        harvest(config(tiny_llama), tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_a_full_disk_stops_cleanly_and_the_same_command_completes(tiny_llama: Path, tmp_path: Path) -> None:
    """A limit on the size of files replaces the full disk: the kernel refuses the write in the same way."""
    asked = config(tiny_llama, rows=2000, window_rows=2048, sites=("mlp.0",))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(SpaceError, match="No space left"):
            harvest(asked, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises((IncompatibleError, NotFoundError)):
        open_store(tmp_path / "store")
    assert verify(harvest(asked, tmp_path / "store"), deep=True) == []


def test_a_text_that_ends_early_says_how_many_rows_there_are(tiny_llama: Path, tmp_path: Path) -> None:
    store = harvest(config(tiny_llama, rows=10**7, sites=("mlp.0",), window_rows=1 << 16), tmp_path / "store")
    assert store.plan.contexts.ended_early
    assert store.plan.rows == store.site("mlp.0").rows < 10**7


def test_the_counts_in_progress_events_add_up(tiny_llama: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    store = harvest(config(tiny_llama, rows=3000, sites=("mlp.0", "attn.1")), tmp_path / "s", events.append)
    assert store is not None
    running = [e for e in events if isinstance(e, BatchDone)]
    last = running[-1]
    assert last.raw == (store.plan.rows + store.plan.heldout_rows) * 2 * 32 * 2
    assert last.written == sum(a.file.size for w in store.manifest.windows for a in w.arrays)
    assert last.tokens >= store.plan.contexts.contexts * 64
    assert all(0 <= e.busy <= e.seconds and 0 <= e.waiting <= 1 for e in running)
    assert all(getattr(a, k) <= getattr(b, k) for a, b in itertools.pairwise(running) for k in ("tokens", "written"))


def test_a_revision_that_changed_between_runs_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id without --revision means what its main branch is now."""

    def at(commit: str) -> None:
        def found(model: str, revision: str | None, **_: Any) -> ModelFiles:
            return ModelFiles("owner/name", commit, tiny_llama)

        for module in ("request", "model.loading"):
            monkeypatch.setattr(f"gsae.harvest.{module}.find_model", found)

    asked, out = config("owner/name", rows=600, sites=("mlp.0",)), tmp_path / "store"
    at("a" * 40)
    assert harvest(asked, out) is not None
    before = files(out)
    at("b" * 40)
    with pytest.raises(IncompatibleError, match=r"model\.revision was 'a{40}', now 'b{40}'"):
        harvest(asked, out)
    assert files(out) == before


def test_weights_that_changed_between_runs_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    asked, out = config(tiny_llama, rows=600, sites=("mlp.0",)), tmp_path / "store"
    assert harvest(asked, out) is not None
    (out / "manifest.json").unlink()
    next((out / "shards").glob("train-*")).unlink()
    before = files(out)
    changed = tmp_path / tiny_llama.name
    shutil.copytree(tiny_llama, changed)
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IncompatibleError, match=r"model\.weights_sha256 was "):
        harvest(config(changed, rows=600, sites=("mlp.0",)), out)
    assert files(out) == before


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UsageError, match="'bare' has no tokenizer"):
        harvest(config(bare), tmp_path / "store")
    assert not (tmp_path / "store").exists()
