"""`--compile`: all code before the sites runs compiled, and rows agree with those of a plain pass."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.errors import IncompatibleError, UsageError
from gsae.harvest import HarvestConfig, LanguageModel, capture, compile_layers, harvest, load_lm, resolve
from gsae.tests.support.command import gsae

pytestmark = pytest.mark.slow
SITES = ["mlp.0", "attn.1", "resid.1", "module:model.layers.0.mlp.act_fn:out"]


class Counting:
    """A backend that runs the graphs unchanged and counts compilations and runs."""

    def __init__(self) -> None:
        self.compiled, self.ran = 0, 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


def batch(contexts: int) -> Tensor:
    return torch.randint(4, 1024, (contexts, 24), generator=torch.Generator().manual_seed(contexts))


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    torch.compiler.reset()
    return load_lm(str(tiny_llama), dtype="float32")


@pytest.mark.parametrize("names", [["resid.1"], ["mlp.2"], SITES])
def test_every_projection_before_the_last_site_is_computed_by_compiled_code(
    lm: LanguageModel, names: list[str]
) -> None:
    """Only compiled code may call a projection, so calls outside of tracing are counted and must be zero."""
    sites = resolve(lm.model, names)
    plain = {size: capture(lm, sites, batch(size)) for size in (3, 4)}
    backend, eager = Counting(), Counter[str]()
    made = compile_layers(lm, sites, backend)
    linear = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            eager["linear"] += 1
        return linear(self, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", counted)
        for size in (3, 4, 3):
            before = backend.ran
            found = capture(made, sites, batch(size))
            assert backend.ran > before
            for name, value in found.items():
                torch.testing.assert_close(value, plain[size][name], rtol=1e-5, atol=1e-5)
    assert eager["linear"] == 0
    assert made.provenance.compile


def test_layers_share_their_code_and_each_batch_size_has_its_own(lm: LanguageModel) -> None:
    """The bits of a batch must not depend on the sizes before it, so every shape is compiled separately."""
    sites = resolve(lm.model, ["resid.2"])
    backend = Counting()
    made = compile_layers(lm, sites, backend)
    for size, graphs in ((3, 1), (4, 2), (3, 2), (5, 3)):
        capture(made, sites, batch(size))
        assert backend.compiled == graphs
    assert backend.ran == 4 * 3


def test_more_sizes_than_torchs_own_limit_stay_compiled(lm: LanguageModel) -> None:
    sites = resolve(lm.model, ["resid.0"])
    backend = Counting()
    made = compile_layers(lm, sites, backend)
    for size in range(1, 10):
        capture(made, sites, batch(size))
    assert backend.ran == 9


def test_a_model_that_does_not_compile_is_refused_not_run_uncompiled(lm: LanguageModel) -> None:
    layer = lm.model.model.layers[0]
    forward = layer.forward

    def breaking(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if float(hidden.sum()) > 1e9:
            return hidden
        return forward(hidden, *args, **kwargs)

    layer.forward = breaking
    sites = resolve(lm.model, ["resid.1"])
    with pytest.raises(UsageError, match=r"'tiny-llama' cannot be compiled \(.*Leave out --compile\.") as caught:
        capture(compile_layers(lm, sites, Counting()), sites, batch(2))
    assert "\n" not in str(caught.value)


def test_the_plan_records_compilation_and_an_uncompiled_run_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    backend = Counting()
    monkeypatch.setattr("gsae.harvest.pipeline.compile_layers", lambda lm, sites: compile_layers(lm, sites, backend))
    settings: dict[str, Any] = {"rows": 600, "context_size": 64, "window_rows": 512, "batch_size": 5}
    known = {"model": str(tiny_llama), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "heldout": 0.02}
    config = HarvestConfig(**known, **settings, compile=True)
    store = harvest(config, tmp_path / "store")
    assert store is not None
    assert store.plan.model.compile
    assert backend.ran > 0
    with pytest.raises(IncompatibleError, match=r"model\.compile was True, now None"):
        harvest(config.model_copy(update={"compile": False}), tmp_path / "store")
    plain = harvest(HarvestConfig(**known, **settings), tmp_path / "plain")
    assert plain is not None
    assert "compile" not in plain.plan.model.model_dump()
    for (source, rows), (plain_source, plain_rows) in zip(
        store.site("mlp.1").in_order(), plain.site("mlp.1").in_order(), strict=True
    ):
        assert (source == plain_source).all()
        torch.testing.assert_close(rows, plain_rows)


def test_compile_with_a_device_map_is_refused() -> None:
    done = gsae("harvest", "--model", "m", "--dataset", "d", "--site", "mlp.1", "--out", "x", "--compile",
                "--device-map", "auto")  # fmt: skip
    assert done.returncode == 2
    assert "compile: cannot be used with device_map" in done.stderr
