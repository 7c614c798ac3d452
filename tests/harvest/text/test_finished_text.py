"""Tokens are made once: after them a harvest needs neither the text nor the Hub, and still refuses another text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gsae.errors import IncompatibleError, NotFoundError
from gsae.harvest import HarvestConfig, harvest, harvest_tokens
from gsae.tests.support.children import files

pytestmark = pytest.mark.slow


def config(model: Path, dataset: str, **changed: Any) -> HarvestConfig:
    settings: dict[str, Any] = {"sites": ("mlp.1",), "context_size": 64, "window_rows": 1024, "threads": 1}
    return HarvestConfig(model=str(model), dataset=dataset, **(settings | changed))


def written(folder: Path, name: str, count: int = 30) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("some words of text " * 50)
    else:
        path.write_text("".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(count)))
    return path


class Stream:
    """The part of a stream of `datasets` that is used."""

    def iter(self, batch_size: int) -> Any:
        yield {"text": [f"document {n} " * 9 for n in range(30)]}


def no_network(*_: Any, **__: Any) -> Any:
    pytest.fail("the Hub was asked")


@pytest.mark.parametrize("dataset", ["text/a.jsonl", "text", "text/*.jsonl", "text/b.txt"])
def test_a_harvest_goes_on_without_the_files_of_its_text(tiny_llama: Path, tmp_path: Path, dataset: str) -> None:
    written(tmp_path, "text/b.txt" if dataset.endswith("txt") else "text/a.jsonl")
    asked = config(tiny_llama, str(tmp_path / dataset), heldout=0.0)
    harvest_tokens(asked, tmp_path / "moved")
    harvest(asked, tmp_path / "direct")
    shutil.rmtree(tmp_path / "text")
    harvest_tokens(asked, tmp_path / "moved")
    harvest(asked, tmp_path / "moved")
    harvest(asked, tmp_path / "moved")
    assert files(tmp_path / "moved") == files(tmp_path / "direct")


def test_a_harvest_goes_on_without_the_hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsae.harvest.text.hub_datasets.pin", lambda kind, name, revision: "0" * 40)
    monkeypatch.setattr("gsae.harvest.text.hub_datasets.load_rows", lambda *_, **__: Stream())
    asked = config(tiny_llama, "owner/name")
    harvest_tokens(asked, tmp_path / "store")
    monkeypatch.setattr("gsae.harvest.text.hub_datasets.pin", no_network)
    monkeypatch.setattr("gsae.harvest.text.hub_datasets.load_rows", no_network)
    for other, said in (
        (config(tiny_llama, "owner/other"), "dataset.id was 'owner/name', now 'owner/other'"),
        (config(tiny_llama, "owner/name", split="test"), "dataset.split was 'train', now 'test'"),
        (config(tiny_llama, "owner/name", dataset_revision="1" * 40), "dataset.revision was '0000"),
        (config(tiny_llama, "owner/name", text_field="body"), "dataset.text_field was 'text', now 'body'"),
        (config(tiny_llama, "owner/name", max_documents=3), "dataset.max_documents was None, now 3"),
    ):
        with pytest.raises(IncompatibleError, match=said):
            harvest(other, tmp_path / "store")
    store = harvest(asked, tmp_path / "store")
    assert store is not None
    assert store.plan.dataset.revision == "0" * 40


def test_a_text_that_changed_after_its_tokens_is_refused_with_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, f"text/{name}")
    asked = config(tiny_llama, str(tmp_path / "text"))
    harvest_tokens(asked, tmp_path / "store")
    written(tmp_path, "text/b.jsonl", count=31)
    with pytest.raises(IncompatibleError, match=r"dataset\.files\.b\.jsonl was '[0-9a-f]{64}', now "):
        harvest(asked, tmp_path / "store")


def test_unfinished_tokens_still_need_the_text(tiny_llama: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl")
    asked = config(tiny_llama, str(path))
    harvest_tokens(asked, tmp_path / "store")
    (tmp_path / "store/tokens/made.json").unlink()
    path.unlink()
    with pytest.raises(NotFoundError, match="There is no text"):
        harvest_tokens(asked, tmp_path / "store")
