"""An export format is a function and a line of the registry; the function gets what the command was given."""

from pathlib import Path

import pytest

from gsae.errors import UsageError
from gsae.evaluate import Listen
from gsae.features import EXPORTS, ExportSource, export_sae
from gsae.features.export import registry
from gsae.store import Store
from gsae.tests.support.saes import training_notes, write_sae


def list_files(source: ExportSource, out: Path, listen: Listen) -> Path:
    """An exporter of a few lines: the names of an SAE's files, and the digest of its store."""
    out.mkdir()
    names = sorted(path.name for path in source.sae.iterdir())
    (out / "files.txt").write_text("\n".join([source.open_store().digest, *names]))
    return out


def test_a_new_format_is_a_function_and_a_line(
    tmp_path: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = write_sae(tmp_path / "run", "gated", 0, training_notes(tiny_store))
    monkeypatch.setattr(registry, "EXPORTS", {**EXPORTS, "files": list_files})
    stores = [str(tiny_store.path)]
    for path in (tmp_path / "run" / "gated-0", sae):
        out = export_sae(path, tmp_path / f"out-{path.parent.name}", "files", stores=stores)
        written = (out / "files.txt").read_text().splitlines()
        assert written == [tiny_store.digest, "cfg.json", "sae_weights.safetensors"]


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no export format .delfi.\. Did you mean .delphi."):
        export_sae(tmp_path, tmp_path / "out", "delfi")
    assert list(EXPORTS) == ["dictionary_learning", "delphi", "neuronpedia"]
