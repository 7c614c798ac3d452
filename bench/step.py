"""What does one training step of a Gated SAE cost, beside the encoder product that no step can do without?

Run as `.venv/bin/python bench/step.py` after `make bench-peers`, on an idle machine. The bare product is
`torch.mm(x, W_enc.T, out=...)` in float32; each step is a whole one, optimiser, projection and unit norm included, and
all of them take turns. SAELens's is `SAETrainer._train_step` (with its clipping and Adam), dictionary_learning's is
`GatedSAETrainer.update`; both also under bfloat16 autocast. `--cpu` counts the CPU seconds of one thread instead, for a
machine that others use. `--plot FILE.svg` draws how the ratio grows with L0 and width.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

PEER = Path(".venv-peers/bin/python")
PEERS = ("saelens", "dictionary_learning")
ROWS = 2048
SHAPES = ((576, 9216), (1024, 8192))
LIMITS = {40: 1.5, 100: 1.7, 300: 2.2}  # times the product, by L0
SCREENED_LIMIT = 0.8  # at L0 40, on a CPU that multiplies bfloat16 fast
CURVE_WIDTHS, CURVE_L0 = (4096, 9216, 16384, 65536), (10, 30, 100, 300, 1000)
CROSSING_L0 = (1000, 1500, 2000, 3000)
Timed = Callable[[], float]


def main() -> int:
    """Print a JSON line a result and the verdict; return 0 when every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, not wall time")
    parser.add_argument("--part", choices=("targets", "curve", "crossover"), action="append")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-bfloat16", action="store_true", help="leave out the peers under autocast")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = 1 if options.cpu else options.threads
    torch.set_num_threads(threads)
    if options.peer:
        return serve(options.peer, options.cpu)
    if not options.no_peers and not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root, or --no-peers.")

    from gsae.train.step.compiling import kernel_threads

    parts = options.part or ["targets", "curve", "crossover"]
    met, figures = True, {}
    with kernel_threads(threads):
        if "targets" in parts:
            met, figures = targets(options, threads)
        if "crossover" in parts:
            figures |= crossover(options)
        if "curve" in parts:
            curves = curve(options)
            if options.plot:
                options.plot.write_text(drawn(curves))
    print(json.dumps({"bench": "step", "met": met, "threads": threads, "cpu_time": options.cpu, **figures}))
    return 0 if met else 1


# -- the three questions


def targets(options: argparse.Namespace, threads: int) -> tuple[bool, dict[str, Any]]:
    """Return whether our steps stay under the limits, and every ratio to the bare product."""
    from gsae.train.step.screening import screening_pays

    met, figures = True, {}
    with ExitStack() as stack:
        peers = [] if options.no_peers else [stack.enter_context(peer(name, options.cpu, threads)) for name in PEERS]
        for d_in, d_sae in SHAPES:
            runs: dict[str, Timed] = {"product": product(d_in, d_sae, options.cpu)}
            for l0 in LIMITS:
                runs[f"sparse_{l0}"] = ours(d_in, d_sae, l0, "sparse", options.cpu)
            if screening_pays():
                runs["screened_40"] = ours(d_in, d_sae, 40, "sparse", options.cpu, screened=True)
            runs["dense"] = ours(d_in, d_sae, 40, "dense", options.cpu)
            for name, ask in zip(PEERS, peers, strict=False):
                ask(f"make {d_in} {d_sae}")
                runs[name] = lambda ask=ask: float(ask("float32"))
                if (d_in, d_sae) == SHAPES[0] and not options.no_bfloat16:
                    runs[f"{name}_bfloat16"] = lambda ask=ask: float(ask("bfloat16"))
            slow = {name: 1 if name.endswith("bfloat16") else 2 for name in runs if name.startswith(("dense", *PEERS))}
            seconds = in_turn(runs, options.rounds, slow)
            ratio = {name: round(took / seconds["product"], 3) for name, took in seconds.items()}
            met &= all(ratio[f"sparse_{l0}"] <= limit for l0, limit in LIMITS.items())
            met &= ratio.get("screened_40", 0) <= SCREENED_LIMIT
            times = {name: round(ratio[name] / ratio["sparse_40"], 2) for name in PEERS if name in ratio}
            gflops = 2e-9 * ROWS * d_in * d_sae / seconds["product"]
            print(json.dumps({"d_in": d_in, "d_sae": d_sae, "product_gflops": round(gflops, 1), **ratio}), flush=True)
            figures[f"{d_in}x{d_sae}"] = ratio | {f"{name}_over_sparse_40": value for name, value in times.items()}
    return met, figures


