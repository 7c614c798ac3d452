"""Whole runs on a small real store: the files they leave, what they refuse, what they learn."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import IncompatibleError, InterruptedRun, UsageError
from gsae.store import Store
from gsae.tests.support.children import files
from gsae.tests.support.small_runs import SAES, config, run
from gsae.tests.support.stores import make_store
from gsae.train import (
    Checkpointed,
    Diverged,
    Event,
    Finished,
    MetricsLine,
    Progress,
    Started,
    load_sae,
    parse_sae,
    read_config,
    train,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    run(tiny_store, out)
    return out


def test_a_run_leaves_its_settings_metrics_state_and_saes(undisturbed: Path, tiny_store: Store) -> None:
    names = ["gated-w48-l1_0.1-seed0", "gated-w48-l1_0.3-seed0", "relu-w40-l1_0.1-seed0", "gated-w16-l1_0.2-seed0"]
    assert sorted(files(undisturbed)) == sorted(
        [".lock", "config.toml", "metrics.jsonl"]
        + [
            f"state/{group}/{file}"
            for group in range(3)
            for file in ("checkpoint.safetensors", "lock", "metrics.jsonl")
        ]
        + [f"saes/{name}/{file}" for name in names for file in ("cfg.json", "sae_weights.safetensors")]
    )
    settings = tomllib.loads((undisturbed / "config.toml").read_text())
    assert settings["store"]["digest"] == tiny_store.digest
    assert (settings["threads"], settings["l1_warm_up_steps"], settings["lr_decay_steps"]) == (1, 3, 6)
    assert [sae.name for sae in read_config(undisturbed).saes] == names
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sae"]) for line in lines] == [(s, n) for s in (7, 14, 21, 28, 30) for n in names]
    assert all(line["rows"] == 96 * line["step"] for line in lines)
    assert lines[-4]["lr"] == pytest.approx(2e-3 / 6)
    assert lines[0]["l1_coefficient"] == 0.1
    noted = load_sae(undisturbed / "saes" / names[1]).metadata
    expected = {"architecture": "gated", "l1_coefficient": 0.3, "rows": 2880, "store_digest": tiny_store.digest}
    assert expected.items() <= noted.items()
    assert noted["scale"] == tiny_store.site("mlp.1").moments.within(10).mean_square_norm ** -0.5


def test_metrics_of_the_first_batch_equal_the_plain_formulas(tiny_store: Store, tmp_path: Path) -> None:
    from gsae.train.architectures.registry import ARCHITECTURES

    run(tiny_store, tmp_path / "run", steps=1, log_every=1, l1_warm_up_steps=0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    site = tiny_store.site("mlp.1")
    summary = site.moments.within(10)
    scale = summary.mean_square_norm**-0.5
    mean = torch.from_numpy(summary.mean * scale)
    with site.batches(96, epochs=None, max_norm_multiple=10) as batches:
        z = next(batches).double() * scale
    for line, sae in zip(lines, SAES, strict=True):
        params: Any = ARCHITECTURES[sae.arch].initial(32, sae.d_sae, 0, mean.float())
        params = type(params)(**{name: tensor.double() for name, tensor in vars(params).items()})
        f = params.encode(z)
        x_hat = params.decode(f)
        sse = (z - x_hat).square().sum()
        assert line["loss"] == pytest.approx(float(params.loss(z, sae.l1_coefficient)), rel=1e-5)
        assert line["l0"] == pytest.approx(float((f > 0).double().sum(1).mean()), rel=1e-5)
        assert line["explained_variance"] == pytest.approx(float(1 - sse / (z - mean).square().sum()), rel=1e-4)
        assert line["gamma"] == pytest.approx(float(x_hat.square().sum() / (x_hat * z).sum()), rel=1e-5)
        assert line["mse"] == pytest.approx(float(sse / scale**2 / len(z)), rel=1e-5)
        assert line["dead"] == 0


def test_the_listener_gets_every_event_in_order(tiny_store: Store, tmp_path: Path) -> None:
    events = run(tiny_store, tmp_path / "run", checkpoint_every=20)
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Started", *["Progress"] * 2, "Checkpointed", *["Progress"] * 3, "Checkpointed", "Finished"]
    assert isinstance(events[0], Started)
    rows = tiny_store.site("mlp.1").rows
    assert (events[0].rows, events[0].rows_skipped, events[0].epochs) == (rows, 0, 30 * 96 / rows)
    assert events[-1] == Finished(step=30, already=False, stopped=())


def test_a_finished_run_is_left_unchanged(undisturbed: Path, tiny_store: Store) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    assert run(tiny_store, undisturbed) == [Finished(step=30, already=True, stopped=())]
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_a_checkpoint_and_the_same_command_completes(
    undisturbed: Path, tiny_store: Store, tmp_path: Path, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 14:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRun, match=rf"{number.name} after step \d+ of 30") as caught:
        train(tiny_store.site("mlp.1"), config(), tmp_path / "run", stop)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    events = run(tiny_store, tmp_path / "run")
    assert isinstance(events[0], Started)
    assert 14 <= events[0].step < 30
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_run_with_bfloat16_products_resumes_to_the_same_bytes(tiny_store: Store, tmp_path: Path) -> None:
    run(tiny_store, tmp_path / "whole", precision="bfloat16")

    def stop(event: Event) -> None:
        if isinstance(event, Checkpointed) and event.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        train(
            tiny_store.site("mlp.1"),
            config(checkpoint_every=10, precision="bfloat16"),
            tmp_path / "run",
            stop,
        )
    run(tiny_store, tmp_path / "run", checkpoint_every=10, precision="bfloat16")
    left, expected = files(tmp_path / "run"), files(tmp_path / "whole")
    del left["config.toml"], expected["config.toml"]
    assert left == expected


def test_a_sparsity_warm_up_changes_what_is_learned(tiny_store: Store, tmp_path: Path, undisturbed: Path) -> None:
    run(tiny_store, tmp_path / "run", l1_warm_up_steps=30)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["l1_coefficient"] for line in lines[:: len(SAES)]] == pytest.approx(
        [0.1 * s / 30 for s in (7, 14, 21, 28, 30)]
    )
    before = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    assert lines[0]["loss"] < before["loss"]


def test_the_mse_of_an_older_line_gets_a_name_of_its_unit() -> None:
    old = '{"step": 5, "rows": 10, "sae": "a", "mse": 0.5, "heldout": {"rows": 3, "l0": 1.0, "mse": 0.25}}'
    line = MetricsLine.parse(old)
    assert line.mse is None
    assert line.heldout is not None
    assert (line.noted()["mse_per_dimension"], line.heldout.noted()["mse_per_dimension"]) == (0.5, 0.25)
    new = MetricsLine.parse(old.replace('"mse"', '"d_in": 32, "mse"'))
    assert new.mse == 0.5
    assert "mse_per_dimension" not in new.noted()


def test_the_data_seed_decides_the_batches(undisturbed: Path, tiny_store: Store, tmp_path: Path) -> None:
    run(tiny_store, tmp_path / "run", data_seed=1)
    assert files(tmp_path / "run")["metrics.jsonl"] != files(undisturbed)["metrics.jsonl"]


@pytest.mark.parametrize("checkpoint_every", [3, 4])
def test_metrics_written_after_the_last_checkpoint_are_not_written_twice(
    undisturbed: Path, tiny_store: Store, tmp_path: Path, checkpoint_every: int
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 14:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(tiny_store.site("mlp.1"), config(checkpoint_every=checkpoint_every), tmp_path / "run", cut)
    assert sum(
        data.count(b"\n") for name, data in files(tmp_path / "run").items() if name.endswith("metrics.jsonl")
    ) >= 2 * len(SAES)
    run(tiny_store, tmp_path / "run")
    assert files(tmp_path / "run")["metrics.jsonl"] == files(undisturbed)["metrics.jsonl"]


ALONE = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["transformers"] = sys.modules["datasets"] = None  # importing them raises ImportError
from pathlib import Path
from gsae.store import open_store
from gsae.tests.train.run.test_trainer import config
from gsae.train import train
train(open_store(sys.argv[1]).site("mlp.1"), config(steps=3), Path(sys.argv[2]))
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"transformers", "datasets", "tokenizers", "huggingface_hub"}, loaded
"""


