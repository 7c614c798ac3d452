"""What does harvesting add to the language model's own forward passes, how fast is the nearest peer, and what is held?

Run as `.venv/bin/python bench/harvest.py [--dataset speeches.jsonl.gz] [--part speed,saelens,memory,tokens,gpu]`.

* speed: three sites of SmolLM2-135M in bfloat16 on the CPU, context 256. In one run, in turn: a whole harvest, from its
  first forward pass to its manifest (rows scattered, encoded, summed and published meanwhile), and a bare loop over the
  same batches that ends each pass where the last site is seen and keeps nothing. The limit is the bare loop.
* saelens (after `make bench-peers`): one site, in turn a whole harvest and SAELens's `CacheActivationsRunner.run` on
  the same contexts, already tokenised: bfloat16 weights, float16 rows (it refuses bfloat16), not shuffled. Both leave a
  pass at the site; a second line has it on a model that was cut after the site's layer.
* memory: peak resident sizes of harvests of two sizes, a factor 8 apart, against model + two windows a site + 1 GiB.
* tokens: the step before, from the text's file to the store's arrays on disk, against `tokenizer(list)` alone on the
  same documents in memory, in turn, on one core and on all. The limit is the tokenizer alone.
* gpu: a Llama-2-7B-shaped model of random weights in bfloat16, context 1024, resid.15 and mlp.15, against its own
  bare loop, before and after (`--rows 524288 --window-rows 65536`). `--variants` says under which settings, of
  tests/support/harvest_steps.py and `compile`, where the bare loop is compiled too; the first one is the verdict's. A
  line has the device's time of a pass, the seconds after the launch of the last pass, and the time of each step.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from gsae.harvest import (
    BatchDone,
    HarvestConfig,
    LanguageModel,
    Provenance,
    StageStarted,
    documents,
    harvest,
    load_lm,
    load_tokenizer,
    make_request,
    pipeline,
    resolve,
    write_tokens,
)
from gsae.harvest.cost_estimate import BESIDE_BYTES
from gsae.harvest.model.model_files import find_model, light_directory, weights_directory
from gsae.harvest.model.torch_compile import compile_layers
from gsae.store import SPLITS, Store
from gsae.store.format import row_order as order
from gsae.tests.support.harvest_steps import VARIANTS, summary, timed_steps

MODEL, SITES, CONTEXT_SIZE = "builtin:smollm2-135m", ("mlp.10", "attn.10", "resid.15"), 256
PEER, PEER_SITE, PEER_LAYER = Path(".venv-peers/bin/python"), "mlp.10", 10
NEEDED = {"speed": 0.9, "saelens": 1.5, "tokens": 0.9, "gpu": 0.95}


class Seen(Exception):  # noqa: N818  (the way out of a pass)
    """The last site was reached."""


def main() -> int:
    """Print one JSON line a result and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="builtin:pydoc")
    parser.add_argument("--part", default="speed,saelens,memory,tokens,gpu")
    parser.add_argument("--rows", type=int, default=1 << 15)
    parser.add_argument("--window-rows", type=int, default=1 << 13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where a CPU multiplies bfloat16 slowly")
    parser.add_argument("--cores", type=int, help="of --part tokens: on so many cores only")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of --part tokens")
    parser.add_argument("--variants", default=",".join([*VARIANTS, "compile"]), help="of --part gpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return peak_of(HarvestConfig(**json.loads(options.child)))
    if options.cores:
        return tokens_on_cores(options)
    parts = {"speed": speed, "saelens": saelens, "memory": memory, "tokens": tokens, "gpu": gpu}
    figures = {name: parts[name](options) for name in options.part.split(",")}
    met = all(figure.pop("met") for figure in figures.values())
    print(json.dumps({"bench": "harvest", "met": met, **figures}))
    return 0 if met else 1


def config(options: argparse.Namespace, **changed: Any) -> HarvestConfig:
    """Return the settings that the parts share."""
    settings: dict[str, Any] = {
        "model": MODEL,
        "dataset": options.dataset,
        "sites": SITES,
        "rows": options.rows,
        "window_rows": options.window_rows,
        "context_size": CONTEXT_SIZE,
        "batch_size": 8,
        "heldout": 0.02,
        "dtype": options.dtype,
        "codec": "planes" if options.dtype == "bfloat16" else "zstd",
    }
    return HarvestConfig(**(settings | changed))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a harvest of three sites with the bare loop."""
    return against_bare("speed", config(options), load_lm(MODEL, dtype=options.dtype), options.rounds)


def against_bare(part: str, asked: HarvestConfig, lm: LanguageModel, rounds: int) -> dict[str, Any]:
    """Compare whole harvests with bare loops over the same batches, in turn."""
    ratios, waiting, size, rows = [], [], 0, 1
    for number in range(rounds + 1):  # the first only warms up
        with scratch() as folder:
            found = whole(asked, lm, folder / "store")
            batches = batches_of(found.store)
            bare = loop(lm, asked.sites, batches)
            size, rows = size_of(found.store.path), found.store.plan.rows + found.store.plan.heldout_rows
        tokens = sum(batch.size for batch in batches)
        if number:
            ratios.append(bare / found.seconds)
            waiting.append(found.waiting)
            rates = {"harvest": round(tokens / found.seconds), "bare": round(tokens / bare)}
            line = {"what": part, "tokens_per_second": rates, "of_bare": round(bare / found.seconds, 4)}
            print(json.dumps(line | {"device_waiting": round(found.waiting, 4)}), flush=True)
    middle = median(ratios)
    return {
        "met": middle >= NEEDED[part],
        "of_bare": round(middle, 4),
        "needed": NEEDED[part],
        "device_waiting": round(median(waiting), 4),
        "bytes_a_row": round(size / rows),
        "sites": asked.sites,
    }


def saelens(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a harvest of one site with SAELens's runner on the same contexts, as it is and on a model cut short."""
    if not PEER.exists():
        return {"met": True, "skipped": f"{PEER} is not there: make bench-peers"}
    asked, lm = config(options, sites=(PEER_SITE,)), load_lm(MODEL, dtype=options.dtype)
    ratios: dict[str, list[float]] = {"whole": [], "cut": []}
    ours, theirs, size, rows = 0.0, {"whole": 0, "cut": 0}, 0, 1
    with scratch() as folder:
        directory = weights_directory(find_model(MODEL, None, weights=True), options.dtype)
        models = {"whole": folder / "whole", "cut": folder / "cut"}
        shutil.copytree(directory, models["whole"])
        cut_after(PEER_LAYER, directory, models["cut"], getattr(torch, options.dtype))
        for model in models.values():
            copy_tokenizer(model)
        for number in range(options.rounds + 1):
            with scratch() as place:
                found = whole(asked, lm, place / "store")
                tokens, plan = found.store.tokens(), found.store.plan
                ours, size, rows = tokens.size / found.seconds, size_of(found.store.path), plan.rows + plan.heldout_rows
            np.save(folder / "tokens.npy", tokens)
            for name, model in models.items():
                answer = peer(model, folder / "tokens.npy", folder / "cache", options.dtype)
                theirs[name] = answer["bytes"]
                if number:
                    ratios[name].append(ours * answer["seconds"] / answer["tokens"])
                    rates = {"harvest": round(ours), "saelens": round(answer["tokens"] / answer["seconds"])}
                    line = {"what": "saelens", "model": name, "tokens_per_second": rates}
                    print(json.dumps(line | {"over_saelens": round(ratios[name][-1], 3)}), flush=True)
    middle = median(ratios["whole"])
    return {
        "met": middle >= NEEDED["saelens"],
        "over_saelens": round(middle, 3),
        "over_saelens_cut": round(median(ratios["cut"]), 3),
        "needed": NEEDED["saelens"],
        "bytes_a_row": {"gsae": round(size / rows), "saelens": round(theirs["whole"] / tokens.size)},
        "site": PEER_SITE,
    }


def peer(model: Path, tokens: Path, cache: Path, dtype: str) -> dict[str, Any]:
    """Run SAELens's runner in the peers' environment."""
    code = Path(__file__).parent / "peers" / "saelens_cache.py"
    command = [str(PEER), str(code), str(model), str(tokens), str(cache), f"model.layers.{PEER_LAYER}.mlp", dtype]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAELens failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def copy_tokenizer(out: Path) -> None:
    """Put the model's tokenizer beside weights."""
    for file in light_directory(find_model(MODEL, None, weights=False)).glob("*token*"):
        shutil.copy(file, out)


def cut_after(layer: int, directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Save the model without the layers after `layer`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.model.layers = model.model.layers[: layer + 1]
    model.config.num_hidden_layers = layer + 1
    if getattr(model.config, "layer_types", None):  # not every configuration has them
        model.config.layer_types = model.config.layer_types[: layer + 1]
    model.save_pretrained(out)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak resident size of two harvests, the second of eight times the rows."""
    words = [f"{a}{b}" for a in ("sun", "rain", "wind", "stone", "river") for b in ("", "s", "less", "y", "fall")]
    peaks, lm_bytes = {}, 0
    with scratch() as folder:
        draw, text = random.Random(0), folder / "text.jsonl"
        with text.open("w") as file:
            for _ in range(4000):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=120))}) + "\n")
        sites = ("resid.0", "mlp.0", "attn.0")
        for rows in (1 << 15, 1 << 18):
            asked = {"model": MODEL, "dataset": str(text), "sites": sites, "rows": rows, "window_rows": 1 << 14}
            asked |= {"context_size": CONTEXT_SIZE, "batch_size": 8, "heldout": 0.02, "dtype": options.dtype}
            asked |= {"codec": "planes" if options.dtype == "bfloat16" else "zstd"}
            done = subprocess.run([sys.executable, __file__, "--child", json.dumps(asked)], check=True, stdout=-1)
            answer = json.loads(done.stdout.splitlines()[-1])
            peaks[rows], lm_bytes = answer["peak"], answer["model"]
            print(json.dumps({"what": "memory", "rows": rows, "peak_bytes": answer["peak"]}), flush=True)
    windows = 2 * (1 << 14) * len(sites) * 576 * getattr(torch, options.dtype).itemsize
    bound = lm_bytes + windows + BESIDE_BYTES
    few, many = peaks.values()
    return {
        "met": many <= bound,
        "peak_of_bound": round(many / bound, 3),
        "bound_bytes": bound,
        "model_bytes": lm_bytes,
        "window_bytes": windows,
        "peak_bytes": list(peaks.values()),
        "growth_at_8_times_the_rows": round(many / few, 3),
    }


def peak_of(asked: HarvestConfig) -> int:
    """Harvest, and print the peak resident size of this process and the bytes of the model's weights."""
    with scratch() as folder:
        store = harvest(asked, folder / "store")
    assert store is not None
    lm = load_lm(asked.model, dtype=asked.dtype)
    weights = sum(p.numel() * p.itemsize for p in lm.model.parameters())
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "model": weights}))
    return 0


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a harvest of a 7B-shaped model with its bare loop on a GPU."""
    if not torch.cuda.is_available():
        print(json.dumps({"what": "gpu", "skipped": "there is no CUDA device"}), flush=True)
        return {"met": True, "skipped": "there is no CUDA device"}
    from transformers import LlamaConfig, LlamaForCausalLM

    with scratch() as folder:
        copy_tokenizer(folder)
        shape = LlamaConfig(vocab_size=49152, max_position_embeddings=4096)  # its defaults are Llama-2-7B's
        shape.save_pretrained(folder)
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(shape).eval().requires_grad_(False)
            torch.set_default_dtype(torch.float32)
        card = torch.cuda.get_device_name()
        source = Provenance(
            "llama-2-7b-shaped", None, "0" * 64, "", "bfloat16", model.config._attn_implementation, card
        )
        asked = config(
            options, model=str(folder), sites=("resid.15", "mlp.15"), context_size=1024, batch_size=16, device="cuda"
        )
        variants = options.variants.split(",")
        return in_variants(asked, LanguageModel(model, None, source), options.rounds, variants) | {"card": card}


def in_variants(asked: HarvestConfig, lm: LanguageModel, rounds: int, variants: list[str]) -> dict[str, Any]:
    """Compare whole harvests with the bare loops before and after them, under each variant in turn."""
    if "compile" in variants[:-1]:
        raise SystemExit("Name compile last: a model stays compiled.")
    # Sites are confirmed before a model is compiled, and here it is compiled before the harvest.
    within = {**VARIANTS, "compile": lambda: patch.object(pipeline, "confirm_loaded")}
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    before = 0.0
    for name in variants:
        if name == "compile":
            lm = compile_layers(lm, resolve(lm.model, asked.sites))
        for number in range(rounds + 1):  # the first only warms up
            with scratch() as folder, within[name](), timed_steps() as steps:
                found = whole(asked, lm, folder / "store")
                batches = batches_of(found.store)
            after = loop(lm, asked.sites, batches)
            if number:
                bare, tokens = (before + after) / 2, sum(batch.size for batch in batches)
                ratios[name].append(bare / found.seconds)
                rates = {"harvest": round(tokens / found.seconds), "bare": round(tokens / bare)}
                line = {"what": name, "tokens_per_second": rates, "of_bare": round(bare / found.seconds, 4)}
                line |= {"device_waiting": round(found.waiting, 4), "tail_seconds": round(found.tail, 3)}
                line |= {"pass_ms": round(1000 * found.busy / len(batches), 2)}
                line |= {"bare_pass_ms": round(1000 * bare / len(batches), 2), "steps": summary(steps)}
                print(json.dumps(line), flush=True)
            before = after
    middle = {name: round(median(found), 4) for name, found in ratios.items()}
    first = middle[variants[0]]
    return {"met": first >= NEEDED["gpu"], "of_bare": middle, "needed": NEEDED["gpu"], "sites": asked.sites}


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that goes afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="gsae-harvest-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Whole:
    """A harvest with a loaded model: its seconds from the first pass on, and what its events said of the device.

    busy: seconds in which the device ran passes. waiting: the share in which it did not. tail: seconds after the launch
    of the last pass.
    """

    store: Store
    seconds: float
    busy: float
    waiting: float
    tail: float


def whole(asked: HarvestConfig, lm: LanguageModel, out: Path) -> Whole:
    """Harvest with a loaded model."""
    begun: list[float] = []
    batches: list[tuple[float, BatchDone]] = []

    def listen(event: Any) -> None:
        if isinstance(event, StageStarted) and event.name == "running the model":
            begun.append(time.perf_counter())
        if isinstance(event, BatchDone):
            batches.append((time.perf_counter(), event))

    store = harvest(asked, out, listen, load=lambda _: lm)
    ended = time.perf_counter()
    if store is None:
        raise SystemExit("The harvest was not finished.")
    last = batches[-1][1]  # comes after the last window, and has all of the device's time
    return Whole(store, ended - begun[0], last.busy, last.waiting, ended - batches[-2][0])


def size_of(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
            batches = order.context_batches(len(own.contexts), plan.batch_size)
            found += [tokens[own.contexts[batch]] for batch in batches]
    return found


def loop(lm: LanguageModel, sites: tuple[str, ...], batches: list[np.ndarray[Any, Any]]) -> float:
    """Return the seconds of the bare passes, which end at the last of `sites`."""
    last = lm.model.get_submodule(resolve(lm.model, sites)[-1].module)

    def leave(*_: Any) -> None:
        raise Seen

    handle, started = last.register_forward_hook(leave), time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            try:
                lm.model(input_ids=torch.from_numpy(batch).to(lm.device, torch.long), use_cache=False)
            except Seen:
                continue
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
    handle.remove()
    return time.perf_counter() - started


def tokens(options: argparse.Namespace) -> dict[str, Any]:
    """Compare writing the tokens of a text with the tokenizer alone, on one core and on all."""
    ratios: dict[str, float] = {}
    for cores in sorted({1, len(os.sched_getaffinity(0))}):
        command = [sys.executable, *sys.argv, "--cores", str(cores)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        print("\n".join(lines), flush=True)
        ratios[str(cores)] = round(median(json.loads(line)["of_bare"] for line in lines), 4)
    found = min(ratios.values())
    return {"met": found >= NEEDED["tokens"], "of_bare": ratios, "needed": NEEDED["tokens"]}


def tokens_on_cores(options: argparse.Namespace) -> int:
    """Print one JSON line a round of `--part tokens` on `--cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before the tokenizer counts them
    tokenizer = load_tokenizer(MODEL)
    texts = [str(document.content) for document in documents(options.dataset).read()]
    texts *= -(-options.characters // sum(map(len, texts)))
    with tempfile.TemporaryDirectory(prefix="gsae-tokens-") as folder:
        path = Path(folder) / "text.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        asked = make_request(
            HarvestConfig(model=MODEL, dataset=str(path), sites=SITES, context_size=CONTEXT_SIZE, heldout=0.02)
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
