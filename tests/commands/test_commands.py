"""The command as a user meets it: what goes to stdout, one-line errors, exit codes, nothing begun by --dry-run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gsae.evaluate import HeldoutDocuments
from gsae.store import Store, open_store
from gsae.tests.support.children import files
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.saes import training_notes, write_sae
from gsae.tests.support.stores import make_store

pytestmark = pytest.mark.slow

HARVEST = ["--dataset", "builtin:pydoc", "--context-size", "64", "--window-rows", "512", "--device", "cpu"]
SAE = ["--sae", "gated width=48 l1=.1"]


def test_harvest_info_verify_train_eval_report_from_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    store, run, page = tmp_path / "store", tmp_path / "run", tmp_path / "report.html"
    harvest = ["harvest", "--model", tiny_llama, *HARVEST, "--site", "mlp.1,resid.0", "--rows", 4000, "--out", store]
    dry = json.loads(gsae(*harvest, "--dry-run", "--json").stdout)
    assert dry["sites"]["mlp.1"]["d_in"] == 32
    assert dry["rows"] == 4000
    assert not store.exists()
    made = json.loads(gsae(*harvest, "--json").stdout)
    assert made["rows"]["train"] == 4000
    few = "held-out document(s)?: intervals over documents are rough below 50; harvest with a larger --heldout or more"
    again = gsae(*harvest)
    assert re.search(few, again.stderr)
    assert "nothing to do" in again.stderr
    assert made["digest"] in again.stdout
    assert json.loads(gsae("info", store, "--json").stdout) == made
    assert json.loads(gsae("verify", store, "--deep", "--json").stdout)["faults"] == []
    train = ["train", store, "--site", "mlp.1", "--sae", "gated width=64 l1=.05,.2", "--sae", "relu width=96 l1=.05,.2",
             "--steps", 60, "--batch-size", 256, "--threads", 1, "--out", run]  # fmt: skip
    planned = json.loads(gsae(*train, "--dry-run", "--json").stdout)
    assert planned["parameters"]["gated-w64-l1_0.05-seed0"] == 2 * 64 * 32 + 3 * 64 + 32
    assert not run.exists()
    trained = json.loads(gsae(*train, "--json").stdout)
    assert [sae["step"] for sae in trained["saes"]] == [60] * 4
    assert trained["state"] == "complete"
    assert "nothing to do" in gsae(*train).stderr
    assert json.loads(gsae("info", run, "--json").stdout) == trained
    assert_fits(gsae("info", run).stdout)
    assert_fits(gsae("info", store).stdout)
    wrong = "gated-w64-l1_0.05-seed9"
    refused(3, f"no SAE '{wrong}'", "features", run, "--sae", wrong, "--model", "/nowhere")  # before a model is loaded
    evaluated = gsae("eval", run, "--model", tiny_llama, "--device", "cpu", "--json")
    assert re.search(few, evaluated.stderr)
    results = json.loads(evaluated.stdout)
    assert {result["heldout_documents"] for result in results} == {HeldoutDocuments.of(open_store(store)).count}
    assert "per_document" not in results[0]
    assert all(result["ce_loss_score"] is not None for result in results)
    done = gsae("report", run, "--out", page)
    assert done.returncode == 0, done.stderr
    assert 10_000 < page.stat().st_size < 1_000_000


def test_a_dry_run_that_does_not_fit_ends_as_the_run_does_and_both_write_nothing(
    tiny_store: Store, tmp_path: Path
) -> None:
    train = ["train", tiny_store.path, "--site", "mlp.1", "--sae", "gated width=1000000000 l1=.1", "--steps", 9]
    train += ["--device", "cpu", "--out", tmp_path / "run"]
    message = r"gsae: (Training one SAE \(gated, 1,000,000,000 latents\) needs .*GB of memory), and [\d.]+ (GB.*)\n"
    planned, begun = gsae(*train, "--dry-run", "--json"), gsae(*train)
    assert (planned.returncode, begun.returncode) == (6, 6)
    said = [re.fullmatch(message, done.stderr) for done in (planned, begun)]
    assert said[0] is not None
    assert said[1] is not None
    assert said[0].groups() == said[1].groups()
    facts = json.loads(planned.stdout)
    assert facts["refusal"] in planned.stderr
    assert facts["groups"][0]["memory_bytes"] < facts["memory_bytes"]
    assert "expected_seconds" not in facts
    lines = gsae(*train, "--dry-run").stdout
    assert "refusal: Training one SAE" in lines
    assert not (tmp_path / "run").exists()


def assert_fits(text: str) -> None:
    """Text of `gsae info` has at most 100 columns and no dictionary in Python's notation."""
    assert max(map(len, text.splitlines())) <= 100, text
    assert "{" not in text
    assert "None" not in text


