"""Quantised checkpoints: what config.json says of the quantisation, and whether transformers can run it here.

transformers does the work, by its `quantization_config`; gsae never dequantises or quantises anything. Where
transformers itself dequantises the weights while it loads them, the plan says so. Checking costs an import.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from gsae.errors import IncompatibleError, UsageError
from gsae.harvest.hub import one_line, quiet
from gsae.store import ModelSource, QuantizationSource

from .devices import Placement
from .model_files import config_parts

# Methods that run on a GPU alone. On a CPU transformers refuses some of them and dequantises the weights of others.
NEED_GPU = {"eetq", "fbgemm_fp8", "fouroversix", "fp8", "fp_quant", "higgs", "metal", "mxfp4", "mxfp8", "nvfp4"}
NEED_GPU |= {"spqr", "vptq"}
# The packages, besides transformers and torch, that compute with the weights of a method.
PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round", "gptqmodel"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": ("kernels",),
    "fbgemm_fp8": ("fbgemm-gpu",),
    "fp8": ("kernels", "triton"),
    "fp_quant": ("fp-quant", "qutlass"),
    "gptq": ("gptqmodel", "optimum"),
    "higgs": ("flute-kernel", "fast-hadamard-transform"),
    "hqq": ("hqq",),
    "mxfp4": ("kernels", "triton"),
    "mxfp8": ("kernels", "triton"),
    "nvfp4": ("kernels",),
    "quanto": ("optimum-quanto",),
    "quark": ("amd-quark",),
    "sinq": ("sinq",),
    "spqr": ("spqr-quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
# Ends of the names of tensors that quantised weights bring and plain ones do not.
QUANTISED_TENSORS = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".qweight",
    ".qzeros",
    ".weight.absmax",
    ".SCB",
    "_blocks",
)


def quantisation_of(directory: Path) -> dict[str, Any] | None:
    """Return the quantization_config of the model in a directory, None if its weights are plain."""
    found = (part.get("quantization_config") for part in config_parts(directory))
    return next((config for config in found if isinstance(config, dict) and config), None)


def recorded(config: dict[str, Any] | None, dequantized: bool = False) -> QuantizationSource | None:
    """Return what the plan records of a quantization_config. dequantized: transformers dequantised the weights."""
    if config is None:
        return None
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return QuantizationSource(method=_method(config), sha256=digest, dequantized=dequantized)


def check_runs(config: dict[str, Any], dtype: str, where: Placement, model: str) -> None:
    """Raise UsageError if a quantised model cannot be loaded, or not in `dtype`, on the devices of `where`.

    model: its name, for the message.
    """
    method = _method(config)
    said = f"Model {model!r} is quantised by {method}"
    if method in NEED_GPU and where.spread is None and where.device.type == "cpu":
        raise UsageError(f"{said}, which needs a GPU. Use --device cuda on a machine with one.")
    with quiet(bars=False):
        from transformers.quantizers.auto import AutoHfQuantizer

        try:
            quantisers: Any = AutoHfQuantizer
            if not quantisers.supports_quant_method(config):
                raise ValueError("this version of transformers does not know it")
            quantiser = quantisers.from_config(copy.deepcopy(config), pre_quantized=True)
            quantiser.validate_environment(device_map=where.spread or one_device(where.device), weights_only=True)
            wanted = getattr(torch, dtype)
            given = quantiser.update_dtype(wanted)
        except Exception as error:  # transformers raises many types
            raise UsageError(f"{said}, which cannot be loaded here: {one_line(error)}.") from None
    if given != wanted:
        name = str(given).removeprefix("torch.")
        raise UsageError(f"{said}, which runs in {name} here, not in {dtype}. Use --dtype {name}.")


def one_device(device: torch.device) -> dict[str, str] | None:
    """Return the map with which transformers loads a quantised model onto one device."""
    # Some loaders take the first GPU if nothing is said; some refuse a map that names the CPU.
    return {"": str(device)} if device.type != "cpu" or torch.cuda.is_available() else None


def check_plain(unexpected: list[str], model: str) -> None:
    """Raise UsageError if weights that were loaded as plain ones brought tensors of quantised ones."""
    odd = next((name for name in unexpected if name.endswith(QUANTISED_TENSORS)), None)
    if odd:
        raise UsageError(
            f"The weights of model {model!r} are quantised ({odd}), and its config.json has no quantization_config."
        )


def check_same_quantisation(found: QuantizationSource | None, planned: ModelSource, model: str) -> None:
    """Raise IncompatibleError if a model is quantised in another way than the one that a store was made with.

    Stores of versions that did not record the quantisation pass.
    """
    if planned.quantization not in (None, found):
        what = "would be dequantised" if found and found.dequantized else "are quantised in another way"
        raise IncompatibleError(
            f"The weights of model {model!r} {what} here than those that the store was made with "
            f"({planned.quantization and planned.quantization.method})."
        )


def _method(config: dict[str, Any]) -> str:
    if config.get("load_in_4bit") or config.get("load_in_8bit"):  # written by old versions, without a method
        return "bitsandbytes"
    return str(config.get("quant_method") or "an unnamed method")
