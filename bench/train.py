"""How many rows a second does `gsae train` learn from, next to SAELens and dictionary_learning, and as well as they?

Run as `.venv/bin/python bench/train.py [--store STORE --site SITE]` after `make bench-peers`; without a store it
harvests one with SmolLM2 from the language reference. The limit is the encoder's matrix product: a dense step takes 7
of them, a sparse one little more than one.

Speed: whole runs of ours, from the first batch to the saved SAEs and with the dense beginning, for one SAE and for
eight; the peers, whose steps are dense and all alike, over some steps between ours, fed from memory. Eight SAEs of a
peer take eight times one. Decoding is measured as the CPU time of reading the same rows alone; decodes are counted.

Quality: our step as it chooses its path, our dense autograd, and dictionary_learning's Gated trainer, started alike and
at equal rows, order and settings, three seeds each, on held-out rows.
"""

import argparse
import json
import math
import site as environment
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from peers.trainers import PEERS, figures_of, scaled_heldout

PEER = Path(".venv-peers/bin/python")
SITE = "mlp.10"
TARGETS = {"one_over_saelens": 5.0, "one_over_dictionary_learning": 5.0,
           "eight_over_saelens": 5.0, "eight_over_dictionary_learning": 5.0}  # fmt: skip
MOST_DECODING, MOST_WAITING = 0.02, 0.02
# Differences of means that count as noise: three standard deviations of the seeds, or this much of a figure.
NOISE = {"l0": 0.03, "explained_variance": 0.005, "gamma": 0.005}
WORDS = {1: "one", 8: "eight"}
L1_OF_EIGHT = (0.07, 0.085, 0.1, 0.12, 0.14, 0.17, 0.2, 0.25)


def main() -> int:
    """Print one JSON line a measurement and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a store to train from, in place of one harvested here")
    parser.add_argument("--site", default=SITE)
    parser.add_argument("--part", choices=("speed", "quality"), action="append", help="both if not given")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000, help="of our runs")
    parser.add_argument("--peer-steps", type=int, default=12, help="of each measurement of a peer")
    parser.add_argument("--saes", type=int, nargs="+", choices=WORDS, default=[1, 8], help="whole runs of so many")
    parser.add_argument("--l1", type=float, default=0.1, help="of the single SAE")
    parser.add_argument("--quality-width", type=int, default=1024)
    parser.add_argument("--quality-steps", type=int, default=800)
    parser.add_argument("--quality-batch-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", choices=("saelens", "dictionary_learning", "quality"), help=argparse.SUPPRESS)
    parser.add_argument("--packages", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        environment.addsitedir(options.packages)
        warnings.simplefilter("ignore")
        print(json.dumps(PEERS[options.peer](options)), flush=True)
        return 0
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    parts = options.part or ["speed", "quality"]
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        options.store = options.store or harvested(options.work / "store", options.site)
        figures: dict[str, Any] = {}
        for part in parts:
            figures |= speed(options) if part == "speed" else quality(options)
    met = all(figures.pop("_met").values()) if "_met" in figures else True
    print(json.dumps({"bench": "train", "met": met, **figures, "targets": TARGETS}))
    return 0 if met else 1


def harvested(root: Path, site: str) -> Path:
    """Harvest a store of some 80,000 rows with the language model that comes as a package."""
    command = [
        sys.executable,
        "-m",
        "gsae.cli",
        "harvest",
        "--model",
        "builtin:smollm2-135m",
        "--dataset",
        "builtin:pydoc",
    ]
    command += ["--context-size", "256", "--heldout", "0.1", "--window-rows", "16384", "--batch-size", "8"]
    command += ["--device", "cpu", "--site", site, "--out", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return root


def say(**figures: Any) -> None:
    """Print one line."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


