"""Files that a run leaves behind: its checkpoint, and its SAEs in SAELens's layout.

Everything is written under a temporary name, synced and renamed, so a file is whole or not there, whenever the
process is killed. A checkpoint is tensors with one JSON string in the header: no pickle, nothing that runs on loading.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from gsae.store import CorruptError, Plan, SiteSpec, SpaceError

from .sae import SAELENS_NAMES, Params, folded, names

CHECKPOINT = Path("state") / "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` batches: the reader's position, the store's digest, and the length of metrics.jsonl.

    tensors: weights, second moments and counters of every bank, as the trainer names them.
    """

    step: int
    reader: dict[str, int]
    digest: str
    metrics_bytes: int
    tensors: dict[str, Tensor]


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Replace the run's checkpoint; raises SpaceError where there is no room."""
    (run / CHECKPOINT).parent.mkdir(exist_ok=True)
    header = {
        "step": checkpoint.step,
        "reader": checkpoint.reader,
        "digest": checkpoint.digest,
        "metrics_bytes": checkpoint.metrics_bytes,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {"gsae": json.dumps(header, sort_keys=True)}
    replace_file(run / CHECKPOINT, lambda path: save_file(tensors, path, metadata))


def load_checkpoint(run: Path) -> Checkpoint | None:
    """The run's checkpoint, None where there is none yet; raises CorruptError where it cannot be read."""
    path = run / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["gsae"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return Checkpoint(
            int(header["step"]),
            {str(key): int(value) for key, value in header["reader"].items()},
            str(header["digest"]),
            int(header["metrics_bytes"]),
            tensors,
        )
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is no checkpoint of gsae, or damaged: {error}") from None


def save_sae(
    folder: Path, params: Params, *, scale: float, site: SiteSpec, plan: Plan, gsae: Mapping[str, Any]
) -> None:
    """Write an SAE that was trained on scale * x so that SAELens, and `load_sae`, apply it to raw x.

    The scale is folded into the biases, weights are float32 and W_enc is (d_in, d_sae) as SAELens has it. `gsae`,
    with at least "architecture", becomes `metadata.gsae`. cfg.json comes last: a folder that has it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arch = gsae["architecture"]
    raw = folded(params, scale)
    tensors = {name: getattr(raw, name).float().contiguous() for name in names(arch)}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    d_in, d_sae = tensors["W_enc"].shape
    cfg = {
        "architecture": SAELENS_NAMES[arch],
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site.name.startswith("attn.") else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": plan.model.id,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": site.hook_name,
            "hf_hook_name": site.module,
            "dataset_path": plan.dataset.id,
            "context_size": plan.context_size,
            "prepend_bos": True,
            "gsae": {key: _json_number(value) for key, value in gsae.items()},
        },
    }
    replace_file(folder / "sae_weights.safetensors", lambda path: save_file(tensors, path))
    text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    replace_file(folder / "cfg.json", lambda path: path.write_text(text))


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it; raises SpaceError on a full disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)  # noqa: PTH105  (as the os module documents its atomicity)
        _sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        temporary.unlink(missing_ok=True)
        raise SpaceError(f"No room on the disk for {path}; make some and run the same command again.") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
