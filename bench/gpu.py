"""How near do the steps of a GPU come to the floor, and do they give the right numbers there?

Run as `python bench/gpu.py --part A [--out FILE.json]` on a machine with a CUDA GPU, from the repository's root or with
gsae installed. Every part is meant to take three minutes and ends with a table; each figure is printed at
once. Figures are medians of runs that take turns, in milliseconds of device time. `torch.compile` is in tf32 and has no
projection, unit norm or clip; the peers run under bfloat16 autocast.

* A: every kernel against its plain twin on the card, the same bytes twice, and whole steps of each size: today's plain
  torch, fused, sparse at L0 64, `torch.compile` of the formula, SAELens's and dictionary_learning's Gated steps where
  they are installed; beside the bare encoder product in bfloat16 and tf32, which is the floor.
* B: the harvest of a model of Llama-2-7B's shape against its bare passes (bench/harvest.py --part gpu).
* C: the share of open gates up to which the sparse step costs less than the dense one, and which of two encoder
  products is faster: the lines for `train/step/crossovers.py`.
* D: the kernels one by one, with their share of a step's time.

`--wheels FOLDER` installs the wheels of a folder first, without a network. `--small` runs sizes that Triton's
interpreter can do, to test this script without a GPU; its times mean nothing.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (SAEs, d_in, d_sae, rows)
SIZES = {
    "24 x (576, 4096)": (24, 576, 4096, 1024),
    "(4096, 16k)": (1, 4096, 16384, 4096),
    "(2304, 16k)": (1, 2304, 16384, 4096),
    "(4096, 65k)": (1, 4096, 65536, 4096),
}
SMALL = {"2 x (20, 24)": (2, 20, 24, 40)}
L0 = 64
# Milliseconds that were predicted for an H100 (what is here now in tf32, fused dense in bfloat16, sparse).
PREDICTED = {"24 x (576, 4096)": (17, 2.9, 3.5), "(4096, 16k)": (22, 7.4, 6.9), "(4096, 65k)": (89, 29, 11.7)}
PEERS = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning"}
CALLS = 4  # of a step between two events
Step = Callable[[], object]


def main() -> int:
    """Print a JSON line a result, then a table; return 0 when everything that was compared agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=tuple("ABCD"), required=True)
    parser.add_argument("--out", type=Path, help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter")
    options = parser.parse_args()
    if options.wheels:
        install(options.wheels)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.small:
        parser.error("torch finds no CUDA GPU here. --small tries the script without one.")
    card = torch.cuda.get_device_name() if on_gpu else "none (interpreted)"
    began = time.perf_counter()
    part = {"A": part_a, "B": part_b, "C": part_c, "D": part_d}[options.part]
    agree, figures = part(options, torch.device("cuda" if on_gpu else "cpu"))
    seconds = round(time.perf_counter() - began)
    versions = {"torch": torch.__version__, "triton": triton_version()}
    result = {"bench": "gpu", "part": options.part, "card": card, **versions, "agree": agree, "seconds": seconds}
    if options.out:
        options.out.write_text(json.dumps(result | {"figures": figures}, indent=2) + "\n")
    print(json.dumps(result))
    table(figures)
    return 0 if agree else 1


def install(wheels: Path) -> None:
    """Install every wheel of a folder that fits this Python, without its requirements and without a network."""
    for path in sorted(wheels.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(path)]
        subprocess.run(command, check=False)
    importlib.invalidate_caches()


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def table(figures: list[dict[str, Any]]) -> None:
    """Print figures in columns, those of one kind under one heading."""
    for kind in dict.fromkeys(row["kind"] for row in figures):
        rows = [{key: value for key, value in row.items() if key != "kind"} for row in figures if row["kind"] == kind]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
        widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
        print(f"\n{kind}")
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# -- time


def milliseconds(step: Step, device: Any) -> float:
    """Device time of one of a few calls in a row: between two events, or of the clock where there is no GPU."""
    import torch

    if device.type == "cpu":
        began = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(CALLS):
        step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / CALLS


def in_turn(steps: dict[str, Step], rounds: int, device: Any) -> dict[str, float]:
    """The median of each; two turns come first and do not count."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            spent = milliseconds(step, device)
            if turn >= 2 or rounds == 1:
                took[name].append(spent)
    return {name: statistics.median(spent) for name, spent in took.items()}


def attempted(made: dict[str, Callable[[], Step]], figures: list[dict[str, Any]], size: str) -> dict[str, Step]:
    """The steps that could be made; for another, a line that says why not."""
    steps = {}
    for name, make in made.items():
        try:
            step = make()
            step()
            steps[name] = step
        except Exception as error:  # a peer of another version, a card with too little memory: the rest is measured
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            noted(figures, {"kind": "not measured", "size": size, "step": name, "why": why})
    return steps


def noted(figures: list[dict[str, Any]], line: dict[str, Any]) -> None:
    """Keep a figure, and print it at once: a part that is cut off loses nothing."""
    figures.append(line)
    print(json.dumps(line), flush=True)


# -- what is timed


def started(saes: int, d_in: int, d_sae: int, l0: float, arch: str = "gated") -> tuple[list[Any], Any]:
    """SAEs whose biases open l0 gates a row on random inputs of norm 1, and their mean."""
    import torch

    from gsae.train.architectures.registry import ARCHITECTURES

    zeros = torch.zeros(d_in)
    threshold = statistics.NormalDist().inv_cdf(1 - l0 / d_sae) * d_in**-0.5
    made = []
    for seed in range(saes):
        sae = ARCHITECTURES[arch].initial(d_in, d_sae, seed, zeros)
        for name in sae.names()[3:5]:
            getattr(sae, name).fill_(-threshold)
        made.append(sae)
    return made, zeros


def usual_l0(size: tuple[int, int, int, int]) -> float:
    """The open gates of a row: `L0`, and fewer where the SAE is tiny."""
    return min(L0, size[2] / 8)


def inputs(rows: int, d_in: int, device: Any) -> Any:
    import torch

    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1)).to(device) * d_in**-0.5


def ours(
    size: tuple[int, int, int, int],
    device: Any,
    kernels: str,
    precision: str,
    *,
    sparse: bool = False,
    l0: float | None = None,
) -> Callable[[], Step]:
    """A whole step of ours, as a run takes it."""
    import torch

    def make() -> Step:
        from gsae.train.step.adam import Adam
        from gsae.train.step.fast_bank import FastBank
        from gsae.train.step.triton_bank import TritonBank

        saes, d_in, d_sae, rows = size
        opened = l0 or usual_l0(size)
        start, centre = started(saes, d_in, d_sae, opened)
        operands = torch.bfloat16 if precision == "bfloat16" else torch.float32
        tf32 = precision == "tf32" and device.type == "cuda"
        if kernels == "plain":
            bank = FastBank(start, centre, operands, device, tf32=tf32)
        else:
            share = min(1.0, 3 * opened / d_sae) if sparse else 0.0
            bank = TritonBank(start, centre, operands, device, sparse_share=share, tf32=tf32)
            bank.sparse[:] = sparse
        x, steps = inputs(rows, d_in, device), iter(range(1, 1 << 30))
        l1 = torch.full((saes,), 0.01, dtype=torch.float64, device=device)
        lr = torch.full((saes,), 1e-7, device=device)

        def step() -> None:
            # An odd number: at multiples of 16 a bank waits for the device, to look how many gates are open.
            bank.step(x, l1, Adam(lr, 0.999, 1e-8, 2 * next(steps) + 1, row_clip=True))

        step()
        if sparse and bool(bank.overflown.any()):
            raise RuntimeError("more gates are open than the lists hold")
        return step

    return make


def product(size: tuple[int, int, int, int], device: Any, precision: str) -> Callable[[], Step]:
    """The bare encoder product of all SAEs."""
    import torch

    def make() -> Step:
        saes, d_in, d_sae, rows = size
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        x, W = inputs(rows, d_in, device).to(kind), torch.randn(saes * d_sae, d_in, device=device).to(kind)
        out = torch.empty(saes * d_sae, rows, dtype=kind, device=device)

        def step() -> None:
            from gsae.train.step.product_rounding import products_in_tf32

            with products_in_tf32(precision == "tf32"):
                torch.mm(W, x.T, out=out)

        return step

    return make


def compiled(size: tuple[int, int, int, int], device: Any) -> Callable[[], Step]:
    """`torch.compile` of the formula of the loss with autograd, and torch's fused Adam, in tf32; one SAE."""
    import torch

    def make() -> Step:
        from gsae.train.step.product_rounding import products_in_tf32

        _, d_in, d_sae, rows = size
        (sae,), _ = started(1, d_in, d_sae, usual_l0(size))
        leaves = {name: getattr(sae, name).to(device).requires_grad_() for name in sae.names()}
        loss = torch.compile(lambda z, **params: type(sae)(**params).loss(z, 0.01))
        optimiser = torch.optim.Adam(leaves.values(), lr=1e-7, betas=(0.0, 0.999), fused=device.type == "cuda")
        x = inputs(rows, d_in, device)

        def step() -> None:
            with products_in_tf32(True):
                optimiser.zero_grad()
                loss(x, **leaves).backward()
                optimiser.step()

        return step

    return make


def saelens(size: tuple[int, int, int, int], device: Any) -> Callable[[], Step]:
    """One step of SAELens's trainer, one SAE of the size, under bfloat16 autocast (its fastest setting)."""
    import torch

    def make() -> Step:
        from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        _, d_in, d_sae, rows = size
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=0.01, device=str(device)))
        config = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=rows, lr=1e-7, lr_end=1e-7, device=str(device),
            autocast=True, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        trainer, x = SAETrainer(config, sae, iter(())), inputs(rows, d_in, device)
        torch.backends.cuda.matmul.allow_tf32 = False
        return lambda: trainer._train_step(sae, x)

    return make