@pytest.mark.slow
def test_training_needs_no_network_and_no_language_model_code(tiny_store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tiny_store.path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


THREADS = """
import torch
from gsae.train.run.computing import computing_with
for count in (1, 2, 1):
    with computing_with(count):
        assert torch.get_num_threads() == count, (count, torch.get_num_threads())
"""


@pytest.mark.slow
def test_the_number_of_threads_is_the_one_asked_for_after_compiled_functions_start_their_pool() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 31}, "steps was 30, now 31"),
        ({"batch_size": 95}, "batch_size was 96, now 95"),
        ({"data_seed": 1}, "data_seed was 0, now 1"),
        ({"precision": "bfloat16"}, "precision was float32, now bfloat16"),
        ({"threads": 2}, "threads was 1, now 2"),
        ({"saes": SAES[:-1]}, "4 SAEs, now 3"),
        ({"lr": 3e-3}, "lr of gated-w48-l1_0.1-seed0 was 0.002, now 0.003"),
        ({"saes": (*SAES[:-1], *parse_sae("gated width=16 l1=.2 seed=9"))}, "gated-w16-l1_0.2-seed9"),
    ],
)
def test_a_changed_setting_is_named_and_refused(
    undisturbed: Path, tiny_store: Store, settings: dict[str, Any], message: str
) -> None:
    before = files(undisturbed)
    with pytest.raises(IncompatibleError, match=message):
        run(tiny_store, undisturbed, **settings)
    assert files(undisturbed) == before


