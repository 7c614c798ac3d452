"""Models that bring Python code: it runs with consent alone, and its files are part of the plan."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, UsageError
from gsae.harvest import HarvestConfig, capture, harvest, load_lm, load_meta, load_planned, make_request, resolve
from gsae.store import Store, describe
from gsae.tests.support.command import gsae, refused

CONF = """
from transformers import LlamaConfig
class C(LlamaConfig):
    model_type = "my_custom"
"""
MOD = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .conf import C
from .scale import SCALE
(Path(__file__).parent / "ran").touch()
class M(LlamaForCausalLM):
    config_class = C
    def forward(self, input_ids=None, **kwargs):
        return super().forward(inputs_embeds=SCALE * self.model.embed_tokens(input_ids), **kwargs)
"""
FILES = {"conf.py": CONF, "mod.py": MOD, "scale.py": "SCALE = 3.0\n", "notes.py": "raise SystemExit\n"}
AUTO_MAP = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "mod.M"}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test for the code that transformers copies before it imports it."""
    place = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    return place


@pytest.fixture
def custom(tiny_llama: Path, tmp_path: Path) -> Path:
    place = tmp_path / "custom"
    shutil.copytree(tiny_llama, place)
    for name, text in FILES.items():
        (place / name).write_text(text)
    config = json.loads((place / "config.json").read_text()) | {"model_type": "my_custom", "auto_map": AUTO_MAP}
    (place / "config.json").write_text(json.dumps(config))
    return place


def settings_of(model: Path, **more: Any) -> HarvestConfig:
    known: dict[str, Any] = {"model": str(model), "dataset": "builtin:pydoc", "sites": ("mlp.1",), "rows": 300}
    known |= {"context_size": 64, "window_rows": 256, "heldout": 0.02, "device": "cpu"}
    return HarvestConfig(**known | more)


def made(config: HarvestConfig, out: Path) -> Store:
    store = harvest(config, out)
    assert store is not None
    return store


def test_without_consent_nothing_runs_and_nobody_is_asked(
    custom: Path, tmp_path: Path, own_modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", ask)
    said = "Model 'custom' needs code from its own files. Read the .py files in"
    calls = (
        lambda: load_lm(str(custom)),
        lambda: load_meta(str(custom)),
        lambda: make_request(settings_of(custom)),
    )
    for call in calls:
        with pytest.raises(UsageError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "--trust-remote-code" in str(caught.value)
    refused(2, said, "sites", custom)
    command = ["harvest", "--model", custom, "--dataset", "builtin:pydoc", "--site", "mlp.1", "--context-size", 64]
    refused(2, said, *command, "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert not list(own_modules.rglob("ran"))


def test_with_consent_the_rows_are_those_of_the_models_code(custom: Path, tiny_llama: Path) -> None:
    tokens = torch.randint(4, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
    lm, plain = load_lm(str(custom), trust_remote_code=True), load_lm(str(tiny_llama))
    sites = resolve(lm.model, ["resid.0"])
    found, expected = capture(lm, sites, tokens)["resid.0"], []
    plain.model.model.layers[0].register_forward_hook(lambda m, a, out: expected.append(out))
    with torch.no_grad():
        plain.model(inputs_embeds=3 * plain.model.model.embed_tokens(tokens))
    assert torch.equal(found, expected[0])
    done = gsae("sites", custom, "--trust-remote-code", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == gsae("sites", tiny_llama, "--json").stdout


def test_the_plan_has_the_hashes_of_the_files_that_ran(custom: Path, tmp_path: Path) -> None:
    store = made(settings_of(custom, trust_remote_code=True), tmp_path / "store")
    assert list(store.plan.model.code) == ["conf.py", "mod.py", "scale.py"]
    assert store.plan.schema_version == "1.1"
    assert describe(store.path)["code"] == store.plan.model.code
    (store.path / "manifest.json").unlink()
    (store.path / "shards" / "train-00001.json").unlink()
    (custom / "notes.py").write_text("no part of the model")
    assert made(settings_of(custom, trust_remote_code=True), store.path).digest == store.digest
    (store.path / "manifest.json").unlink()
    (store.path / "shards" / "train-00001.json").unlink()
    (custom / "scale.py").write_text("SCALE = 4.0\n")
    with pytest.raises(IncompatibleError, match=r"model\.code\.scale\.py was"):
        harvest(settings_of(custom, trust_remote_code=True), store.path)


def test_loading_the_model_of_a_store_again_needs_consent_and_the_same_code(
    custom: Path, tmp_path: Path, own_modules: Path
) -> None:
    planned = made(settings_of(custom, trust_remote_code=True), tmp_path / "store").plan.model
    with pytest.raises(UsageError, match=r"that model 'custom' brings \(conf\.py, .*with --trust-remote-code"):
        load_planned(planned, str(custom))
    assert load_planned(planned, str(custom), trust_remote_code=True).provenance.weights_sha256
    shutil.rmtree(own_modules)
    (custom / "scale.py").write_text("SCALE = 4.0\n")
    with pytest.raises(IncompatibleError, match=r"other code than the store was made with: scale\.py differs"):
        load_planned(planned, str(custom), trust_remote_code=True)
    assert not list(own_modules.rglob("ran"))


def test_consent_runs_nothing_for_a_store_that_was_made_without_code(
    custom: Path, tiny_llama: Path, tmp_path: Path, own_modules: Path
) -> None:
    """The folder of a Llama that also brings code: transformers has the class itself."""
    config = json.loads((tiny_llama / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (custom / "config.json").write_text(json.dumps(config))
    store = made(settings_of(custom), tmp_path / "store")
    assert store.plan.model.code == {}
    assert store.plan.schema_version == "1.0"
    load_planned(store.plan.model, str(custom), trust_remote_code=True)
    assert not list(own_modules.rglob("ran"))
    (store.path / "manifest.json").unlink()
    with pytest.raises(IncompatibleError, match=r"model\.code was None, now \{'conf\.py'"):
        harvest(settings_of(custom, trust_remote_code=True), store.path)


@pytest.mark.slow
def test_consent_changes_nothing_for_a_model_without_code(tiny_llama: Path, tmp_path: Path) -> None:
    plain = made(settings_of(tiny_llama), tmp_path / "plain")
    trusted = made(settings_of(tiny_llama, trust_remote_code=True), tmp_path / "trusted")
    assert (plain.path / "plan.json").read_bytes() == (trusted.path / "plan.json").read_bytes()
    assert plain.digest == trusted.digest


def test_code_that_cannot_be_checked_is_refused(custom: Path) -> None:
    config = json.loads((custom / "config.json").read_text())
    cases: list[tuple[dict[str, Any], tuple[str, ...], type[GsaeError], str]] = [
        (
            {"AutoConfig": "conf.C", "AutoModelForCausalLM": "a/b--mod.M"},
            (),
            UsageError,
            "in another repository, 'a/b'",
        ),
        (AUTO_MAP, ("scale.py",), NotFoundError, r"The code of model 'custom' is not complete: .*scale\.py"),
        (AUTO_MAP, ("mod.py", "conf.py"), NotFoundError, r"is not in its folder: it has no conf\.py"),
        (AUTO_MAP, ("mod.py",), GsaeError, "'custom' (is not complete|cannot be loaded)"),
    ]
    for auto_map, gone, kind, said in cases:
        (custom / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        for name, text in FILES.items():
            (custom / name).write_text(text)
        for name in gone:
            (custom / name).unlink()
        for call in (load_lm, load_meta):
            with pytest.raises(kind, match=said) as caught:
                call(str(custom), trust_remote_code=True)
            assert "\n" not in str(caught.value)


def test_code_that_changes_while_it_is_loaded_is_noticed(custom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsae.harvest.model import loading

    find = loading.trusted_code

    def then_change(*asked: Any) -> dict[str, str]:
        found = find(*asked)
        (custom / "mod.py").write_text(MOD + "\n# changed\n")
        return found

    monkeypatch.setattr(loading, "trusted_code", then_change)
    with pytest.raises(IncompatibleError, match=r"changed while it was loaded: mod\.py"):
        load_lm(str(custom), trust_remote_code=True)


def test_evaluation_passes_the_consent_on(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsae.commands.language_model import load_effects, load_vocabulary

    asked: list[Any] = []

    def load(*arguments: Any) -> None:
        asked.append(arguments[-1])
        raise UsageError("stop here")

    monkeypatch.setattr("gsae.harvest.load_planned", load)
    for trusted in (False, True):
        for call in (load_effects, load_vocabulary):
            with pytest.raises(UsageError, match="stop here"):
                call(tiny_store, "mlp.1", None, "cpu", trusted)
    assert asked == [False, False, True, True]
    for command in ("eval", "features", "sites", "harvest"):
        assert "--trust-remote-code" in gsae(command, "--help").stdout
