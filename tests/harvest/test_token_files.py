"""The step that writes tokens: after kills, with several workers and without weights it gives the same bytes."""

import errno
import fcntl
import json
import os
import shutil
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import CorruptError, GsaeError, IncompatibleError, UsageError
from gsae.files import sweep
from gsae.harvest import (
    BlockTokenised,
    HarvestConfig,
    Request,
    Worker,
    harvest,
    harvest_tokens,
    make_request,
    token_files,
    write_tokens,
)
from gsae.harvest.text import packing
from gsae.store import list_stores, read_tokens
from gsae.tests.support.children import files, killed_at_random, start
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.killing import assert_survives_every_kill

pytestmark = pytest.mark.slow

PART_TOKENS, BLOCK_DOCUMENTS = 2000, 2


def config(model: Path, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "dataset": "builtin:pydoc",
        "sites": ("mlp.1",),
        "rows": 12_000,
        "context_size": 64,
        "window_rows": 1024,
        "threads": 1,
    }
    return HarvestConfig(**(settings | changed))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    make_parts_small(monkeypatch.setattr)


def make_parts_small(setattr_: Any = setattr) -> None:
    """Make many parts and blocks of a small text, in this process or in a child that calls it."""
    setattr_(token_files, "PART_TOKENS", PART_TOKENS)
    setattr_(packing, "BLOCK_DOCUMENTS", BLOCK_DOCUMENTS)


@cache
def asked(model: Path, rows: int = 12_000) -> Request:
    return make_request(config(model, rows=rows))


