"""SAELens's CacheActivationsRunner at its best, for bench/harvest.py, in the peers' environment: one run, its seconds.

Run as `.venv-peers/bin/python bench/peers/saelens_cache.py MODEL TOKENS.npy CACHE MODULE DTYPE`. The contexts come
tokenised, so that only passes and writing are timed; rows are float16, the smallest that it takes.
"""

import json
import logging
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

BATCH_SIZE, BUFFERS, D_IN = 8, 4, 576


def main(model: str, tokens: str, cache: str, module: str, dtype: str) -> None:
    """Run it and print one JSON line."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    contexts = np.load(tokens)
    contexts = contexts[: len(contexts) // (BATCH_SIZE * BUFFERS) * BATCH_SIZE * BUFFERS]
    shutil.rmtree(cache, ignore_errors=True)
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": getattr(torch, dtype)},
        model_batch_size=BATCH_SIZE,
        hook_name=module,
        d_in=D_IN,
        training_tokens=contexts.size,
        context_size=contexts.shape[1],
        new_cached_activations_path=cache,
        # It fills whole buffers, with the text again where there is no more: so a whole number of them.
        buffer_size_gb=(contexts.size // BUFFERS * D_IN * 2 + 1) / 1e9,
        shuffle=False,
        dtype="float16",
        prepend_bos=False,
        streaming=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": contexts.tolist()}))
    runner.activations_store.get_raw_llm_batch()  # warm
    began = time.perf_counter()
    made = runner.run()
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    print(json.dumps({"seconds": seconds, "tokens": len(made) * contexts.shape[1], "bytes": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
