"""Every causal language model of transformers: its sites pass a check that shares nothing with the search, or it is
in a list with the reason.

The check is the arithmetic of the residual stream. With hooks of its own, it fits the output of each layer to its
input, what `mlp.L` holds, and what the projections of `attn.L` and `mixer.L` give (through the module that follows,
such as a norm), each times one number. A site that holds anything else leaves a rest.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gsae.errors import UsageError
from gsae.harvest import survey
from gsae.tests.support.causal_lms import tiny_model
from gsae.tests.support.recorded_pass import Recorded, recorded

NOT_BUILT = {
    "gemma3n": "needs timm",
    "gemma4_assistant": "a draft model: all its layers take their keys from another model, and none has them here",
    "gemma4_unified_assistant": "a draft model, as above",
    "musicgen": "its config is that of three models, and its class takes that of the decoder",
    "musicgen_melody": "its config is that of three models, and its class takes that of the decoder",
}
REFUSED = {
    "blt": "several residual streams \\(model.local_encoder.layers, model.patcher.layers\\)",
    "cpmant": "is \\(2, 48, 32\\)",
    "deepseek_v4": "is \\(2, 16, 4, 32\\)",
    "gemma3n_text": "is \\(4, 2, 16, 32\\)",
    "hrm_text": "runs 6 times",
    "hy_v4": "is \\(2, 16, 4, 32\\)",
    "prophetnet": "is \\(2, 48, 32\\)",
    "qwen4_exp": "is \\(2, 16, 128\\); \\(2, 16, 32\\) is needed",
    "qwen4_exp_text": "is \\(2, 16, 128\\); \\(2, 16, 32\\) is needed",
    "reformer": "is not the input of",
    "xlm": "is not the input of",
    "xlnet": "is \\(16, 2, 32\\)",
}
# The projections of mixers that run beside an attention.
BESIDE = {"falcon_h1": "mamba.out_proj"}
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1]).double()


def rest(target: Tensor, terms: list[Tensor]) -> float:
    """Return what is left of a stream after the best sum of terms, each times a number, and of one vector."""
    centred = [flat(v) - flat(v).mean(0) for v in (target, *terms)]
    columns = torch.stack([v.reshape(-1) for v in centred[1:]], 1)
    wanted = centred[0].reshape(-1, 1)
    solution = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
    assert (solution.abs() > 1e-3).all(), "a part is not added at all"
    return float((wanted - columns @ solution).norm() / wanted.norm())


def followers(seen: Recorded, layer: str, output: Tensor) -> list[Tensor]:
    """Return the output of a projection, and what each module of its layer that gets just that makes of it."""
    found = [output]
    for path, (given, gave) in seen.items():
        same = isinstance(given, Tensor) and isinstance(gave, Tensor) and path.startswith(f"{layer}.")
        if same and given.shape == output.shape and torch.equal(given, output) and gave.shape == output.shape:
            found.append(gave)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_BUILT and name not in REFUSED])
def test_the_sites_of_a_family_add_up_to_its_residual_stream(family: str) -> None:
    model = tiny_model(family)
    found = survey(model)
    sites = {site.name: site for site in found.sites}
    tokens = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    seen = recorded(model, tokens)
    paths = {int(name[6:]): site.module for name, site in sites.items() if name.startswith("resid.")}
    assert len(paths) >= 2
    for this, following in pairwise(paths.values()):
        assert torch.equal(seen[this][1], seen[following][0])
    assert torch.equal(seen[sites["embed"].module][0], seen[paths[0]][0])
    for number, layer in paths.items():
        before, after = seen[layer]
        assert after.shape == (2, 11, sites[f"resid.{number}"].d_in)
        mixers = [sites[name] for name in (f"attn.{number}", f"mixer.{number}") if name in sites][:1]
        for site in mixers:
            given, gave = seen[site.module]
            assert given.shape[-1] == site.d_in
            with torch.no_grad():
                torch.testing.assert_close(flat(model.get_submodule(site.module)(given)), flat(gave))
        if f"mlp.{number}" not in sites:
            continue
        mlp = sum(seen[path][1].reshape(after.shape) for path in sites[f"mlp.{number}"].module.split(" + "))
        parts = followers(seen, layer, seen[mixers[0].module][1].reshape(after.shape)) if mixers else []
        beside = [seen[f"{layer}.{BESIDE[family]}"][1]] if family in BESIDE else []
        if parts:
            assert min(rest(after, [before, mlp, part, *beside]) for part in parts) < 1e-5, f"layer {number}"
            assert rest(after, [before, mlp]) > 1e-3
        elif f"mixer.{number}" not in found.missing or "nothing" in found.missing[f"mixer.{number}"]:
            assert rest(after, [before, mlp]) < 1e-5
        if f"resid_mid.{number}" in sites:
            assert rest(after, [seen[sites[f"resid_mid.{number}"].module][0], mlp]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_without_one_residual_stream_is_refused_with_what_was_found(family: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[family]) as caught:
        survey(tiny_model(family))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(NOT_BUILT))
def test_a_family_that_is_not_built_here_cannot_be_built(family: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        tiny_model(family)


def test_nearly_every_family_has_its_residual_stream() -> None:
    built = [family for family in FAMILIES if family not in NOT_BUILT]
    assert len(REFUSED.keys() & set(built)) <= 0.07 * len(built)
