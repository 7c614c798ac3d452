"""What a group resumes from: one safetensors file, with one JSON string in its header. Nothing in it runs on loading.

It is written under a temporary name, synced and renamed, so that it is whole or absent whenever the process is killed.
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
    """A group after `step` batches.

    reader: the position in the data. digest: of the store. metrics_bytes: the size of the metrics file of the group.
    tensors: weights, optimiser state and counters, by the names that the group gives them.
    """

    step: int
    reader: dict[str, int]
    digest: str
    metrics_bytes: int
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint of a group. Raises SpaceError if the disk is full."""
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
    """The checkpoint of a group, or None if there is none yet. Raises CorruptError if it cannot be read.

    only: read the tensors of these names that it has; None for all.
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
        raise CorruptError(f"{path} is not a checkpoint of gsae, or is damaged: {error}") from None
