"""The whole pipeline on real input that comes as packages: SmolLM2-135M and Python's own language reference.

Each stage is the command that a user would type and runs in a separate process, so training cannot use the language
model. It takes some minutes on two cores. A CPU without bfloat16 products runs the model in float32: in bfloat16 that
would take an hour.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gsae.commands.options import Json
from gsae.commands.terminal import print_json, print_table
from gsae.errors import GsaeError

SITE = "mlp.10"
# Topics differ a hundredfold in length. With this seed 18 of 78 are held out, which are a tenth of the text.
HARVEST = shlex.split(
    "--model builtin:smollm2-135m --dataset builtin:pydoc --context-size 256 --heldout 0.15 --seed 52 "
    "--window-rows 16384 --batch-size 8 --device cpu"
)
# Widths at equal compute: a baseline step costs a third less, so it is 1.5 times as wide, as in the paper.
SAES = (
    "gated width=1024 l1=.065,.1,.17,.28",
    "relu width=1536 l1=.045,.075,.13,.25",
)
# Half the default rate: the text is so small that it is read five times, and a higher rate fits it more closely than
# the held-out part (bench/RESULTS.md).
TRAIN = shlex.split("--batch-size 512 --steps 800 --lr 1e-3 --device cpu --checkpoint-every 600")
EVAL = ["--device", "cpu"]
MAX_DEAD = 0.2
# What each stage takes on two cores with products of bfloat16, and without (bench/RESULTS.md).
SECONDS = {
    "harvest": (30, 95), "verify": (5, 5), "train": (90, 145), "eval": (100, 290), "report": (5, 5),
    "features": (25, 25), "browse": (15, 15),
}  # fmt: skip
COLUMNS = ("arch", "d_sae", "l1_coefficient", "l0", "ce_loss_score", "explained_variance", "gamma")
BFLOAT16, FLOAT32 = ("--dtype", "bfloat16"), ("--dtype", "float32", "--codec", "zstd")


class DemoError(GsaeError):
    """A stage of the demo failed, or its result is not as expected."""


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the store, the run and the report.")] = Path(
        "demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a language model and a text that come as packages.

    It takes about five minutes on two cores with products of bfloat16, and about ten on a CPU without.
    """
    summary = run_demo(out, lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(summary)
        return
    print_table(COLUMNS, summary["saes"])
    low, high = summary["l0_ratio_interval"] or (float("nan"), float("nan"))
    typer.echo(f"\nAt equal loss recovered the baselines fire {summary['l0_ratio']:.2f} times as many latents as the")
    typer.echo(f"Gated SAEs (90 % interval {low:.2f} to {high:.2f}). gamma = 1 means no shrinkage.")
    from gsae.evaluate import few_documents

    if few := few_documents(summary["documents"]):
        typer.echo(few)
    store = summary["store"]
    typer.echo(f"Store: {store['ratio']:.3f} of raw {store['dtype']}.\n")
    typer.echo(f"The plots and tables: open {out / 'report.html'} in a browser.")
    ours = sys.argv[0] if Path(sys.argv[0]).name == "gsae" else "gsae"  # .venv/bin/gsae after `make demo`
    names = "".join(f" --sae {name}" for name in summary["alike"])
    typer.echo(f"What each latent fires on: {ours} browse {out / 'run'}")
    typer.echo(f"Rate latents of a Gated SAE and of a baseline blind: {ours} browse {out / 'run'} --blind{names}")


def run_demo(
    out: Path,
    say: Callable[[str], None],
    *,
    harvest: list[str] | None = None,
    saes: tuple[str, ...] = SAES,
    train: list[str] | None = None,
    evaluate: list[str] = EVAL,
) -> dict[str, Any]:
    """Harvest, verify, train, evaluate, describe and show in `out`, and return what `summary.json` holds.

    say: called with each command before it runs. The other arguments are options of the commands. harvest, train: None
    for the demo's options, with the types in which this CPU is fast. Raises DemoError when a stage fails, or when more
    than a fifth of the latents of a Gated SAE are dead.
    """
    fast = multiplies_bfloat16()
    harvest = [*HARVEST, *(BFLOAT16 if fast else FLOAT32)] if harvest is None else harvest
    train = [*TRAIN, *(("--precision", "bfloat16") if fast else ())] if train is None else train
    store, run, page = out / "store", out / "run", out / "report.html"
    sweep = [part for sae in saes for part in ("--sae", sae)]
    stages = {
        "harvest": ["harvest", *harvest, "--site", SITE, "--out", str(store)],
        "verify": ["verify", str(store), "--deep"],
        "train": ["train", str(store), "--site", SITE, *sweep, *train, "--out", str(run)],
        "eval": ["eval", str(run), *evaluate],
        "report": ["report", str(run), "--out", str(page)],
        "features": ["features", str(run), "--device", "cpu"],
        "browse": ["browse", str(run), "--no-serve"],
    }
    seconds = {name: _run(arguments, say, _about(name)) for name, arguments in stages.items()}
    summary = summarise(store, run) | {"seconds": seconds}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for sae in summary["saes"]:
        if sae["arch"] == "gated" and sae["dead"] > MAX_DEAD:
            raise DemoError(f"{sae['dead']:.0%} of the latents of a Gated SAE (l1 {sae['l1_coefficient']}) are dead.")
    return summary


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16. Without them torch is 20 times slower."""
    import torch

    return platform.machine() == "arm64" or torch.cpu._is_avx512_bf16_supported()


def summarise(store: Path, run: Path) -> dict[str, Any]:
    """Return the figures of a demo, read from its store and its evaluated run."""
    from gsae.evaluate import read_evaluations, summary
    from gsae.store import describe

    evaluations = read_evaluations(run)
    kept = ("d_sae", "l1_coefficient", "l0", "explained_variance", "ce_loss_score", "gamma", "gamma_centred", "dead")
    saes = [{"sae": e.sae, "arch": e.architecture, **{key: getattr(e, key) for key in kept}} for e in evaluations]
    facts = describe(store)
    return {
        "saes": sorted(saes, key=lambda sae: (sae["arch"], sae["l0"])),
        **summary(evaluations),
        "alike": _alike(saes),
        "store": {
            "rows": facts["rows"]["train"],
            "heldout_rows": facts["rows"]["heldout"],
            "bytes": facts["bytes"],
            "dtype": facts["dtype"],
            "ratio": facts["moments"][SITE]["ratio"],
            "digest": facts["digest"],
        },
    }


def _alike(saes: list[dict[str, Any]]) -> list[str]:
    """Return the names of the Gated SAE and the baseline whose loss recovered is most similar."""
    gated, baselines = ([sae for sae in saes if sae["arch"] == arch] for arch in ("gated", "relu"))
    pairs = [(abs(g["ce_loss_score"] - b["ce_loss_score"]), g["sae"], b["sae"]) for g in gated for b in baselines]
    return list(min(pairs)[1:])


def _about(stage: str) -> str:
    """Say how long a stage takes on two cores like these."""
    seconds = SECONDS[stage][0 if multiplies_bfloat16() else 1]
    return f"about {seconds} s" if seconds < 100 else f"about {round(seconds / 60)} minutes"


def _run(arguments: list[str], say: Callable[[str], None], about: str) -> float:
    """Run one gsae command in a process and return its seconds."""
    say(f"\n$ gsae {shlex.join(arguments)}    # {about}")
    started = time.monotonic()
    command = [sys.executable, "-m", "gsae.cli", *arguments]
    done = subprocess.run(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise DemoError(f"`gsae {arguments[0]}` ended with exit code {done.returncode}. Its message is above.")
    return round(time.monotonic() - started, 1)