def test_another_store_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "store")
    with pytest.raises(IncompatibleError, match=f"this one has {other.digest[:12]}"):
        run(other, undisturbed)


def test_a_folder_that_is_not_a_run_is_refused(tiny_store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(IncompatibleError, match=r"is not empty and is not a run of gsae \(it has thesis\.txt\)"):
        run(tiny_store, tmp_path)
    (tmp_path / "config.toml").write_text("title = 'mine too'")
    with pytest.raises(IncompatibleError, match="not that of a run of gsae"):
        run(tiny_store, tmp_path)
    with pytest.raises(IncompatibleError, match="is a file"):
        run(tiny_store, tmp_path / "thesis.txt")
    assert sorted(files(tmp_path)) == ["config.toml", "thesis.txt"]


def test_two_processes_do_not_train_in_one_folder(tiny_store: Store, tmp_path: Path) -> None:
    def second(event: Event) -> None:
        if isinstance(event, Started):
            with pytest.raises(IncompatibleError, match="Another process is training"):
                run(tiny_store, tmp_path / "run", steps=2)

    train(tiny_store.site("mlp.1"), config(steps=2), tmp_path / "run", second)


def test_an_sae_that_diverges_is_stopped_and_the_others_continue(tiny_store: Store, tmp_path: Path) -> None:
    wild = parse_sae("gated width=48 l1=.2 lr=1e30")[0]
    events = run(tiny_store, tmp_path / "run", saes=(SAES[0], wild, *SAES[1:]), lr_warm_up_steps=0)
    stopped = [event for event in events if isinstance(event, Diverged)]
    assert [event.sae for event in stopped] == ["gated-w48-l1_0.2-seed0"]
    assert 1 <= stopped[0].step <= 3
    assert events[-1] == Finished(step=30, already=False, stopped=("gated-w48-l1_0.2-seed0",))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        failed = line["sae"] == stopped[0].sae
        assert ("diverged" in line) == failed
        assert (line["loss"] is None) == failed
        assert ("stopped" in line) == failed
    assert sorted(p.name for p in (tmp_path / "run" / "saes").iterdir()) == [
        "gated-w16-l1_0.2-seed0", "gated-w48-l1_0.1-seed0", "gated-w48-l1_0.3-seed0", "relu-w40-l1_0.1-seed0",
    ]  # fmt: skip
    # What shares its bank with it learns what it learns alone.
    run(tiny_store, tmp_path / "alone", lr_warm_up_steps=0)
    one, other = (load_sae(tmp_path / r / "saes" / "gated-w48-l1_0.1-seed0") for r in ("run", "alone"))
    torch.testing.assert_close(one.params.W_dec, other.params.W_dec, rtol=1e-3, atol=1e-3)
    assert run(tiny_store, tmp_path / "run", saes=(SAES[0], wild, *SAES[1:]), lr_warm_up_steps=0) == [
        Finished(step=30, already=True, stopped=("gated-w48-l1_0.2-seed0",))
    ]


def test_bfloat16_products_learn_nearly_the_same(tiny_store: Store, tmp_path: Path, undisturbed: Path) -> None:
    run(tiny_store, tmp_path / "run", precision="bfloat16")
    last = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-len(SAES) :]
        for out in (tmp_path / "run", undisturbed)
    ]
    for half, full in zip(*last, strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
        assert half["loss"] != full["loss"]


def test_a_checkpoint_is_reported_after_it_is_written(tiny_store: Store, tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Checkpointed):
            assert (tmp_path / "run" / "state" / "0" / "checkpoint.safetensors").exists()

    train(tiny_store.site("mlp.1"), config(steps=2), tmp_path / "run", listen)


def test_tf32_products_are_refused_on_a_cpu(tiny_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tf32 needs a GPU, and the device is 'cpu'"):
        run(tiny_store, tmp_path / "run", precision="tf32", device="cpu")
    assert not (tmp_path / "run").exists()
