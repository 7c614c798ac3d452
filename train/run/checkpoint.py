"""What a group of SAEs goes on from: one file, and how a file of a run is replaced.

Everything is written under a temporary name, synced and renamed, so a file is whole or not there, whenever the
process is killed. A checkpoint is tensors with one JSON string in the header: no pickle, nothing that runs on loading.
"""

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from gsae.store import CorruptError, SpaceError

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


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that this one alone writes to.

    safetensors names temporary files of its own, by chance, so nothing replaces them.
    """
    for path in folder.glob(".*tmp*"):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
