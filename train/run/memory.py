"""The memory that a run needs, and what is available. Checked before training starts, because the out-of-memory killer
leaves no message.

Counted are weights, second moments, gradients of matrices, the (rows, d_sae) buffers of a dense step, and the buffers
of the reader: what the largest step holds. Allocators and the interpreter need more on top.
"""

from pathlib import Path

import psutil
import torch

from gsae.errors import SpaceError
from gsae.store import Site

from .config import ResolvedRun, ResolvedSAE
from .ranks import Ranks

FLOAT = 4


def parameters(sae: ResolvedSAE, d_in: int) -> int:
    """The number of parameters of an SAE."""
    names = sae.architecture.names()
    matrices = sum(name.startswith("W_") for name in names)
    vectors = len(names) - matrices - 1
    return matrices * sae.d_sae * d_in + vectors * sae.d_sae + d_in


def group_bytes(saes: tuple[ResolvedSAE, ...], d_in: int, run: ResolvedRun) -> int:
    """Bytes that one group needs while it is trained."""
    every = sum(parameters(sae, d_in) for sae in saes)
    buffers = saes[0].architecture.BUFFERS
    half = 2 if run.precision == "bfloat16" else FLOAT
    copies = 2 * every if run.precision == "bfloat16" else 0  # the operands of the products
    if run.on_divergence != "continue" and run.device == "cpu":
        copies += FLOAT * every  # healthy weights, which are kept on the CPU
    return 2 * FLOAT * every + half * every + copies + half * buffers * run.batch_size * sum(s.d_sae for s in saes)


def reading_bytes(site: Site, run: ResolvedRun) -> int:
    """Bytes of the reader's buffers. Files are memory-mapped and not counted."""
    return site.batches(run.batch_size, epochs=None, max_norm_multiple=run.max_norm_multiple).memory


def needed_bytes(site: Site, run: ResolvedRun, ranks: Ranks) -> int:
    """Bytes that this machine needs for a run: those of all groups, or of one group for each of its ranks."""
    groups = sorted((group_bytes(saes, site.d_in, run) for saes in run.groups()), reverse=True)
    if ranks.alone:
        return sum(groups) + reading_bytes(site, run)
    return sum(groups[: ranks.local_world_size]) + ranks.local_world_size * reading_bytes(site, run)


def available_bytes(device: str) -> int:
    """Bytes that are free: on the GPU, or on the machine within the limit of its control group."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free, limited = int(psutil.virtual_memory().available), _control_group()
    return free if limited is None else min(free, limited)


def require_memory(site: Site, run: ResolvedRun, ranks: Ranks) -> None:
    """Raise SpaceError if a run needs more memory than is available."""
    need, there = needed_bytes(site, run, ranks), available_bytes(run.device)
    if need > there:
        raise SpaceError(
            f"The run needs {need / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are available ({run.device}). "
            "Train fewer or narrower SAEs at once, or with a smaller --batch-size."
        )


def _control_group() -> int | None:
    """Bytes that a container with a limit may still allocate (control groups, version 2); None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(cached.get("file", 0))
    except (OSError, ValueError):
        return None