def test_wrong_harvests_are_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    known = ["harvest", "--model", tiny_llama, *HARVEST, "--out", out]
    refused(3, "no model", "harvest", "--model", "/nowhere/model", *HARVEST, "--site", "mlp.1", "--out", out)
    refused(2, "layers 0 to 2", *known, "--site", "mlp.9")
    refused(2, "rows", *known, "--site", "mlp.1", "--rows", 0)
    refused(2, "URL", *known[:-1], "s3://bucket/store", "--site", "mlp.1")
    (tmp_path / "empty.jsonl").write_text("")
    known[4] = str(tmp_path / "empty.jsonl")
    refused(2, "empty", *known, "--site", "mlp.1")
    assert not (out / "plan.json").exists()


def test_wrong_trainings_are_refused_in_one_line(tiny_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    known = ["train", tiny_store.path, "--steps", 5, "--out", out]
    refused(3, "It has: mlp.1.", *known, "--site", "mlp.40", *SAE)
    refused(2, "width", *known, "--site", "mlp.1", "--sae", "gated width=0 l1=.1")
    refused(2, "one of them", *known, "--site", "mlp.1")
    refused(2, "steps", *known[:3], 0, "--out", out, "--site", "mlp.1", *SAE)
    refused(3, "is no gsae store", "train", tmp_path, "--steps", 5, "--out", out, "--site", "mlp.1", *SAE)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(5, "is not a run of gsae (it has notes.txt)", *known, "--site", "mlp.1", *SAE)
    assert files(out) == {"notes.txt": b"mine"}


def test_a_store_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", contexts=60)
    (store.path / "manifest.json").unlink()
    refused(5, "not finished", "train", store.path, "--site", "mlp.1", *SAE, "--steps", 5, "--out", tmp_path / "run")
    facts = json.loads(gsae("info", store.path, "--json").stdout)
    assert facts["state"] == "unfinished"
    assert facts["missing_windows"] == []


def test_a_damaged_store_ends_verify_with_4_and_names_the_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", contexts=60)
    file = store.path / "train/mlp.1/c/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (store.path / "notes.txt").write_text("by a colleague")
    quick = gsae("verify", store.path)
    assert (quick.returncode, "note: notes.txt is not part of the store" in quick.stderr) == (0, True)
    done = gsae("verify", store.path, "--deep")
    assert done.returncode == 4
    assert "train/mlp.1/c/0/0 was changed" in done.stderr


def weights(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.rglob("sae_weights.safetensors"))]


