"""Evaluation and features on a device without float64, such as Apple's GPU: SAEs run there, sums on the CPU.

The stub computes nothing and gives zeros, so every reconstruction is the zero row.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gsae.commands.language_model import torch_device
from gsae.errors import UsageError
from gsae.evaluate.measurement import Measurement, NormBands
from gsae.evaluate.splice import Replacements, reconstruct, replace_rows
from gsae.features.find.directions import neighbours, outermost
from gsae.harvest import LanguageModel, effects, resolve
from gsae.tests.support.causal_lms import tiny_model
from gsae.tests.support.params import random_params
from gsae.tests.support.plain_device import RefusedError, RefusingCalls, RefusingZeros
from gsae.train import SAE, Firing

D_IN = 16


@pytest.fixture
def sae() -> SAE:
    return SAE(random_params("gated", D_IN, 40, seed=0, dtype=torch.float32), {})


@pytest.fixture
def _meta_lacks_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsae.train.step.wide.WITHOUT_FLOAT64", ("meta",))


def measured(sae: SAE, x: Tensor, device: str) -> Measurement:
    made = Measurement({"sae": sae.to(device)}, np.full(D_IN, 0.5), 3, NormBands(5.0, 4.0), device)
    made.add(x, np.arange(len(x)) % 3)
    return made


def test_the_metrics_of_rows_use_nothing_that_the_device_lacks(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RefusedError), RefusingZeros():
        measured(sae, x, "meta")
    monkeypatch.setattr("gsae.train.step.wide.WITHOUT_FLOAT64", ("meta",))
    with RefusingZeros():
        found = measured(sae, x, "meta").saes["sae"]
    assert 0 < found.kept.rows < found.all.rows == 60
    assert found.all.metrics().mse == pytest.approx(float(x.double().square().sum(1).mean()), rel=1e-12)
    assert (found.all.metrics().l0, found.silent) == (0, 1)


@pytest.mark.usefixtures("_meta_lacks_float64")
def test_every_edit_of_a_splice_uses_nothing_that_the_device_lacks(sae: SAE) -> None:
    stored = torch.ones(2, 5, dtype=torch.bool)
    stored[:, 0] = False
    replacements = Replacements({"sae": sae.to("meta")}, np.zeros(D_IN), 5.0, "meta")
    activation = torch.randn(2, 5, D_IN, dtype=torch.bfloat16, device="meta")
    with RefusingZeros():
        edited = [edit(activation) for edit in replacements.edits(stored)]
    assert [(each.shape, each.dtype, each.device) for each in edited] == 4 * [
        (activation.shape, torch.bfloat16, torch.device("meta"))
    ]


def test_a_spliced_pass_of_the_language_model_uses_nothing_that_the_device_lacks() -> None:
    model = tiny_model("llama")
    lm = LanguageModel(model, None, None)  # type: ignore[arg-type]
    edits: list[Callable[[Tensor], Tensor]] = [torch.zeros_like, lambda x: x * 2]
    site, tokens = resolve(model, ["resid.1"])[0], torch.arange(3, 35).reshape(2, 16)
    with RefusingCalls():
        losses, divergences = effects(lm, site, tokens, edits)
    assert losses.shape == divergences.shape == (3, 2, 15)


def test_only_stored_rows_below_the_norm_limit_are_edited(sae: SAE) -> None:
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(0))
    x[0, 3] *= 100
    stored = torch.ones(2, 5, dtype=torch.bool)
    stored[1, 2] = False
    edited = replace_rows(stored, 50.0, reconstruct(sae, "cpu"))(x)
    same = (edited == x).all(-1)
    assert same.nonzero().tolist() == [[0, 3], [1, 2]]
    torch.testing.assert_close(edited[~same], sae.decode(sae.encode(x[~same])))


def test_firings_and_neighbours_use_nothing_that_the_device_lacks(sae: SAE) -> None:
    firing, x = Firing(sae), torch.randn(60, D_IN, generator=torch.Generator().manual_seed(0))
    compiled = firing(x)
    firing.compiled = False
    with RefusingCalls():
        listed = firing(x)
        neighbours(sae.params.W_dec, 0, 8, 3)
        outermost(sae.params.W_dec, 3)
    assert torch.equal(listed.starts, compiled.starts)
    assert torch.equal(listed.latents, compiled.latents)


def test_auto_is_apples_gpu_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="Device 'mps' cannot be used"):
        torch_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (torch_device("auto"), torch_device("mps"), torch_device("cpu")) == ("mps", "mps", "cpu")
