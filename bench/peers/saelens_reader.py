"""SAELens's reading of cached activations, for bench/reader.py, run in the peers' environment."""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, MIX = 4096, 32
PEER_ROWS, PEER_CONTEXT, PEER_DTYPES, HOOK = 1 << 17, 128, ("float32", "float16"), "hook"


def saelens(work: Path, threads: int) -> int:
    """Answer each line, a dtype, with rows a second of SAELens's cached path."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    stores: dict[str, Iterator[Any]] = {}
    for line in sys.stdin:
        dtype = line.strip()
        if dtype not in stores:
            stores[dtype] = activations_store(work, dtype)
            next(stores[dtype])
        rows, started = 0, time.perf_counter()
        while rows < PEER_ROWS:
            rows += len(next(stores[dtype]))
        print(rows / (time.perf_counter() - started), flush=True)
    return 0


def activations_store(work: Path, dtype: str) -> Iterator[Any]:
    """Open SAELens's store over a cache of our rows, writing the cache if it is not there."""
    import torch
    from datasets import Array2D, Dataset, Features
    from sae_lens.training.activations_store import ActivationsStore

    bits = np.load(work / "rows.npy", mmap_mode="r")
    d_in, place = bits.shape[1], work / f"saelens-{dtype}"
    if not place.exists():
        features = Features({HOOK: Array2D(shape=(PEER_CONTEXT, d_in), dtype=dtype)})
        values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(getattr(torch, dtype))
        Dataset.from_dict({HOOK: values.reshape(-1, PEER_CONTEXT, d_in).numpy()}, features=features).save_to_disk(place)
    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=PEER_CONTEXT,
        d_in=d_in,
        n_batches_in_buffer=2 * BATCH // PEER_CONTEXT,
        total_training_tokens=1 << 30,
        store_batch_size_prompts=32,
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=dtype,
        cached_activations_path=str(place),
    )
