"""What does harvesting add to the language model's own forward passes?

Run as `.venv/bin/python bench/harvest.py [--dataset speeches.jsonl.gz]`. Three sites of SmolLM2-135M in bfloat16 on the
CPU, context 256. Compared in one run, in turn: a whole harvest, from its first forward pass to its manifest (rows
scattered, encoded, summed and published meanwhile), and a bare loop over the same batches that ends each pass where the
last site is seen and keeps nothing. The limit is the bare loop.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gsae.harvest import HarvestConfig, LanguageModel, Stage, harvest, load_lm, resolve
from gsae.store import SPLITS, Store, order

MODEL, SITES, CONTEXT_SIZE = "builtin:smollm2-135m", ("mlp.10", "attn.10", "resid.15"), 256
NEEDED = 0.9


class Seen(Exception):  # noqa: N818  (the way out of a pass)
    """The last site was reached."""


def main() -> int:
    """Print one JSON line a round and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="builtin:pydoc")
    parser.add_argument("--rows", type=int, default=1 << 15)
    parser.add_argument("--window-rows", type=int, default=1 << 13)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = HarvestConfig.parse(
        model=MODEL,
        dataset=options.dataset,
        sites=SITES,
        rows=options.rows,
        window_rows=options.window_rows,
        context_size=CONTEXT_SIZE,
        batch_size=8,
        heldout=0.02,
    )
    lm = load_lm(MODEL)
    ratios, store = [], None
    for number in range(options.rounds + 1):  # the first only warms up
        root = Path(tempfile.mkdtemp(prefix="gsae-harvest-"))
        try:
            seconds, store = whole(config, lm, root / "store")
            batches = batches_of(store)
            bare = loop(lm, batches)
            size = sum(path.stat().st_size for path in (root / "store").rglob("*") if path.is_file())
        finally:
            shutil.rmtree(root)
        tokens = sum(batch.size for batch in batches)
        if number:
            ratios.append(bare / seconds)
            line = {"what": "round", "tokens_per_second": {"harvest": tokens / seconds, "bare": tokens / bare}}
            print(json.dumps(line | {"of_bare": round(bare / seconds, 4)}), flush=True)
    rows = 0 if store is None else store.plan.rows + store.plan.heldout_rows
    figures = {"of_bare": round(median(ratios), 4), "needed": NEEDED, "bytes_a_row": round(size / rows), "sites": SITES}
    print(json.dumps({"bench": "harvest", "met": median(ratios) >= NEEDED, **figures}))
    return 0 if median(ratios) >= NEEDED else 1


def whole(config: HarvestConfig, lm: LanguageModel, out: Path) -> tuple[float, Store]:
    """Harvest with a model that is loaded; return the seconds from the first forward pass on, and the store."""
    begun: list[float] = []

    def listen(event: Any) -> None:
        if isinstance(event, Stage) and event.name == "running the model":
            begun.append(time.perf_counter())

    store = harvest(config, out, listen, load=lambda _: lm)
    if store is None:
        raise SystemExit("The harvest was not finished.")
    return time.perf_counter() - begun[0], store


def batches_of(store: Store) -> list[np.ndarray[Any, Any]]:
    """Return the token ids of every forward pass of a harvest, (contexts, context_size) each."""
    plan, tokens, split = store.plan, store.tokens(), store.split()
    mask = order.row_mask(tokens, plan.tokenizer.excluded_ids, plan.dropped_positions)
    counts = mask.sum(axis=1, dtype=np.int64)
    found = []
    for name in SPLITS:
        wanted = plan.requested_rows if name == "train" else None
        laid = order.layout(split, counts, name, plan.seed, plan.window_rows, wanted)
        for number in range(-(-laid.rows // plan.window_rows)):
            own = laid.window(number)
            found += [tokens[own.contexts[batch]] for batch in order.batches(len(own.contexts), plan.batch_size)]
    return found


def loop(lm: LanguageModel, batches: list[np.ndarray[Any, Any]]) -> float:
    """Return the seconds of the bare passes."""
    last = lm.model.get_submodule(resolve(lm.model, SITES)[-1].module)

    def leave(*_: Any) -> None:
        raise Seen

    handle, started = last.register_forward_hook(leave), time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            try:
                lm.model(input_ids=torch.from_numpy(batch).long(), use_cache=False)
            except Seen:
                continue
    handle.remove()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