def crossover(options: argparse.Namespace) -> dict[str, Any]:
    """Find the share of open gates at which the sparse step costs what the dense one does."""
    found = {}
    for arch in ("gated", "relu"):
        for d_in, d_sae in SHAPES[:1]:
            runs = {str(l0): ours(d_in, d_sae, l0, "sparse", options.cpu, arch) for l0 in CROSSING_L0}
            runs["dense"] = ours(d_in, d_sae, 1000, "dense", options.cpu, arch)
            seconds = in_turn(runs, max(2, options.rounds // 2))
            shares = [l0 / d_sae for l0 in CROSSING_L0]
            costs = [seconds[str(l0)] for l0 in CROSSING_L0]
            # Where the line through the two nearest points crosses the dense step's time.
            at = next((i for i in range(1, len(costs)) if costs[i] >= seconds["dense"]), len(costs) - 1)
            slope = (costs[at] - costs[at - 1]) / (shares[at] - shares[at - 1])
            print(json.dumps({"arch": arch, **{name: round(took, 3) for name, took in seconds.items()}}), flush=True)
            found[f"{arch}_{d_in}x{d_sae}"] = round(shares[at] + (seconds["dense"] - costs[at]) / slope, 3)
    print(json.dumps({"crossover": found}), flush=True)
    return {"crossover": found}


def curve(options: argparse.Namespace) -> dict[int, list[float]]:
    """Return, for d_in 576 and every width, the sparse step over the product at every L0."""
    ratios = {}
    for d_sae in CURVE_WIDTHS:
        runs: dict[str, Timed] = {"product": product(576, d_sae, options.cpu)}
        runs |= {str(l0): ours(576, d_sae, l0, "sparse", options.cpu) for l0 in CURVE_L0}
        seconds = in_turn(runs, 3)
        ratios[d_sae] = [round(seconds[str(l0)] / seconds["product"], 3) for l0 in CURVE_L0]
        by_l0 = dict(zip(CURVE_L0, ratios[d_sae], strict=True))
        print(json.dumps({"d_in": 576, "d_sae": d_sae, "ratio_by_l0": by_l0}), flush=True)
    return ratios


def in_turn(runs: dict[str, Timed], rounds: int, slow: Mapping[str, int] | None = None) -> dict[str, float]:
    """Median seconds of each, after one that does not count unless it is the only one; slow ones are called less."""
    slow, took = slow or {}, {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if turn < slow.get(name, rounds + 1):
                took[name].append(run())
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in took.items()}


# -- what is timed


def timed(call: Callable[[], object], cpu: bool) -> float:
    """Seconds of one call."""
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    call()
    return clock() - start


def product(d_in: int, d_sae: int, cpu: bool) -> Timed:
    """The bare encoder product, float32, into memory that is there."""
    x, W_enc, out = torch.randn(ROWS, d_in), torch.randn(d_sae, d_in), torch.empty(ROWS, d_sae)
    return lambda: timed(lambda: torch.mm(x, W_enc.T, out=out), cpu)


def ours(d_in: int, d_sae: int, l0: int, path: str, cpu: bool, arch: str = "gated", *, screened: bool = False) -> Timed:
    """Our step on random inputs, with as many gates open a row as asked; all features are alive."""
    from gsae.train.architectures.registry import ARCHITECTURES
    from gsae.train.step.adam import Adam
    from gsae.train.step.fast_bank import FastBank

    zeros = torch.zeros(d_in)
    start = ARCHITECTURES[arch].initial(d_in, d_sae, 0, zeros)
    threshold = statistics.NormalDist().inv_cdf(1 - l0 / d_sae) * d_in**-0.5
    for name in start.names()[3:5]:
        getattr(start, name).fill_(-threshold)
    bank = FastBank([start], zeros, torch.float32, path=path, screened=screened)
    x = torch.randn(ROWS, d_in) * d_in**-0.5
    steps = iter(range(1, 1 << 30))
    l1, lr = torch.tensor([0.01], dtype=torch.float64), torch.tensor([1e-7])

    def step() -> None:
        batch = bank.step(x, l1, Adam(lr, 0.999, 1e-8, next(steps), row_clip=True))
        opened = float(batch.l0) / ROWS
        assert abs(opened - l0) < 2 + l0 / 10, f"L0 is {opened}, not {l0}"

    return lambda: timed(step, cpu)


@contextmanager
def peer(name: str, cpu: bool, threads: int) -> Iterator[Callable[[str], str]]:
    """Run another project in its own environment; what it is asked it does, and answers when it has."""
    command = [str(PEER), __file__, "--peer", name, "--threads", str(threads), *(["--cpu"] if cpu else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:

        def ask(what: str) -> str:
            process.stdin.write(what + "\n")
            while not (line := process.stdout.readline()).startswith("= "):
                if not line:
                    raise RuntimeError(f"{name} ended without an answer to {what!r}.")
            return line[2:]

        yield ask
        process.stdin.close()


def serve(name: str, cpu: bool) -> int:
    """Be that other project, for `peer`."""
    step: Callable[[], object] = object
    for line in sys.stdin:
        words = line.split()
        if words[0] == "make":
            step = {"saelens": saelens, "dictionary_learning": dictionary_learning}[name](int(words[1]), int(words[2]))
            print("= made", flush=True)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=words[0] == "bfloat16"):
                print("=", timed(step, cpu), flush=True)
    return 0


def saelens(d_in: int, d_sae: int) -> Callable[[], object]:
    """One step of SAELens's trainer."""
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=0.01))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=ROWS, lr=1e-7, lr_end=1e-7,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    x = torch.randn(ROWS, d_in) * d_in**-0.5
    trainer = SAETrainer(config, sae, iter(()))
    return lambda: trainer._train_step(sae, x)


def dictionary_learning(d_in: int, d_sae: int) -> Callable[[], object]:
    """One step of dictionary_learning's trainer."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    trainer = GatedSAETrainer(
        steps=10**9, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", lr=1e-7, l1_penalty=0.01,
        warmup_steps=10, sparsity_warmup_steps=None, device="cpu",
    )  # fmt: skip
    x = torch.randn(ROWS, d_in) * d_in**-0.5
    steps = iter(range(1 << 30))
    return lambda: trainer.update(next(steps), x)


# -- the picture


def drawn(curves: dict[int, list[float]]) -> str:
    """A small SVG: L0 to the right on a logarithmic scale, the ratio to the product upwards likewise."""
    import math

    def place(l0: float, ratio: float) -> str:
        return f"{60 + 210 * (math.log10(l0) - 1):.0f},{250 - 160 * math.log2(max(ratio, 0.9)) / 1.6:.0f}"

    top = max(4, *(max(ratios) for ratios in curves.values()))
    height = 160 * math.log2(top) / 1.6
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {220 - height:.0f} 600 {height + 80:.0f}" '
             'font-family="sans-serif" font-size="12" fill="none">']  # fmt: skip
    for ratio in (1, 1.5, 2, 3, 4, 6, 8, 12):
        if ratio <= top:
            x, y = place(10, ratio).split(",")
            lines.append(f'<path d="M{x},{y}H480" stroke="#ddd"/><text x="25" y="{y}" fill="#333">{ratio}</text>')
    for l0 in CURVE_L0:
        x = place(l0, 1).split(",")[0]
        lines.append(f'<text x="{x}" y="270" fill="#333" text-anchor="middle">{l0}</text>')
    lines.append(
        '<text x="270" y="288" fill="#333" text-anchor="middle">L0 (step over encoder product, d_in 576)</text>'
    )
    for colour, (width, ratios) in zip(("#1b6ca8", "#d1495b", "#2a9d4e", "#8a4fb0"), curves.items(), strict=True):
        points = [place(l0, ratio) for l0, ratio in zip(CURVE_L0, ratios, strict=True)]
        x, y = points[-1].split(",")
        lines.append(f'<polyline points="{" ".join(points)}" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{int(x) + 8}" y="{y}" fill="{colour}">d_sae {width}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
