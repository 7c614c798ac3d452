"""The memory that groups of SAEs need, and what is available: on the device, and on the host beside it.

Counted are weights, second moments, gradients of matrices, the (rows, d_sae) buffers of a dense step, the buffers of
the reader, and what checkpoints are copied to. Allocators and the interpreter need more on top. The memory of a CPU and
of Apple's GPU is the host's, and all of it is counted on the device.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gsae.store import Site
from gsae.train.step.gate_capacity import candidates, most_segments

from .checkpoint_writer import writes_behind
from .config import ResolvedRun, ResolvedSAE

FLOAT, COUNTER = 4, 8
CANDIDATE, ENTRY = 20, 60  # bytes in a GPU's lists for each gate that is to be decided, and that may be open
BATCHES_ON_A_GPU = 4  # the one that is read, the one that is copied, and the scaled and the centred one


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, and on a host with other memory than the device."""

    device: int = 0
    host: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.device + other.device, self.host + other.host)

    def within(self, there: "Memory") -> bool:
        """Whether it is no more than what is there."""
        return self.device <= there.device and self.host <= there.host


def parameters(sae: ResolvedSAE, d_in: int) -> int:
    """The number of parameters of an SAE."""
    matrices, vectors = _arrays(sae)
    return matrices * sae.d_sae * d_in + vectors * sae.d_sae + d_in


def _arrays(sae: ResolvedSAE) -> tuple[int, int]:
    """How many parameters of an SAE are (d_sae, d_in), and how many (d_sae,)."""
    names = sae.architecture.names()
    matrices = sum(name.startswith("W_") for name in names)
    return matrices, len(names) - matrices - 1


def group_memory(saes: tuple[ResolvedSAE, ...], d_in: int, run: ResolvedRun) -> Memory:
    """What one group needs while it is trained, without the rows."""
    every, latents = sum(parameters(sae, d_in) for sae in saes), sum(sae.d_sae for sae in saes)
    half = 2 if run.precision == "bfloat16" else FLOAT
    copies = 2 * every if run.precision == "bfloat16" else 0  # the operands of the products
    steps = half * every + copies + half * saes[0].architecture.BUFFERS * run.batch_size * latents
    steps += _sparse_bytes(latents, d_in, len(saes), run)
    device, host = 2 * FLOAT * every + steps, _healthy_bytes(saes, d_in, run)
    if writes_behind(torch.device(run.device)):
        host += _snapshot_bytes(saes, d_in, run)
    return Memory(device, host) if _on_cuda(run) else Memory(device + host)


def _sparse_bytes(latents: int, d_in: int, saes: int, run: ResolvedRun) -> int:
    """Bytes of a GPU's sparse step: encoders and their product in bfloat16, its mask, lists, and errors of the rows."""
    if run.kernels != "triton" or not run.sparse_share:
        return 0
    gates = run.batch_size * latents
    entries = int(run.sparse_share * gates)
    lists = (ENTRY + CANDIDATE * candidates(d_in)) * entries + most_segments(entries) * 2 * FLOAT * d_in
    encoders, product = 2 * latents * d_in, 2 * gates + gates // 8
    return encoders + product + lists + saes * run.batch_size * d_in * (2 + 2 * FLOAT)


def _healthy_bytes(saes: tuple[ResolvedSAE, ...], d_in: int, run: ResolvedRun) -> int:
    """Bytes of the weights that SAEs can go back to, which are kept on the host."""
    return 0 if run.on_divergence == "continue" else FLOAT * sum(parameters(sae, d_in) for sae in saes)


def checkpoint_bytes(saes: tuple[ResolvedSAE, ...], d_in: int, run: ResolvedRun) -> int:
    """Bytes of a group's checkpoint: parameters, second moments, healthy weights, and three counters of each latent."""
    return sum(_state_arrays(saes, d_in)) + _healthy_bytes(saes, d_in, run)


def saved_bytes(sae: ResolvedSAE, d_in: int) -> int:
    """Bytes of the saved weights of an SAE."""
    return FLOAT * parameters(sae, d_in)


def _state_arrays(saes: tuple[ResolvedSAE, ...], d_in: int) -> list[int]:
    """Bytes of each large tensor that a group has on the device and in a checkpoint."""
    matrices, vectors = _arrays(saes[0])
    latents = sum(sae.d_sae for sae in saes)
    return 2 * (matrices * [FLOAT * latents * d_in] + vectors * [FLOAT * latents]) + 3 * [COUNTER * latents]


def _snapshot_bytes(saes: tuple[ResolvedSAE, ...], d_in: int, run: ResolvedRun) -> int:
    """Bytes on the host of the copy that checkpoints are written from."""
    arrays = _state_arrays(saes, d_in)
    return _healthy_bytes(saes, d_in, run) + sum(page_locked(n) if _on_cuda(run) else n for n in arrays)


def page_locked(size: int) -> int:
    """Bytes of page-locked memory that torch takes for `size`: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _on_cuda(run: ResolvedRun) -> bool:
    return run.device.startswith("cuda")


def reading_bytes(site: Site, run: ResolvedRun) -> int:
    """Bytes of the reader's buffers on the host. Files are memory-mapped and not counted."""
    size = site.batches(run.batch_size, epochs=None, max_norm_multiple=run.max_norm_multiple).memory
    return page_locked(size) if _on_cuda(run) else size


def reading_memory(site: Site, run: ResolvedRun) -> Memory:
    """What the rows of one stream need."""
    if not _on_cuda(run):
        return Memory(reading_bytes(site, run))
    return Memory(BATCHES_ON_A_GPU * FLOAT * run.batch_size * site.d_in, reading_bytes(site, run))


def available_memory(device: str) -> Memory:
    """What is free on a device, and on its host if that has other memory."""
    return Memory(available_bytes(device), available_bytes("cpu") if device.startswith("cuda") else 0)


def available_bytes(device: str) -> int:
    """Bytes that are free: on the GPU, or on the machine within the limit of its control group."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what torch keeps from groups that are done is free too
        return int(torch.cuda.mem_get_info(device)[0])
    free, limited = int(psutil.virtual_memory().available), _control_group()
    return free if limited is None else min(free, limited)


def _control_group() -> int | None:
    """Bytes that a container with a limit may still allocate (control groups, version 2); None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(cached.get("file", 0))
    except (OSError, ValueError):
        return None