# -- speed


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Whole runs of ours between measurements of the peers; their ratios."""
    names = ("saelens", "dictionary_learning")
    rates: dict[str, list[float]] = {name: [] for name in names}
    warm_up(options)
    ours: dict[int, dict[str, float]] = {}
    for count in (*options.saes, None):
        for name in names:
            rates[name].append(float(in_peers(options, name)["rows_per_second"]))
            say(what=name, rows_per_second=rates[name][-1])
        if count is not None:
            ours[count] = our_run(options, count)
            say(what="gsae train", saes=count, **ours[count])
    reading = reading_seconds(options)
    ratios = {
        f"{word}_over_{name}": ours[count]["rows_per_second"] * count / median(rates[name])
        for count, word in WORDS.items()
        if count in ours
        for name in names
    }
    rest = {
        "decoding": max(reading / ours[count]["cpu_seconds"] for count in ours),
        "waiting": max(ours[count]["waiting"] for count in ours),
        "most_decodes_of_a_chunk": ours[max(ours)]["most_decodes"],
        "epochs_begun": ours[max(ours)]["epochs_begun"],
    }
    met = [ratio >= TARGETS[name] for name, ratio in ratios.items()]
    met += [rest["decoding"] <= MOST_DECODING, rest["waiting"] <= MOST_WAITING]
    met.append(rest["most_decodes_of_a_chunk"] <= rest["epochs_begun"])
    say(what="speed", met=all(met), **ratios, **rest)
    return {name: float(f"{value:.4g}") for name, value in (ratios | rest).items()} | {"_met": {"speed": all(met)}}


def warm_up(options: argparse.Namespace) -> None:
    """Have everything compiled."""
    our_run(options, 1, steps=30)


def our_run(options: argparse.Namespace, count: int, steps: int | None = None) -> dict[str, float]:
    """Train some SAEs from the store to their files; what it took, from the first batch on."""
    from gsae.store import open_store
    from gsae.store.places.shard import ShardReader
    from gsae.train import Event, Finished, Progress, RunConfig, Started, parse_sae, train

    l1 = options.l1 if count == 1 else ",".join(map(str, L1_OF_EIGHT[:count]))
    site = open_store(options.store).site(options.site)
    decodes: Counter[tuple[Any, ...]] = Counter()
    decode = ShardReader.decode_into

    def counted(shard: ShardReader, chunk: int, *rest: Any) -> None:
        decodes[shard.path, chunk] += 1
        decode(shard, chunk, *rest)

    began = cpu = ended = spent = waited = 0.0
    done = 0
    last: list[Any] = []

    def listen(event: Event) -> None:
        nonlocal began, cpu, ended, spent, waited, done, last
        if isinstance(event, Started):
            began, cpu = time.perf_counter(), time.process_time()
        if isinstance(event, Progress):
            seconds = options.batch_size * (event.step - done) / event.rows_per_second
            done = event.step
            waited += event.wait_share * seconds
            last = list(event.metrics)
        if isinstance(event, Finished):
            ended, spent = time.perf_counter(), time.process_time()

    config = RunConfig(
        site=options.site,
        steps=steps or options.steps,
        batch_size=options.batch_size,
        device="cpu",
        saes=parse_sae(f"gated width={options.width} l1={l1}"),
    )
    with tempfile.TemporaryDirectory(dir=options.work) as out:
        ShardReader.decode_into = counted  # type: ignore[method-assign]
        try:
            train(site, config, Path(out) / "run", listen)
        finally:
            ShardReader.decode_into = decode  # type: ignore[method-assign]
    rows = config.steps * config.batch_size
    ahead = site.batches(config.batch_size, epochs=None).memory // (2 * site.d_in)
    return {
        "rows_per_second": rows / (ended - began),
        "seconds": ended - began,
        "cpu_seconds": spent - cpu,
        "waiting": waited / (ended - began),
        "decodes": sum(decodes.values()),
        "most_decodes": max(decodes.values()),
        "epochs_begun": math.ceil((rows + ahead) / site.rows),
        "l0": mean(line["l0"] for line in last),
        "paths": sorted({line["path"] for line in last}),  # type: ignore[dict-item]
    }


def reading_seconds(options: argparse.Namespace) -> float:
    """CPU seconds of reading as many rows as a run has, and doing nothing with them."""
    from gsae.store import open_store

    site = open_store(options.store).site(options.site)
    with site.batches(options.batch_size, epochs=None, max_norm_multiple=10) as batches:
        next(batches)
        started = time.process_time()
        for _ in range(options.steps):
            next(batches)
        spent = time.process_time() - started
    say(what="reading alone", cpu_seconds=spent)
    return spent


# -- quality


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Our path, our dense autograd and dictionary_learning at equal rows and settings; whether they differ."""
    found = {
        "ours": our_quality(options, None),
        "ours_dense": our_quality(options, 1e9),  # a limit that nothing reaches: dense autograd, and nothing clipped
        "dictionary_learning": in_peers(options, "quality")["figures"],
    }
    for name, seeds in found.items():
        columns = {key: [one[key] for one in seeds] for key in NOISE}
        means = {key: mean(column) for key, column in columns.items()}
        say(what="quality", trainer=name, **means, **{f"{key}_sd": spread(column) for key, column in columns.items()})
    differences = {}
    within = True
    for other in ("ours_dense", "dictionary_learning"):
        for key, share in NOISE.items():
            a, b = ([one[key] for one in found[name]] for name in ("ours", other))
            difference = mean(a) - mean(b)
            differences[f"{key}_less_{other}"] = float(f"{difference:.3g}")
            within &= abs(difference) <= max(3 * max(spread(a), spread(b)), share * abs(mean(b)))
    say(what="quality", met=within, **differences)
    return {"quality_within_noise": within, **differences, "_met": {"quality": within}}


def spread(column: list[float]) -> float:
    """Standard deviation over the seeds."""
    return stdev(column) if len(column) > 1 else 0.0


def our_quality(options: argparse.Namespace, clip: float | None) -> list[dict[str, float]]:
    """Figures on held-out rows of one SAE a seed."""
    from gsae.store import open_store
    from gsae.train import RunConfig, load_sae, parse_sae, train

    seeds = ",".join(map(str, range(options.seeds)))
    config = RunConfig(
        site=options.site,
        steps=options.quality_steps,
        batch_size=options.quality_batch_size,
        lr=1e-3,
        device="cpu",
        clip_grad_norm=clip,
        saes=parse_sae(f"gated width={options.quality_width} l1={options.l1} seed={seeds}"),
    )
    store = open_store(options.store)
    scale, x = scaled_heldout(store, options.site)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        out = Path(folder) / "run"
        train(store.site(options.site), config, out)
        saes = [load_sae(out / "saes" / str(sae.name)) for sae in config.named_saes()]
    raw = x / scale
    return [figures_of(raw, sae.encode(raw), sae.decode(sae.encode(raw))) for sae in saes]


# -- in the peers' environment


def in_peers(options: argparse.Namespace, peer: str) -> dict[str, Any]:
    """Run this script in the peers' environment, with our packages behind theirs; its answer."""
    kept = ("store", "site", "width", "batch_size", "steps", "peer_steps", "l1", "quality_width", "quality_steps",
            "quality_batch_size", "seeds")  # fmt: skip
    command = [str(PEER), __file__, "--peer", peer, "--packages", sysconfig.get_path("purelib")]
    for name in kept:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    sys.exit(main())
