"""The examples of docs/extending.md, added to a copy of gsae as the page says, work."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from gsae.store import Store
from gsae.train import load_sae

pytestmark = pytest.mark.slow  # each example runs in a copy of the package
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(python|diff) title="([^"]*)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in which every file of the page is added and every line changed."""
    parent = tmp_path_factory.mktemp("extended")
    package = parent / "gsae"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/", "docs/", ".")):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_bytes((ROOT / name).read_bytes())
    for kind, name, text in BLOCK.findall((ROOT / "docs" / "extending.md").read_text()):
        file = package / name
        if kind == "python":
            assert not file.exists(), name
            file.write_text(text)
        else:
            lines = text.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            assert file.read_text().count(before) == 1, (name, before)
            file.write_text(file.read_text().replace(before, after))
    return parent


def run(extended: Path, *arguments: Any) -> str:
    """Run Python with the extended copy as `gsae`; return its output."""
    environment = os.environ | {"PYTHONPATH": str(extended)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=extended, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_architecture_trains_and_is_saved(extended: Path, tiny_store: Store, tmp_path: Path) -> None:
    run(extended, "-m", "gsae.cli", "train", tiny_store.locations[0], "--site", "mlp.1", "--sae", "tanh width=48 l1=.1",
        "--steps", 5, "--batch-size", 64, "--threads", 1, "--device", "cpu", "--out", tmp_path / "run")  # fmt: skip
    (saved,) = (tmp_path / "run" / "saes").iterdir()
    assert saved.name == "tanh-w48-l1_0.1-seed0"
    assert load_sae(saved).params.W_dec.shape == (48, 32)


def test_a_text_source_gives_its_documents(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    code = "import sys; from gsae.harvest import documents; print([d.content for d in documents(sys.argv[1]).read()])"
    assert run(extended, "-c", code, f"lines:{tmp_path / 'notes.txt'}") == "['one', 'two']\n"


def test_a_codec_keeps_the_rows_and_other_readers_have_it(extended: Path, tiny_store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run(extended, "-m", "gsae.cli", "copy", tiny_store.locations[0], copy, "--codec", "gzip", "--level", 6)
    run(extended, "-m", "gsae.cli", "verify", copy, "--deep")
    code = "import sys, gsae; print(gsae.open_store(sys.argv[1]).digest)"
    assert run(extended, "-c", code, copy).strip() == tiny_store.digest
    made, original = (zarr.open_array(f"{at}/train/mlp.1", mode="r")[:100] for at in (copy, tiny_store.locations[0]))
    assert np.array_equal(np.asarray(made).view(np.uint16), np.asarray(original).view(np.uint16))


def test_an_exporter_writes_its_format(extended: Path, tmp_path: Path) -> None:
    sae = ROOT / "tests" / "golden" / "v1" / "saes" / "gated-w12-l1_0.05-seed0"
    run(extended, "-m", "gsae.cli", "export", sae, "--format", "numpy", "--out", tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "decoder.npy"), load_sae(sae).params.W_dec.numpy())


def test_a_command_prints(extended: Path, tiny_store: Store) -> None:
    assert run(extended, "-m", "gsae.cli", "digest", tiny_store.locations[0]).strip() == tiny_store.digest
    assert "Print the digest of a store." in run(extended, "-m", "gsae.cli", "--help")