def step(model: Path, root: Path) -> None:
    """Write the tokens in a process that is forked repeatedly, so the tokenizer must not start threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    make_parts_small()
    sweep(root)
    write_tokens(asked(model, 5000), root)
    sweep(root)


def work(model: Path, out: Path, heard: Path | None = None, pause: float = 0.0, locks: bool = True) -> None:
    """Run one of several workers; the documents of each block event are written to the file `heard`."""
    make_parts_small()
    if not locks:
        fcntl.flock = no_locks
    events: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, BlockTokenised):
            events.append(event.documents)
            if heard:
                heard.write_text(json.dumps(events))
            time.sleep(pause)

    harvest_tokens(config(model), out, listen)


def no_locks(file: Any, flags: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        make_parts_small(patch.setattr)
        harvest_tokens(config(tiny_llama), out)
    return files(out)


@pytest.mark.kill
def test_tokens_killed_before_or_after_any_call_end_in_the_same_files(tiny_llama: Path, memory: Path) -> None:
    assert_survives_every_kill(None, partial(step, tiny_llama), memory, calls=50)


@pytest.mark.kill
def test_tokens_killed_at_random_moments_end_in_the_same_files(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    arguments = (tiny_llama, out, None, 0.01)
    assert killed_at_random(work, arguments, out, len(undisturbed), kills=5, seed=1) >= 3
    assert files(out) == undisturbed


def test_what_was_tokenised_is_not_tokenised_again(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(event: BlockTokenised) -> None:
        heard.append(event)
        if event.contexts * 64 > 4 * PART_TOKENS:
            raise KeyboardInterrupt

    heard: list[BlockTokenised] = []
    with pytest.raises(KeyboardInterrupt):
        write_tokens(asked(tiny_llama), tmp_path, stop)
    assert len(list(tmp_path.glob("tokens/*.npz"))) > 1
    again: list[BlockTokenised] = []
    write_tokens(asked(tiny_llama), tmp_path, again.append)
    assert 0 < heard[0].documents < again[0].documents <= heard[-1].documents
    assert again[-1].rows >= 12_000
    assert not list(tmp_path.glob("tokens/*.npz"))
    write_tokens(asked(tiny_llama), tmp_path, lambda event: pytest.fail("tokenised again"))


def test_the_sizes_of_parts_and_blocks_do_not_change_the_bytes(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (part, at_a_time, characters) in enumerate([(1, 1, 1), (10**9, 5, 1 << 20)]):
        monkeypatch.setattr("gsae.harvest.token_files.PART_TOKENS", part)
        monkeypatch.setattr("gsae.harvest.text.packing.AT_A_TIME", at_a_time)
        monkeypatch.setattr("gsae.harvest.text.encoding.ENCODED_CHARACTERS", characters)
        write_tokens(asked(tiny_llama), tmp_path / str(number))
        assert files(tmp_path / str(number)) == undisturbed


@pytest.mark.kill
def test_of_several_workers_one_tokenises_and_the_others_use_its_tokens(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    workers = [start(work, tiny_llama, tmp_path / "store", tmp_path / f"{n}.json", 0.02) for n in range(3)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert files(tmp_path / "store") == undisturbed


@pytest.mark.kill
def test_another_worker_takes_over_from_one_that_dies_while_tokenising(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    first = start(work, tiny_llama, out, tmp_path / "first.json", 0.1)
    while not list(out.glob("tokens/*.npz")):
        time.sleep(0.005)
    second = start(work, tiny_llama, out, tmp_path / "second.json")
    time.sleep(0.3)
    assert not (tmp_path / "second.json").exists()
    first.kill()
    second.join()
    assert second.exitcode == 0
    assert json.loads((tmp_path / "second.json").read_text())[0] > BLOCK_DOCUMENTS
    assert files(out) == undisturbed


@pytest.mark.kill
def test_without_file_locks_all_workers_tokenise_to_the_same_bytes(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    workers = [start(work, tiny_llama, tmp_path / "store", None, 0.01 * n, False) for n in range(3)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {k: v for k, v in files(tmp_path / "store").items() if not k.startswith(".tmp/")} == undisturbed


def test_a_worker_that_waited_uses_the_plan_that_another_published_meanwhile(tiny_llama: Path, tmp_path: Path) -> None:
    """The other worker is still removing the files that the plan replaces."""
    write_tokens(asked(tiny_llama), tmp_path)
    begun = files(tmp_path)["tokens/begun.json"]
    store = harvest(config(tiny_llama), tmp_path)
    assert store is not None
    (tmp_path / "tokens").mkdir()
    for data in (None, begun):
        if data:
            (tmp_path / "tokens/begun.json").write_bytes(data)
        found = write_tokens(asked(tiny_llama), tmp_path, lambda event: pytest.fail("tokenised again"))
        assert found == store.plan.contexts


# --- tokens alone ---


@pytest.fixture
def without_weights(tiny_llama: Path, tmp_path: Path) -> Path:
    """The model's folder without weights, under its own name."""
    folder = tmp_path / "light" / tiny_llama.name
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_tokens_are_written_without_weights_and_a_harvest_continues_with_them(
    tiny_llama: Path, without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, direct = tmp_path / "store", tmp_path / "direct"
    harvest_tokens(config(without_weights), out)
    monkeypatch.setattr("gsae.harvest.token_files.tokenise", lambda *_, **__: pytest.fail("tokenised again"))
    harvest_tokens(config(without_weights), out)
    harvest(config(tiny_llama), out, worker=Worker(0, 1))
    assert not (out / "tokens").exists()
    monkeypatch.undo()
    make_parts_small(monkeypatch.setattr)
    harvest(config(tiny_llama), direct)
    assert files(out) == files(direct)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 13_000}, r"other settings: requested_rows was 12000, now 13000\."),
        ({"context_size": 32}, "context_size was 64, now 32"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"heldout": 0.05}, r"heldout was 0\.1, now 0\.05"),
        ({"dropped_positions": (1,)}, r"dropped_positions was \[\], now \[1\]"),
        ({"max_documents": 100}, r"dataset\.max_documents was None, now 100"),
        ({"shuffle_documents": 0}, r"dataset\.shuffle_seed was None, now 0"),
        ({"repeat": True}, r"dataset\.repeat was None, now True"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_than_those_of_the_tokens_are_named_and_refused(
    tiny_llama: Path, tmp_path: Path, changed: dict[str, Any], said: str, finished: bool
) -> None:
    write_tokens(asked(tiny_llama), tmp_path)
    if not finished:
        (tmp_path / "tokens/made.json").unlink()
    before = files(tmp_path)
    with pytest.raises(IncompatibleError, match=said):
        harvest(config(tiny_llama, **changed), tmp_path)
    assert files(tmp_path) == before


def test_settings_that_do_not_determine_tokens_may_change_before_there_is_a_plan(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_tokens(asked(tiny_llama), tmp_path)
    store = harvest(config(tiny_llama, sites=("resid.0",), window_rows=4096, codec="zstd", batch_size=3), tmp_path)
    assert store is not None
    assert store.plan.rows == 12_000


def test_tokens_of_other_library_versions_are_used_if_finished_and_else_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae.harvest.plans.TEXT_LIBRARIES", ("numpy",))
    for name in ("finished", "unfinished"):
        write_tokens(asked(tiny_llama), tmp_path / name)
    (tmp_path / "unfinished/tokens/made.json").unlink()
    monkeypatch.setattr("gsae.harvest.plans.TEXT_LIBRARIES", ("tokenizers",))
    write_tokens(asked(tiny_llama), tmp_path / "finished")
    with pytest.raises(IncompatibleError, match=r"versions\."):
        write_tokens(asked(tiny_llama), tmp_path / "unfinished")


def test_every_command_recognises_a_folder_that_has_only_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores" / "mine"
    command = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 12_000]
    command += ["--context-size", 64, "--out", out]
    done = gsae(*command, "--only-tokens")
    assert done.returncode == 0, done.stderr
    assert "has its tokens" in done.stdout
    assert "12,000 train" in done.stdout
    facts = json.loads(gsae("info", out, "--json").stdout)
    assert (facts["state"], facts["dataset"], facts["rows"]["train"]) == ("tokens only", "builtin:pydoc", 12_000)
    assert facts == json.loads(gsae(*command, "--only-tokens", "--json").stdout)
    (listed,) = list_stores(tmp_path)
    assert (listed.path, listed.state, listed.rows["train"]) == (str(out), "tokens only", 12_000)
    refused(5, "has only its tokens so far", "seal", out)
    refused(5, "has only its tokens so far", "verify", out)
    refused(5, "has only its tokens so far", "copy", out, tmp_path / "copy")
    refused(5, "has only its tokens so far", "train", out, "--site", "mlp.1", "--steps", 5, "--out", tmp_path / "run",
            "--sae", "gated width=8 l1=.1")  # fmt: skip
    (out / "tokens/made.json").unlink()
    assert json.loads(gsae("info", out, "--json").stdout)["state"] == "unfinished tokens"
    assert list_stores(tmp_path)[0].state == "unfinished tokens"


def test_a_text_that_ends_early_is_reported_by_the_token_step(tiny_llama: Path, tmp_path: Path) -> None:
    command = ["harvest", "--model", tiny_llama, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--rows", 10**7]
    done = gsae(*command, "--context-size", 64, "--out", tmp_path / "s", "--only-tokens")
    made = read_tokens(tmp_path / "s")[1]
    assert made is not None
    assert made.contexts.ended_early
    assert f"The text ended early: it has {made.rows:,} train rows of 10,000,000 wanted." in done.stderr


# --- what cannot be ---


def written(folder: Path, texts: list[str]) -> str:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.mark.parametrize(
    ("texts", "changed", "said"),
    [
        (["held out"], {"heldout": 0.999999}, "gives no train rows: 1 documents, 1 contexts, a share of 0.999999"),
        (["held out"], {"heldout": 0.999999, "repeat": True}, "gives no train rows"),
        (["", "a"], {"max_documents": 1}, "gives no train rows: 1 documents, 0 contexts"),
        (["", "a"], {"skip_documents": 2, "repeat": True}, "gives no train rows: 0 documents"),
    ],
)
def test_a_text_that_gives_no_train_row_is_refused_and_leaves_no_file(
    tiny_llama: Path, tmp_path: Path, texts: list[str], changed: dict[str, Any], said: str
) -> None:
    wrong = config(tiny_llama, dataset=written(tmp_path, texts), **changed)
    with pytest.raises(UsageError, match=said):
        harvest_tokens(wrong, tmp_path / "store")
    assert files(tmp_path / "store") == {}
    harvest_tokens(config(tiny_llama), tmp_path / "store")


def test_a_damaged_part_is_named_with_the_remedy(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(event: BlockTokenised) -> None:
        if event.contexts * 64 > 4 * PART_TOKENS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(asked(tiny_llama), tmp_path, stop)
    part = tmp_path / "tokens/00001.npz"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(CorruptError, match=r"00001\.npz is damaged\. Remove the folder .*tokens and run the same"):
        write_tokens(asked(tiny_llama), tmp_path)
    shutil.rmtree(tmp_path / "tokens")
    write_tokens(asked(tiny_llama), tmp_path)
    assert read_tokens(tmp_path)[1] is not None


def test_a_full_disk_ends_tokenising_in_one_line_and_a_later_run_completes(
    undisturbed: dict[str, bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(GsaeError, match="No space left"):
            write_tokens(asked(tiny_llama), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_tokens(asked(tiny_llama), tmp_path)
    assert files(tmp_path) == undisturbed
