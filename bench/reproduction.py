"""Does a Gated SAE of width F need far fewer latents than a baseline of 1.5 F for the same loss recovered, unshrunken?

Run as `.venv/bin/python bench/reproduction.py --text FILE --out DIR [--minutes M] [--precision P] [--toy]`. Stages:
harvest; learning rates, chosen for each architecture on one seed from a printed grid; the sweep at every site; the
ablations at one; evaluation; report.html and summary.json. Each stage goes on where it was stopped: after --minutes,
the command that is running is stopped at a checkpoint and the same command goes on another time. What is run is `FULL`,
or `TOY`, as data. FULL is for a GPU, minutes of one; two cores take most of a day.
"""

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PAPER = {"l0_ratio": [1.7, 5.9], "gamma": {"gated": [0.98, 1.04], "relu": [0.72, 0.98]}}
WANTED_RATIO = 1 / 0.67  # Gated reaches the baseline's loss recovered with at most 0.67 of its L0
UNSHRUNKEN, SHRUNKEN = 0.95, 0.9  # gamma of a Gated SAE, where a baseline of about its L0 is below
STOPPED = (130, 143, -signal.SIGTERM, -signal.SIGINT)


@dataclass(frozen=True)
class Grid:
    """What is run. l1: an architecture's sparsities at each site; lr: what its learning rate is chosen from."""

    model: str
    sites: tuple[str, ...]
    rows: int
    context_size: int
    heldout: float
    window_rows: int
    width: int  # F; the baseline has 1.5 F
    l1: dict[str, dict[str, tuple[float, ...]]]
    lr: dict[str, tuple[float, ...]]
    lr_steps: int
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    ablations_at: str
    contexts: int
    precision: str = "float32"  # of the training's matrix products

    def widths(self) -> dict[str, int]:
        """Width by architecture, at equal cost of a step."""
        return {"gated": self.width, "relu": 3 * self.width // 2}


SPARSITIES = {
    "mlp.10": {"gated": (0.05, 0.08, 0.12, 0.18, 0.28, 0.42), "relu": (0.035, 0.05, 0.075, 0.11, 0.17, 0.26)},
    "attn.10": {"gated": (0.05, 0.08, 0.12, 0.18, 0.28, 0.42), "relu": (0.035, 0.05, 0.075, 0.11, 0.17, 0.26)},
    "resid.15": {"gated": (0.03, 0.05, 0.08, 0.12, 0.18, 0.28), "relu": (0.02, 0.035, 0.05, 0.075, 0.11, 0.17)},
}
FULL = Grid(
    model="builtin:smollm2-135m",
    sites=("mlp.10", "attn.10", "resid.15"),
    rows=1_000_000,
    context_size=256,
    heldout=0.1,
    window_rows=1 << 16,
    width=4096,
    l1=SPARSITIES,
    lr={"gated": (5e-4, 1e-3, 2e-3), "relu": (5e-4, 1e-3, 2e-3)},
    lr_steps=1000,
    seeds=(0, 1),
    steps=4000,
    batch_size=1024,
    ablations_at="mlp.10",
    contexts=64,
)
TOY = Grid(
    model="builtin:smollm2-135m",
    sites=("mlp.10", "resid.15"),
    rows=1500,
    context_size=64,
    heldout=0.01,
    window_rows=1 << 10,
    width=128,
    l1={site: {"gated": (0.1, 0.3), "relu": (0.06, 0.2)} for site in ("mlp.10", "resid.15")},
    lr={"gated": (1e-3, 2e-3), "relu": (1e-3, 2e-3)},
    lr_steps=20,
    seeds=(0, 1),
    steps=40,
    batch_size=128,
    ablations_at="mlp.10",
    contexts=4,
)


class OutOfTimeError(Exception):
    """The budget is used up; what has been done is kept."""


@dataclass
class Budget:
    """Runs commands of gsae until its time is up."""

    ends: float

    def run(self, *arguments: str) -> None:
        """Run one command; stop it in order when the time is up."""
        if time.monotonic() >= self.ends:
            raise OutOfTimeError
        print("$ gsae", shlex.join(arguments), file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "gsae.cli", *arguments]
        with subprocess.Popen(
            command, stdout=sys.stderr, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        ) as child:
            try:
                code = child.wait(max(1.0, self.ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.terminate()
                code = child.wait()
        if code in STOPPED:
            raise OutOfTimeError
        if code:
            raise SystemExit(f"`gsae {arguments[0]}` ended with exit code {code}.")


def main() -> int:
    """Run what is left to run; print one JSON line a site and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", default="builtin:pydoc", help="what `gsae harvest --dataset` takes; much text is better"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--toy", action="store_true", help="a few minutes that try every stage and show nothing")
    parser.add_argument("--precision", default="float32", help="what `gsae train --precision` takes")
    options = parser.parse_args()
    grid, out = replace(TOY if options.toy else FULL, precision=options.precision), options.out
    budget = Budget(time.monotonic() + 60 * options.minutes)
    out.mkdir(parents=True, exist_ok=True)
    began(out, grid, options.text)
    try:
        runs = everything(grid, options.text, out, budget)
    except OutOfTimeError:
        print(json.dumps({"bench": "reproduction", "met": False, "state": "stopped; the same command goes on"}))
        return 1
    summary = summarised(grid, out, runs)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for site, found in summary["sites"].items():
        print(json.dumps({"site": site, **{key: value for key, value in found.items() if key != "saes"}}))
    verdict = {key: summary[key] for key in ("sites_with_ratio", "sites_unshrunken", "ablations")}
    print(json.dumps({"bench": "reproduction", "met": summary["met"], "toy": options.toy, **verdict, "paper": PAPER}))
    return 0 if summary["met"] else 1


def began(out: Path, grid: Grid, text: str) -> None:
    """Note what is run in `out`, or refuse where something else was begun there."""
    before, now = out / "grid.txt", f"{text}\n{grid}\n"
    if before.exists() and before.read_text() != now:
        raise SystemExit(f"{out} was begun with another text or grid; choose another --out.")
    before.write_text(now)


# -- the stages


def everything(grid: Grid, text: str, out: Path, budget: Budget) -> dict[str, Path]:
    """Run all stages; return the folders of the sweeps by site, and of the ablations."""
    store = out / "store"
    harvest(grid, text, store, budget)
    runs: dict[str, Path] = {}
    for site in grid.sites:
        rates = chosen_rates(grid, store, site, out, budget)
        runs[site] = out / f"run-{site}"
        train(grid, store, site, sweep(grid, site, rates), grid.steps, runs[site], budget)
        if site == grid.ablations_at:
            runs["ablations"] = out / "run-ablations"
            saes = ablations(grid, site, rates, runs[site])
            train(grid, store, site, saes, grid.steps, runs["ablations"], budget)
    for run in runs.values():
        if not evaluated(run):
            budget.run("eval", str(run), "--contexts", str(grid.contexts))
    budget.run("report", *map(str, runs.values()), "--out", str(out / "report.html"))
    return runs


def harvest(grid: Grid, text: str, store: Path, budget: Budget) -> None:
    """Harvest all sites in one pass of the model."""
    settings = {
        "model": grid.model, "dataset": text, "site": ",".join(grid.sites), "rows": grid.rows,
        "context-size": grid.context_size, "heldout": grid.heldout, "window-rows": grid.window_rows, "out": store,
    }  # fmt: skip
    budget.run("harvest", *(word for key, value in settings.items() for word in (f"--{key}", str(value))))


def train(grid: Grid, store: Path, site: str, saes: Sequence[str], steps: int, run: Path, budget: Budget) -> None:
    """Train a sweep, or go on with it."""
    settings = {
        "site": site, "steps": steps, "batch-size": grid.batch_size, "precision": grid.precision, "out": run
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    budget.run("train", str(store), *words, *(word for sae in saes for word in ("--sae", sae)))


def sweep(grid: Grid, site: str, rates: dict[str, float]) -> list[str]:
    """The sweep of a site: each architecture at its width and rate, all sparsities and seeds."""
    return [
        f"{arch} width={width} l1={listed(grid.l1[site][arch])} lr={rates[arch]:g} seed={listed(grid.seeds)}"
        for arch, width in grid.widths().items()
    ]


def ablations(grid: Grid, site: str, rates: dict[str, float], run: Path) -> list[str]:
    """The paper's four: three changes of the Gated SAE, and the trained baselines with magnitudes learned anew."""
    gated = f"width={grid.width} l1={listed(grid.l1[site]['gated'])} lr={rates['gated']:g} seed={grid.seeds[0]}"
    changed = [f"gated variant={variant} {gated}" for variant in ("untied", "no_r_mag", "unfrozen")]
    baselines = [e for e in noted(run) if e["architecture"] == "relu" and e["seed"] == grid.seeds[0]]
    # It has no penalty: l1 is that of the baseline it begins with, for its name.
    again = f"rescale-shift width={grid.widths()['relu']} lr={rates['relu']:g}"
    saes = run / "saes"
    return [*changed, *(f"{again} l1={e['l1_coefficient']:g} init={saes / e['name']}" for e in baselines)]


def noted(run: Path) -> list[dict[str, Any]]:
    """Return what training noted of each SAE of a run, its folder's name as `name`."""
    found = sorted(run.glob("saes/*/cfg.json"))
    return [json.loads(path.read_text())["metadata"]["gsae"] | {"name": path.parent.name} for path in found]


def listed(values: Sequence[float]) -> str:
    """Write values as a sweep's list."""
    return ",".join(f"{value:g}" for value in values)


def chosen_rates(grid: Grid, store: Path, site: str, out: Path, budget: Budget) -> dict[str, float]:
    """Try each learning rate on one seed at the weakest and the strongest sparsity; return the best by architecture.

    At the weakest, steps are the largest: a rate that fails there is none for the sweep. Prints the grid.
    """
    run, rates = out / f"rates-{site}", {}
    tried = {arch: (grid.l1[site][arch][0], grid.l1[site][arch][-1]) for arch in grid.lr}
    saes = [
        f"{arch} width={grid.widths()[arch]} l1={listed(tried[arch])} lr={listed(values)} seed={grid.seeds[0]}"
        for arch, values in grid.lr.items()
    ]
    train(grid, store, site, saes, grid.lr_steps, run, budget)
    for arch in grid.lr:
        losses = {rate: [loss for lr, loss in final_losses(run, arch) if lr == rate] for rate in grid.lr[arch]}
        # Losses of two sparsities differ in size: their geometric mean weighs both alike.
        whole = {rate: each for rate, each in losses.items() if len(each) == len(tried[arch])}
        if not whole:
            raise SystemExit(f"At {site} an SAE of {arch} diverged at every learning rate of {grid.lr[arch]}.")
        score = {rate: statistics.geometric_mean(each) for rate, each in whole.items()}
        rates[arch] = min(score, key=lambda rate: score[rate])
        line = {"site": site, "arch": arch, "steps": grid.lr_steps, "loss_by_lr": score, "lr": rates[arch]}
        print(json.dumps(line), file=sys.stderr, flush=True)
    (out / f"rates-{site}.json").write_text(json.dumps(rates) + "\n")
    return rates


def final_losses(run: Path, arch: str) -> Iterator[tuple[float, float]]:
    """Learning rate and mean loss over the last tenth of the logged steps of each SAE that did not diverge."""
    logged: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry.get("loss") is not None:
            logged.setdefault(entry["sae"], []).append(entry["loss"])
    for sae in noted(run):
        losses = logged.get(sae["name"], [])
        last = losses[-max(1, len(losses) // 10) :]
        if sae["architecture"] == arch and last and sae.get("diverged") is None:
            yield sae["lr"], statistics.fmean(last)


def evaluated(run: Path) -> bool:
    """Say whether every SAE of a run has an eval.json that is newer than its weights."""
    for weights in run.glob("saes/*/sae_weights.safetensors"):
        found = weights.with_name("eval.json")
        if not found.exists() or found.stat().st_mtime < weights.stat().st_mtime:
            return False
    return True


# -- what it shows


def summarised(grid: Grid, out: Path, runs: dict[str, Path]) -> dict[str, Any]:
    """Compare with the paper."""
    sites = {site: of_site(read(runs[site])) for site in grid.sites}
    enough = [site for site, found in sites.items() if (found["l0_ratio"] or 0) >= WANTED_RATIO]
    unshrunken = [site for site, found in sites.items() if found["unshrunken"]]
    rates = {site: json.loads((out / f"rates-{site}.json").read_text()) for site in grid.sites}
    return {
        "met": 2 * len(enough) > len(sites) and 2 * len(unshrunken) > len(sites),
        "paper": PAPER,
        "sites_with_ratio": enough,
        "sites_unshrunken": unshrunken,
        "sites": sites,
        "learning_rates": rates,
        "ablations": of_ablations(read(runs[grid.ablations_at]), read(runs["ablations"])),
    }


def read(run: Path) -> list[dict[str, Any]]:
    """Read the eval.json of every SAE of a run."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("saes/*/eval.json"))]


def of_site(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The L0 ratio of the means over seeds with its interval over documents, that of each seed, and gamma."""
    from gsae.evaluate import Evaluation, summary

    found = summary([Evaluation.model_validate(e) for e in evaluations])
    kept = ("sae", "architecture", "seed", "l1_coefficient", "lr", "l0", "ce_loss_score", "explained_variance")
    kept += ("kl_div_score", "gamma", "gamma_centred", "dead", "dense")
    return {
        **found,
        "l0_ratio_by_seed": [own["l0_ratio"] for own in found["seeds"]],
        "gamma": {
            arch: ends([e["gamma"] for e in evaluations if e["architecture"] == arch]) for arch in ("gated", "relu")
        },
        "unshrunken": unshrunken(evaluations),
        "saes": [{key: e[key] for key in kept} for e in evaluations],
    }


def unshrunken(evaluations: list[dict[str, Any]]) -> bool | None:
    """Say whether every baseline that shrinks has a Gated SAE beside it in L0 that does not; None if none shrinks."""
    gated = [e for e in evaluations if e["architecture"] == "gated" and e["l0"]]
    shrinking = [e for e in evaluations if e["architecture"] == "relu" and e["l0"] and e["gamma"] < SHRUNKEN]
    if not gated or not shrinking:
        return None
    beside = [min(gated, key=lambda g: abs(math.log(g["l0"] / e["l0"]))) for e in shrinking]
    return all(g["gamma"] > UNSHRUNKEN for g in beside)


def ends(values: list[float]) -> list[float]:
    """Return the smallest and the largest."""
    return [min(values), max(values)] if values else []


def of_ablations(sweep: list[dict[str, Any]], changed: list[dict[str, Any]]) -> dict[str, float | None]:
    """L0 of each ablation over that of the whole Gated SAE at equal loss recovered: above 1, it needs more latents."""
    from gsae.evaluate.report.pareto import Point, l0_ratio

    def points(evaluations: list[dict[str, Any]], arch: str, seed: int) -> list[Point]:
        return [
            Point(e["l0"], e["ce_loss_score"])
            for e in evaluations
            if e["architecture"] == arch and e["seed"] == seed and e["ce_loss_score"] is not None
        ]

    seed = changed[0]["seed"]
    whole = points(sweep, "gated", seed)
    kinds = sorted({e["architecture"] for e in changed})
    return {kind: l0_ratio(whole, points(changed, kind, seed)).value for kind in kinds}


if __name__ == "__main__":
    sys.exit(main())
