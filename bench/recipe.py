"""The start, the row clip and the learning rates, measured: what the defaults of `gsae train` rest on.

Run as `.venv/bin/python bench/recipe.py --store STORE --out DIR [--part start,clip,...]`. STORE has SmolLM2-135M's
mlp.10, attn.10 and resid.15, for example from
`gsae harvest --model builtin:smollm2-135m --dataset FILE --context-size 256 --heldout 0.1 --site mlp.10 --site attn.10
--site resid.15 --out STORE`. Every part is a sweep of `gsae.train.train` with batches of 512 rows; figures are those of
all held-out rows at the last step. A part that was stopped goes on where it was.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BATCH = 512


@dataclass(frozen=True)
class Sweep:
    """One run: its SAEs as `--sae` takes them, and its settings."""

    site: str
    saes: tuple[str, ...]
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)


SEEDS = "seed=0,1,2"
WEAK_AND_STRONG = {
    "mlp.10": ("gated width={} l1=.08,.3", "relu width={} l1=.045,.17"),
    "attn.10": ("gated width={} l1=.08,.3", "relu width={} l1=.045,.17"),
    "resid.15": ("gated width={} l1=.05,.2", "relu width={} l1=.03,.11"),
}


def grid(site: str, width: int, rates: str, seed: int = 0) -> Sweep:
    """Both architectures, the weakest and the strongest penalty, some rates."""
    words = f" lr={rates} seed={seed}"
    saes = tuple(line.format(width) + words for line in WEAK_AND_STRONG[site])
    return Sweep(site, saes, 1000, {"precision": "bfloat16"})


PARTS: dict[str, dict[str, Sweep]] = {
    # Only the start differs; penalties of the scaled start are on both sides of the L0 of the unit one.
    "start": {
        "unit": Sweep(
            "mlp.10",
            (f"gated width=4096 l1=.12,.25 {SEEDS}", f"relu width=4096 l1=.06,.11 {SEEDS}"),
            2000,
            {"lr": 1e-3, "encoder_start": "unit", "precision": "bfloat16"},
        ),
        "scaled": Sweep(
            "mlp.10",
            (f"gated width=4096 l1=.12,.2,.25 {SEEDS}", f"relu width=4096 l1=.06,.085,.11 {SEEDS}"),
            2000,
            {"lr": 1e-3, "encoder_start": "scaled", "precision": "bfloat16"},
        ),
    },
    "clip": {
        f"{start}-{'clip' if clip else 'none'}": Sweep(
            "mlp.10",
            ("gated width=512 l1=.12 lr=1e-2,6e-3 seed=0,1,2,3,4,5",),
            300,
            {"row_clip": clip, "encoder_start": start, "lr_warm_up_steps": 30},
        )
        for start, clip in itertools.product(("unit", "scaled"), (False, True))
    },
    "resid": {
        f"{start}-{'clip' if clip else 'none'}": Sweep(
            "resid.15",
            ("gated width=4096 l1=.03,.18 lr=2e-3,4e-3", "relu width=4096 l1=.02,.11 lr=2e-3,4e-3"),
            1000,
            {"row_clip": clip, "encoder_start": start},
        )
        for start, clip in (("scaled", True), ("scaled", False), ("unit", False))
    },
    "rates": {f"{site}-4096": grid(site, 4096, "5e-4,1e-3,2e-3") for site in WEAK_AND_STRONG},
    "narrow": {"mlp.10-1024": grid("mlp.10", 1024, "5e-4,1e-3,2e-3")},
    "seeds": {f"{site}-4096": grid(site, 4096, "1e-3,2e-3", seed=1) for site in WEAK_AND_STRONG},
    "wide": {"mlp.10-16384": grid("mlp.10", 16384, "2.5e-4,5e-4,1e-3")},
    # The largest rate above is the best of its row nearly everywhere, so larger ones follow.
    "high": {
        "mlp.10-1024": grid("mlp.10", 1024, "4e-3,8e-3"),
        "mlp.10-4096": grid("mlp.10", 4096, "4e-3"),
        "attn.10-4096": grid("attn.10", 4096, "4e-3"),
        "mlp.10-16384": grid("mlp.10", 16384, "2e-3"),
    },
    "long": {
        "mlp.10-1024": Sweep(
            "mlp.10", ("gated width=1024 l1=.08,.3 lr=1e-3,2e-3,4e-3 seed=0",), 5000, {"precision": "bfloat16"}
        )
    },
}


def run(store: Path, folder: Path, sweep: Sweep) -> None:
    """Train one sweep, or go on with it."""
    from gsae.store import open_store
    from gsae.train import RunConfig, parse_sae, train

    usual = {
        "batch_size": BATCH,
        "eval_every": sweep.steps,
        "eval_rows": 1 << 30,
        "on_divergence": "continue",
        "threads": 1,
        "checkpoint_every": 500,
    }
    saes = tuple(sae for line in sweep.saes for sae in parse_sae(line))
    config = RunConfig(**(usual | sweep.settings), site=sweep.site, steps=sweep.steps, saes=saes, device="cpu")
    train(open_store(store).site(sweep.site), config, folder)


def rows(part: str, name: str, folder: Path) -> Iterator[str]:
    """A line for each SAE: what was asked, and what came out."""
    from gsae.train import read_config

    config = read_config(folder)
    last = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        last[line["sae"]] = line
    for sae in config.saes:
        line = last[sae.name]
        held = line.get("heldout") or {}
        figures = [f"{held[key]:.3f}" if held.get(key) is not None else "-" for key in ("l0", "explained_variance")]
        loss, dead = (f"{line[key]:.3f}" if line.get(key) is not None else "-" for key in ("loss", "dead"))
        asked = f"{sae.arch} {sae.d_sae} {sae.l1_coefficient:g} {sae.lr:g} {sae.seed}"
        yield " | ".join([part, name, *asked.split(), *figures, loss, dead])


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    arguments = parser.parse_args()
    print("part | run | arch | width | l1 | lr | seed | L0 | explained variance | training loss | silent", flush=True)
    for part in arguments.part.split(","):
        for name, sweep in PARTS[part].items():
            folder = arguments.out / part / name
            run(arguments.store, folder, sweep)
            print(*rows(part, name, folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
