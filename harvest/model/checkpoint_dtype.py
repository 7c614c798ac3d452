"""`--dtype auto`: the number format in which a checkpoint is stored, by its config.json or else by its weights.

It is found before the plan, which records the real one. Reading the header of the weights costs nothing noticeable.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gsae.errors import UsageError
from gsae.harvest.hub import explain
from gsae.store import DTYPE_BYTES

from .model_files import ModelFiles, config_parts, light_directory

# As the headers of safetensors files have them.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn"}
FLOATS |= {"F8_E5M2": "float8_e5m2"}
CHOICE = f"Give --dtype {', '.join(DTYPE_BYTES)}."


def checkpoint_dtype(files: ModelFiles) -> str:
    """Return the dtype of a checkpoint; of an adapter, that of its base.

    Raises UsageError if it has none, or one that a store cannot hold.
    """
    files = files.whole
    if files.is_gguf:
        raise UsageError(f"--dtype auto: model {files.id!r} is a GGUF file, which has no one dtype. {CHOICE}")
    found = _of_config(light_directory(files)) or _of_weights(files)
    if found is None:
        raise UsageError(f"--dtype auto: neither config.json nor the weights of {files.id!r} say their dtype. {CHOICE}")
    if found not in DTYPE_BYTES:
        raise UsageError(f"--dtype auto: model {files.id!r} has dtype {found}, which a store cannot hold. {CHOICE}")
    return found


def _of_config(directory: Path) -> str | None:
    """Return the dtype in config.json: of the model, or else of its text model."""
    for part in config_parts(directory):
        for field in ("dtype", "torch_dtype"):
            if isinstance(part.get(field), str):
                return str(part[field]).removeprefix("torch.")
    return None


def _of_weights(files: ModelFiles) -> str | None:
    """Return the dtype of most of the floating-point values in the weights, which may still be on the Hub."""
    if paths := sorted(files.path.glob("*.safetensors")):
        tensors = [tensor for path in paths for tensor in _header(path).values()]
        return _most((tensor["dtype"], math.prod(tensor["shape"])) for tensor in tensors)
    if paths := sorted(files.path.glob("pytorch_model*.bin")):
        return _most_of_pickles(paths)
    return _of_hub(files) if files.revision else None


def _header(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file: dtype, shape and place of each."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(size) if size <= path.stat().st_size else b"")
        return {name: tensor for name, tensor in tensors.items() if name != "__metadata__"}
    except (ValueError, AttributeError, struct.error):
        raise UsageError(f"{str(path)!r} is not a safetensors file.") from None


def _most(tensors: Iterable[tuple[str, int]]) -> str | None:
    sizes: Counter[str] = Counter()
    for dtype, values in tensors:
        if dtype in FLOATS:
            sizes[FLOATS[dtype]] += values
    return _largest(sizes)


def _most_of_pickles(paths: list[Path]) -> str | None:
    sizes: Counter[str] = Counter()
    for path in paths:
        for tensor in torch.load(path, map_location="meta", weights_only=True, mmap=True).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return _largest(sizes)


def _of_hub(files: ModelFiles) -> str | None:
    from huggingface_hub import get_safetensors_metadata

    try:
        counts = get_safetensors_metadata(files.id, revision=files.revision).parameter_count
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's types
        raise explain("model", files.id, error) from None
    sizes = {FLOATS[dtype]: count for dtype, count in counts.items() if dtype in FLOATS}
    return _largest(sizes)


def _largest(sizes: Mapping[str, int]) -> str | None:
    return max(sizes, key=sizes.__getitem__, default=None)
