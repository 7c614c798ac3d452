"""What a harvest would need in bytes, memory and time, and whether the disk has room for it.

With the measurements of a short run (`probe_run.py`) the compression ratio and the time are measured on this machine.
Without them the ratio is the one that is typical of the codec, and the time is unknown. Estimating costs nothing.
"""

import shutil
from pathlib import Path
from typing import Any

from gsae.errors import SpaceError
from gsae.store import DTYPE_BYTES, row_codec

from .config import HarvestConfig
from .probe_run import Probe
from .request import Request
from .window_buffers import BUFFERS

# Of each row's source and its share of the tokens, before compression.
BYTES_BESIDE_A_ROW = 12
# Python, the libraries, batches on their way, a chunk for each thread: measured by bench/harvest.py --part memory.
BESIDE_BYTES = 1 << 30


def estimate_harvest(request: Request, out: Path, probe: Probe | None = None) -> dict[str, Any]:
    """Return what a harvest would need, for `--dry-run`; what follows from the number of rows is None if it is unknown.

    probe: measurements of a short run. Without it `seconds` is None and `ratio` is the codec's typical one. Memory is
    that of one worker, with the model's weights.
    """
    config, rows = request.config, request.config.rows
    heldout = None if rows is None else int(rows * config.heldout_share / (1 - config.heldout_share))
    every = None if rows is None or heldout is None else rows + heldout
    row_bytes = sum(site.d_in for site in request.sites) * DTYPE_BYTES[config.dtype]
    window = config.window_rows if every is None else min(config.window_rows, every)
    contexts_per_row = probe.contexts_per_row if probe else 1 / (config.context_size - 1)
    contexts = None if every is None else int(every * contexts_per_row) + 1
    windows = None if rows is None or heldout is None else sum(-(-n // config.window_rows) for n in (rows, heldout))
    seconds = None if probe is None or contexts is None else contexts * config.context_size / probe.tokens_per_second
    return {
        "model": request.model_id,
        "dataset": request.text.source.id,
        "sites": {site.name: {"d_in": site.d_in, "module": site.module} for site in request.sites},
        "context_size": config.context_size,
        "batch_size": probe.batch_size if probe else config.batch_size,
        "rows": rows,
        "heldout_rows": heldout,
        "contexts": contexts,
        "windows": windows,
        "raw_bytes": None if every is None else every * row_bytes,
        "ratio": probe.ratios if probe else typical_ratio(config),
        "ratio_is": f"measured on {probe.rows} rows" if probe else f"typical of {config.codec} {config.level}",
        "nonfinite_rows": probe.nonfinite if probe else None,
        "disk_bytes": None if every is None else _disk_bytes(request, every, probe),
        "free_bytes": free_bytes(out),
        "model_bytes": request.model_bytes,
        "window_memory_bytes": BUFFERS * window * row_bytes,
        "memory_bytes": request.model_bytes + BUFFERS * window * row_bytes + BESIDE_BYTES,
        "tokens_per_second": probe.tokens_per_second if probe else None,
        "seconds": seconds,
    }


def check_room(request: Request, rows: int, out: Path) -> None:
    """Raise SpaceError if the disk of `out` has no room for `rows` more rows, unless the settings say `force`."""
    needed, free = _disk_bytes(request, rows, None), free_bytes(out)
    if needed > free and not request.config.force:
        raise SpaceError(
            f"{out} needs about {needed / 1e9:.3g} GB more, and its disk has {free / 1e9:.3g} GB free. "
            "Free some space, harvest fewer rows, or start anyway with --force."
        )


def typical_ratio(config: HarvestConfig) -> float:
    """Return the encoded size over the raw size that is typical of the codec."""
    return row_codec(config.codec).typical_ratio(config.level)


def free_bytes(out: Path) -> int:
    """Return the free bytes of the disk that holds `out`, or will hold it."""
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _disk_bytes(request: Request, rows: int, probe: Probe | None) -> int:
    config = request.config
    ratios = probe.ratios if probe else {site.name: typical_ratio(config) for site in request.sites}
    row = sum(site.d_in * DTYPE_BYTES[config.dtype] * ratios[site.name] for site in request.sites)
    return int(rows * (row + BYTES_BESIDE_A_ROW))
