"""What a group of SAEs goes on from: one file, a safetensors file.

Everything is written under a temporary name, synced and renamed, so a file is whole or not there, whenever the
process is killed. A checkpoint is tensors with one JSON string in the header: no pickle, nothing that runs on loading.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from gsae.errors import CorruptError
from gsae.files import replace_file

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A group after `step` batches: the reader's position, the store's digest, and the length of its metrics.

    tensors: weights, the optimiser's state and counters, as the group names them.
    """

    step: int
    reader: dict[str, int]
    digest: str
    metrics_bytes: int
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace a group's checkpoint; raises SpaceError where there is no room."""
    header = {
        "step": checkpoint.step,
        "reader": checkpoint.reader,
        "digest": checkpoint.digest,
        "metrics_bytes": checkpoint.metrics_bytes,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {"gsae": json.dumps(header, sort_keys=True)}
    replace_file(folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata))


def load_checkpoint(folder: Path, only: Sequence[str] | None = None) -> Checkpoint | None:
    """A group's checkpoint, None where there is none yet; only: its tensors of these names, as far as it has them.

    Raises CorruptError where it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["gsae"])
            found = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118  (no mapping)
            tensors = {name: file.get_tensor(name) for name in found}
        return Checkpoint(
            int(header["step"]),
            {str(key): int(value) for key, value in header["reader"].items()},
            str(header["digest"]),
            int(header["metrics_bytes"]),
            tensors,
        )
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is no checkpoint of gsae, or damaged: {error}") from None