def dictionary_learning(size: tuple[int, int, int, int], device: Any) -> Callable[[], Step]:
    """One step of dictionary_learning's trainer, one SAE of the size, under bfloat16 autocast."""
    import torch

    def make() -> Step:
        from dictionary_learning.trainers.gdm import GatedSAETrainer

        _, d_in, d_sae, rows = size
        trainer = GatedSAETrainer(
            steps=10**9, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", lr=1e-7, l1_penalty=0.01,
            warmup_steps=10, sparsity_warmup_steps=None, device=str(device),
        )  # fmt: skip
        x, steps = inputs(rows, d_in, device), iter(range(1 << 30))

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                trainer.update(next(steps), x)

        return step

    return make


# -- part A: right numbers, and whole steps


def part_a(options: argparse.Namespace, device: Any) -> tuple[bool, list[dict[str, Any]]]:
    """Whether fused and sparse steps agree with plain ones and with themselves, and what each step takes."""
    figures: list[dict[str, Any]] = []
    agree = agreement(options, device, figures)
    for name in PEERS.values():
        if importlib.util.find_spec(name) is None:
            noted(figures, {"kind": "not measured", "size": "all", "step": name, "why": "not installed"})
    for name, size in (SMALL if options.small else SIZES).items():
        saes = size[0]
        made = {
            "product bf16": product(size, device, "bfloat16"),
            "product tf32": product(size, device, "tf32"),
            "plain tf32": ours(size, device, "plain", "tf32"),
            "fused float32": ours(size, device, "triton", "float32"),
            "fused tf32": ours(size, device, "triton", "tf32"),
            "fused bf16": ours(size, device, "triton", "bfloat16"),
            "sparse": ours(size, device, "triton", "float32", sparse=True),
        }
        if not options.small:
            made |= {"torch.compile": compiled(size, device)}
            found = {"saelens": saelens(size, device), "dictionary_learning": dictionary_learning(size, device)}
            made |= {peer: step for peer, step in found.items() if importlib.util.find_spec(PEERS[peer])}
        took = in_turn(attempted(made, figures, name), 1 if options.small else options.rounds, device)
        for peer in ("torch.compile", *PEERS):  # of one SAE
            if peer in took:
                took[peer] *= saes
        floor = took.get("product bf16", float("nan"))
        for step, spent in took.items():
            rate = round(1000 * size[3] / spent)
            line = {"ms": round(spent, 3), "of_floor": round(floor / spent, 3), "rows_per_second": rate}
            noted(figures, {"kind": "steps", "size": name, "step": step, **line})
        if name in PREDICTED:
            now, dense, sparse = PREDICTED[name]
            noted(figures, {"kind": "predicted for an H100", "size": name, "plain tf32": now, "fused bf16": dense,
                            "sparse": sparse})  # fmt: skip
    return agree, figures


