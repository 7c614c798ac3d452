"""Settings of a run, the sweep syntax and config.toml."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsae.errors import NotFoundError, UsageError
from gsae.train import RunConfig, SAEConfig, load_sweep, parse_sae
from gsae.train.run.config_file import Recorded, from_toml, to_toml


def sae(**values: Any) -> SAEConfig:
    return SAEConfig(**({"arch": "gated", "d_sae": 8, "l1_coefficient": 0.1} | values))


def test_a_sweep_line_is_a_grid() -> None:
    saes = parse_sae("gated width=4096,8192 l1=.06,.12 seed=0,1 lr=1e-3")
    assert len(saes) == 8
    assert {(s.d_sae, s.l1_coefficient, s.seed) for s in saes} == {
        (w, l1, seed) for w in (4096, 8192) for l1 in (0.06, 0.12) for seed in (0, 1)
    }
    assert all(s.lr == 1e-3 and s.arch == "gated" for s in saes)


def test_a_toml_sweep_means_the_same_as_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        '[[sae]]\narch = "gated"\nwidth = [4096, 8192]\nl1 = [0.06, 0.12]\n\n'
        '[[sae]]\narch = "relu"\nwidth = 6144\nl1 = 0.04\nlr = 7.5e-4\n'
    )
    assert load_sweep(file) == (
        *parse_sae("gated width=4096,8192 l1=.06,.12"),
        *parse_sae("relu width=6144 l1=.04 lr=7.5e-4"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gated wdith=8 l1=1", "There is no SAE setting 'wdith'. Did you mean 'width'?"),
        ("gated width=0 l1=1", "Setting width: got 0; needed: greater than or equal to 1."),
        ("gated width=8 l1=-1", "Setting l1: got -1; needed: greater than or equal to 0."),
        ("gated width=8 l1=nan", "Setting l1: got nan; needed: a finite number."),
        ("topk width=8 l1=1", "Setting arch: got 'topk'; needed: one of gated, relu, rescale-shift."),
        ("gated width=8", "needs 'l1'"),
        ("gated l1=1", "needs 'width'"),
        ("gated width=8 l1=1 width=9", "occurs twice"),
        ("gated width=8 l1=a", "Setting l1: got 'a'; needed: a number."),
        ("gated width=8 l1=1,", "Setting l1: got ''; needed: a number."),
        ("gated width=8.5 l1=1", "Setting width: got 8.5; needed: "),
        ("gated width=8 l1", "Expected key=value"),
        ("width=8 l1=1", "begins with its architecture"),
        ("", "begins with its architecture"),
    ],
)
def test_a_wrong_sweep_line_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse_sae(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[sea]]\narch = 'gated'", "Did you mean 'sae'"),
        ("[[sae]]\narch = 'gated'\nwidht = 8\nl1 = 1", "Did you mean 'width'"),
        ("[[sae]]\narch = 'gated'\nwidth = []\nl1 = 1", "empty list"),
        ("[[sae]]\narch = 'gated'\nwidth = 8\nd_sae = 9\nl1 = 1", "same setting"),
        ("sae = 3", "no [[sae]] table"),
        ("", "no [[sae]] table"),
        ("[[sae", "cannot be read as TOML"),
    ],
)
def test_a_wrong_sweep_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_sweep(file)
    assert "\n" not in str(caught.value)


def test_a_sweep_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no\.toml"):
        load_sweep(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "Setting steps: got 0; needed: greater than or equal to 1."),
        ({"step": 1}, "Did you mean 'steps'"),
        ({"adam_betas": (0.9, 0.999)}, "first must be 0"),
        ({"adam_betas": (0.0, 1.0)}, "between 0 and 1"),
        ({"saes": ()}, "Setting saes: got (); needed: "),
        ({"saes": (sae(), sae())}, "listed 2 times"),
        ({"saes": (sae(lr=2e-3), sae())}, "listed 2 times"),
        ({"saes": (sae(name="a"), sae(seed=1, name="a"))}, "called 'a'"),
    ],
)
def test_a_wrong_run_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        RunConfig(**({"site": "mlp.1", "steps": 10, "saes": (sae(),)} | settings))
    assert "\n" not in str(caught.value)


def test_names_mention_the_rate_only_where_they_would_be_shared() -> None:
    run = RunConfig(site="mlp.1", steps=10, saes=(*parse_sae("gated width=8 l1=.06 lr=1e-3,2e-3"), sae(seed=3)))
    assert [s.name for s in run.named_saes()] == [
        "gated-w8-l1_0.06-seed0-lr_0.001",
        "gated-w8-l1_0.06-seed0-lr_0.002",
        "gated-w8-l1_0.1-seed3",
    ]


@given(
    st.builds(
        RunConfig,
        site=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        steps=st.integers(1, 10**9),
        lr=st.floats(1e-9, 1e3),
        adam_eps=st.floats(1e-30, 1e30),
        threads=st.none() | st.integers(1, 64),
        precision=st.sampled_from(["float32", "bfloat16"]),
        saes=st.lists(
            st.builds(
                SAEConfig,
                arch=st.sampled_from(["gated", "relu"]),
                d_sae=st.integers(1, 2**30),
                l1_coefficient=st.floats(0, 1e20),
                lr=st.none() | st.floats(1e-9, 1e3),
            ),
            min_size=1,
            max_size=1,
        ).map(tuple),
    )
)
def test_config_toml_is_read_back_as_it_was(run: RunConfig) -> None:
    resolved = run.resolved(device="cpu", threads=2)
    store = {"paths": ['/a "b"\\c', "s3://b"], "digest": "0" * 64}
    recorded = Recorded(resolved, store, [{"torch": "2.11"}, {"torch": "2.12"}])
    text = to_toml(recorded)
    assert tomllib.loads(text)["store"]["paths"] == ['/a "b"\\c', "s3://b"]
    assert from_toml(text) == recorded
