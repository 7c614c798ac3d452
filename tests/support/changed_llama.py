"""Copies of a tiny Llama with some weights, or its tokenizer, changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def changed_llama(original: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """Return a copy of a model's folder in which `change` was called with the loaded model."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(original, folder)
    model = AutoModelForCausalLM.from_pretrained(original)
    change(model)
    model.save_pretrained(folder)
    return folder


def overflowing(layer: int) -> Callable[[Any], None]:
    """Return a change after which the MLP of a layer gives more than float16 can hold, on every token."""

    def change(model: Any) -> None:
        model.model.layers[layer].mlp.down_proj.weight.data.mul_(3e4)

    return change