def agreement(options: argparse.Namespace, device: Any, figures: list[dict[str, Any]]) -> bool:
    """Train the same SAEs for some steps by each step; compare weights, and the bytes of two equal trainings."""
    size = (2, 20, 24, 40) if options.small else (3, 576, 2048, 1000)
    steps, l0 = (3, 6) if options.small else (20, 40)
    plain, start = trained(size, device, steps, l0, "plain")
    met = True
    for name, sparse in (("fused", False), ("sparse", True)):
        first, second = (trained(size, device, steps, l0, "triton", sparse=sparse)[0] for _ in range(2))
        same = all(bool((values == second[key]).all()) for key, values in first.items())
        off = {
            key: float((values - plain[key]).norm() / (plain[key] - start[key]).norm()) for key, values in first.items()
        }
        line = {"same_bytes": same, "largest_difference": f"{max(off.values()):.2e}"}
        noted(figures, {"kind": "agreement", "step": name, **line})
        met &= same and max(off.values()) < 1e-3
    return met


def trained(
    size: tuple[int, int, int, int], device: Any, steps: int, l0: float, kernels: str, *, sparse: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of SAEs after some steps, by name, and those that they began with."""
    import torch

    from gsae.train.step.adam import Adam
    from gsae.train.step.fast_bank import FastBank
    from gsae.train.step.triton_bank import TritonBank

    saes, d_in, d_sae, rows = size
    start, centre = started(saes, d_in, d_sae, l0)
    if kernels == "plain":
        bank = FastBank(start, centre, torch.float32, device, path=None if device.type == "cuda" else "dense")
    else:
        bank = TritonBank(start, centre, torch.float32, device, sparse_share=0.5 if sparse else 0.0)
        bank.sparse[:] = sparse
    before = {name: values.clone() for name, values in bank.params.items()}
    l1 = torch.full((saes,), 0.01, dtype=torch.float64, device=device)
    lr = torch.full((saes,), 1e-3, device=device)
    for step in range(1, steps + 1):
        x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(step)).to(device) * d_in**-0.5
        bank.step(x, l1, Adam(lr, 0.999, 1e-8, step, row_clip=True))
    assert not (sparse and bool(bank.overflown.any()))
    return bank.params, before


# -- part B: the harvest


def part_b(options: argparse.Namespace, device: Any) -> tuple[bool, list[dict[str, Any]]]:
    """bench/harvest.py's part for GPUs, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("harvest.py")), "--part", "gpu"]
    command += ["--rows", "524288", "--window-rows", "65536", "--rounds", "1"]
    command += ["--variants", "as it is"]
    if options.small:
        return True, [{"kind": "harvest", "command": " ".join(command[1:])}]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr[-2000:], sep="\n", flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return bool(lines), [{"kind": "harvest", **{k: str(v) for k, v in line.items()}} for line in lines]


# -- part C: where the sparse step begins to pay


def part_c(options: argparse.Namespace, device: Any) -> tuple[bool, list[dict[str, Any]]]:
    """The share of open gates at which the sparse step takes as long as the dense one, by size and precision."""
    figures: list[dict[str, Any]] = []
    lowest: dict[str, float] = {}
    for name, size in (SMALL if options.small else SIZES).items():
        shares = (0.1, 0.3) if options.small else (0.001, 0.003, 0.01, 0.03)
        made = {precision: ours(size, device, "triton", precision) for precision in ("float32", "tf32", "bfloat16")}
        made |= {
            f"{share}": ours(size, device, "triton", "float32", sparse=True, l0=share * size[2]) for share in shares
        }
        took = in_turn(attempted(made, figures, name), 1 if options.small else options.rounds, device)
        line = {key: round(value, 3) for key, value in took.items()}
        noted(figures, {"kind": "milliseconds by share of open gates", "size": name, **line})
        took = in_turn(attempted(encoders(size, device), figures, name), 1 if options.small else options.rounds, device)
        flops = 2e-9 * size[0] * size[1] * size[2] * size[3]
        for encoder, spent in took.items():
            noted(figures, {"kind": "lists of open gates", "size": name, "encoder": encoder, "ms": round(spent, 3),
                            "tflops": round(flops / spent, 1)})  # fmt: skip
        for precision in ("float32", "tf32", "bfloat16"):
            if precision in took:
                known = [(share, took[str(share)]) for share in shares if str(share) in took]
                share = crossing(known, took[precision])
                noted(figures, {"kind": "crossing", "size": name, "precision": precision, "share": round(share, 4)})
                lowest[precision] = min(share or 1.0, lowest.get(precision, 1.0))  # where it pays at all
    import torch

    card = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    for precision, share in lowest.items():
        figures.append({"kind": "for train/step/crossovers.py", "line": f'("{card}", "{precision}"): {share:.4f},'})
    return True, figures


def encoders(size: tuple[int, int, int, int], device: Any) -> dict[str, Callable[[], Step]]:
    """The lists of open gates, by both encoder products; most of the time is the product."""
    import torch

    def made(fused: bool) -> Callable[[], Step]:
        def make() -> Step:
            from gsae.train.step.triton_bank import TritonBank

            saes, d_in, d_sae, rows = size
            start, centre = started(saes, d_in, d_sae, usual_l0(size))
            bank = TritonBank(start, centre, torch.float32, device, sparse_share=min(1.0, 3 * usual_l0(size) / d_sae))
            bank.fused_encoder = fused
            x = inputs(rows, d_in, device)
            return lambda: bank._open_gates(slice(0, saes), x)

        return make

    return {"cuBLAS and mask": made(False), "fused": made(True)}


def crossing(known: list[tuple[float, float]], dense: float) -> float:
    """Where a line through neighbouring (share, ms) crosses the time of the dense step; 0 if it is dearer from the
    start, the last share if it is never."""
    below = [share for share, spent in known if spent < dense]
    if not below:
        return 0.0
    for (a, first), (b, second) in itertools.pairwise(known):
        if first < dense <= second:
            return a + (b - a) * (dense - first) / (second - first)
    return below[-1]


# -- part D: kernels one by one


def part_d(options: argparse.Namespace, device: Any) -> tuple[bool, list[dict[str, Any]]]:
    """Device time of every kernel of a fused and of a sparse step, as torch's profiler sees it."""
    import torch

    figures: list[dict[str, Any]] = []
    for name, size in (SMALL if options.small else SIZES).items():
        for label, sparse in (("fused bf16", False), ("sparse", True)):
            made = {label: ours(size, device, "triton", "bfloat16", sparse=sparse)}
            for step in attempted(made, figures, name).values():
                figures += [{"kind": f"kernels of {name}, {label}", **row} for row in profiled(step, device)]
                print(json.dumps(figures[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True, figures


def profiled(step: Step, device: Any, steps: int = 5) -> list[dict[str, Any]]:
    """The kernels of a step that take a hundredth of it or more, by device time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as seen:
        for _ in range(1 if device.type == "cpu" else steps):
            step()
    events = [e for e in seen.key_averages() if device.type == "cpu" or on_gpu(e)]
    spent = {
        e.key: (e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total, e.count) for e in events
    }
    whole = sum(total for total, _ in spent.values()) or 1.0
    ordered = sorted(spent.items(), key=lambda pair: -pair[1][0])
    return [
        {"kernel": key[:60], "ms_a_step": round(total / 1000 / steps, 4), "share": round(total / whole, 3),
         "launches": count // steps}
        for key, (total, count) in ordered if total >= whole / 100
    ]  # fmt: skip


def on_gpu(event: Any) -> bool:
    """Whether an event of the profiler is a kernel, and not the call that launched it, which has its time too."""
    from torch.autograd import DeviceType

    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


if __name__ == "__main__":
    sys.exit(main())
