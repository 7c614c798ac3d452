"""What a run's groups take of memory, and what there is: told before anything is begun, for nobody hears of it after.

Counted are weights, second moments, the matrices of gradients, the (rows, d_sae) buffers of a dense step, and the
reader's. The sum is what the largest step holds; allocators and the interpreter come on top.
"""

from pathlib import Path

import torch

from gsae.errors import SpaceError
from gsae.store import Site
from gsae.train.architectures.registry import names

from .config import RunConfig, SAEConfig
from .process import device_of
from .ranks import Ranks

FLOAT = 4


def parameters(sae: SAEConfig, d_in: int) -> int:
    """The number of an SAE's parameters."""
    matrices = sum(name.startswith("W_") for name in names(sae.kind))
    vectors = len(names(sae.kind)) - matrices - 1
    return matrices * sae.d_sae * d_in + vectors * sae.d_sae + d_in


def group_bytes(saes: tuple[SAEConfig, ...], d_in: int, run: RunConfig) -> int:
    """Bytes that one group takes while it is trained."""
    every = sum(parameters(sae, d_in) for sae in saes)
    buffers = 2 if saes[0].arch == "relu" else 3
    half = 2 if run.precision == "bfloat16" else FLOAT
    copies = 2 * every if run.precision == "bfloat16" else 0  # the products' operands
    return 2 * FLOAT * every + half * every + copies + half * buffers * run.batch_size * sum(s.d_sae for s in saes)


def reading_bytes(site: Site, run: RunConfig) -> int:
    """Bytes of the reader's buffers; files are mapped beside them."""
    return site.batches(run.batch_size, epochs=None, max_norm_multiple=run.max_norm_multiple).memory


def needed(site: Site, run: RunConfig, ranks: Ranks) -> int:
    """Bytes that this machine must have for a run: all groups at once, or one for each of its ranks."""
    groups = sorted((group_bytes(saes, site.d_in, run) for saes in run.groups()), reverse=True)
    if ranks.alone:
        return sum(groups) + reading_bytes(site, run)
    return sum(groups[: ranks.local_world_size]) + ranks.local_world_size * reading_bytes(site, run)


def available(device: str) -> int:
    """Bytes that are free: of the GPU, or of the machine, as far as its control group allows."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_meminfo(), _control_group()]
    return min((size for size in free if size is not None), default=2**63)


def require_memory(site: Site, run: RunConfig, ranks: Ranks) -> None:
    """Raise SpaceError where a run needs more memory than is available."""
    device = device_of(run)
    need, there = needed(site, run, ranks), available(device)
    if need > there:
        raise SpaceError(
            f"The run needs {need / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are available ({device}). "
            "Train fewer or narrower SAEs at once, or with a smaller --batch-size."
        )


def _meminfo() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _control_group() -> int | None:
    """What a container may still take, where it has a limit (control groups, version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(cached.get("file", 0))
    except (OSError, ValueError):
        return None
