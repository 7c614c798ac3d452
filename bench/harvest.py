"""What does harvesting add to the language model's own forward passes?

Run as `.venv/bin/python bench/harvest.py [--dataset speeches.jsonl.gz]`. Three sites of SmolLM2-135M in bfloat16 on the
CPU, context 256. Compared in one run, in turn: a whole harvest, from its first forward pass to its manifest (rows
scattered, encoded, summed and published meanwhile), and a bare loop over the same batches that ends each pass where the
last site is seen and keeps nothing. The limit is the bare loop.

`--part tokens`: the step before it, from the text's file to the store's arrays on disk, against `tokenizer(list)` alone
on the same documents in memory, in turn, on one core and on all. The limit is the tokenizer alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gsae.harvest import (
    HarvestConfig,
    LanguageModel,
    Stage,
    documents,
    harvest,
    load_lm,
    load_tokenizer,
    request,
    resolve,
    write_tokens,
)
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
    parser.add_argument("--part", choices=["passes", "tokens"], default="passes")
    parser.add_argument("--cores", type=int, help="of --part tokens: on so many cores only")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of --part tokens")
    options = parser.parse_args()
    if options.part == "tokens":
        return tokens_on_cores(options) if options.cores else tokens_part(options)
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


def tokens_part(options: argparse.Namespace) -> int:
    """Print one JSON line a round for one core and for all, and the verdict; return 0 when it is met."""
    ratios: dict[str, float] = {}
    for cores in sorted({1, len(os.sched_getaffinity(0))}):
        command = [sys.executable, *sys.argv, "--cores", str(cores)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        print("\n".join(lines), flush=True)
        ratios[str(cores)] = round(median(json.loads(line)["of_bare"] for line in lines), 4)
    met = min(ratios.values()) >= NEEDED
    print(json.dumps({"bench": "harvest", "part": "tokens", "met": met, "of_bare": ratios, "needed": NEEDED}))
    return 0 if met else 1


def tokens_on_cores(options: argparse.Namespace) -> int:
    """Print one JSON line a round of `--part tokens` on `--cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before the tokenizer counts them
    tokenizer = load_tokenizer(MODEL)
    texts = [str(document.content) for document in documents(options.dataset).read()]
    texts *= -(-options.characters // sum(map(len, texts)))
    with tempfile.TemporaryDirectory(prefix="gsae-tokens-") as folder:
        path = Path(folder) / "text.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        asked = request(
            HarvestConfig.parse(model=MODEL, dataset=str(path), sites=SITES, context_size=CONTEXT_SIZE, heldout=0.02)
        )
        for number in range(options.rounds + 1):  # the first only warms up
            out = Path(folder) / "store"
            whole_seconds = seconds_of(lambda out=out: write_tokens(asked, out))
            shutil.rmtree(out)
            counts: list[int] = []
            bare_seconds = seconds_of(lambda counts=counts: counts.extend(bare_tokens(tokenizer, texts)))
            if number:
                rates = {"gsae": sum(counts) / whole_seconds, "bare": sum(counts) / bare_seconds}
                line = {"what": "tokens", "cores": options.cores, "documents": len(texts), "tokens_per_second": rates}
                print(json.dumps(line | {"of_bare": round(bare_seconds / whole_seconds, 4)}), flush=True)
    return 0


def bare_tokens(tokenizer: Any, texts: list[str]) -> Iterator[int]:
    """Tokenise 1024 texts at a time and yield how many tokens each has."""
    for at in range(0, len(texts), 1024):
        yield from map(len, tokenizer(texts[at : at + 1024], add_special_tokens=False, verbose=False)["input_ids"])


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