def test_several_stores_are_trained_from_and_evaluated_as_one(tmp_path: Path) -> None:
    stores, run = [make_store(tmp_path / f"s{n}", contexts=n).path for n in (60, 90)], tmp_path / "run"
    train = ["train", *stores, "--site", "mlp.1", *SAE, "--steps", 20, "--batch-size", 64, "--device", "cpu"]
    done = gsae(*train, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in gsae(*train, "--out", run).stderr
    assert gsae(*train, "--io", "pread", "--out", tmp_path / "other").returncode == 0
    assert weights(tmp_path / "other") == weights(run)
    refused(5, "digest", "train", stores[0], *train[3:], "--out", run)
    evaluated = gsae("eval", run, "--no-model", "--device", "cpu", "--json")
    (result,) = json.loads(evaluated.stdout)
    # Both stores are of one text, whose documents 0 to 59 are in both: every seventh of 90 is held out.
    assert result["heldout_documents"] == 13
    assert evaluated.stderr.count("Only 13 held-out documents: intervals over documents are rough below 50;") == 1
    assert result["rows"] == sum(open_store(store).site("mlp.1", "heldout").rows for store in stores)
    shutil.rmtree(stores[1])
    refused(3, f"{stores[1]}, which does not exist", "eval", run, "--no-model")


def test_the_sites_of_a_model_are_listed_by_its_config_alone(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    listed = gsae("sites", tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert [line.split() for line in listed.stdout.splitlines()[:4]] == [
        ["site", "d_in", "module", "hook", "hook_name", "mixer"],
        ["resid.0-2", "32", "model.layers.L", "out", "blocks.L.hook_resid_post"],
        ["mlp.0-2", "32", "model.layers.L.mlp", "out", "blocks.L.hook_mlp_out"],
        ["attn.0-2", "32", "model.layers.L.self_attn.o_proj", "in", "blocks.L.attn.hook_z", "attention"],
    ]
    found = json.loads(gsae("sites", tmp_path, "--json").stdout)
    assert [site["name"] for site in found][:9:4] == ["resid.0", "mlp.1", "attn.2"]
    assert [site["mixer"] for site in found][5:7] == [None, "attention"]


def test_sites_and_positions_may_be_given_as_ranges(tiny_llama: Path, tmp_path: Path) -> None:
    known = ["harvest", "--model", tiny_llama, *HARVEST, "--rows", 100, "--out", tmp_path / "s", "--dry-run", "--json"]
    planned = json.loads(gsae(*known, "--site", "mlp.0,-1", "--site", "resid.all", "--drop-positions", "0-3,9").stdout)
    assert list(planned["sites"]) == ["mlp.0", "mlp.2", "resid.0", "resid.1", "resid.2"]
    for wrong in ("first", "5-2", "1-"):
        done = gsae(*known[:-1], "--site", "mlp.0", "--drop-positions", wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"'--drop-positions': got '{wrong}'; give numbers or ranges, for instance 0-3,9." in done.stderr
    refused(
        2, "dropped_positions: got 64; needs less than 64", *known[:-1], "--site", "mlp.0", "--drop-positions", "60-64"
    )


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gsae.cli", "--debug", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NotFoundError" in done.stderr


@pytest.mark.parametrize("word", ["run", "store"])
def test_evaluating_what_is_not_there_is_refused(tmp_path: Path, word: str) -> None:
    refused(3, "no run", "eval", tmp_path / word)


@pytest.mark.parametrize(("documents", "said"), [(49, True), (50, False)])
def test_few_held_out_documents_are_said_below_50(tmp_path: Path, documents: int, said: bool) -> None:
    store = make_store(tmp_path / "store", contexts=7 * documents)
    write_sae(tmp_path / "run", "gated", 0, training_notes(store))
    done = gsae("eval", tmp_path / "run", "--store", store.path, "--no-model", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert ("Only 49 held-out documents: intervals over documents are rough" in done.stderr) == said


@pytest.mark.parametrize(("documents", "said"), [(9, True), (50, False)])
def test_the_demo_says_that_it_has_few_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, said: bool
) -> None:
    summary = {"saes": [], "l0_ratio": 2.0, "l0_ratio_interval": [1.5, 2.5], "documents": documents, "alike": []}
    summary |= {"store": {"ratio": 0.7, "dtype": "bfloat16"}}
    monkeypatch.setattr("gsae.commands.demo.run_demo", lambda out, say: summary)
    done = gsae("demo", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("Only 9 held-out documents: intervals over documents are rough below 50;" in done.stdout) == said
