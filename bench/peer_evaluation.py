"""Do SAELens's and SAEBench's own evaluations of our saved SAEs, on the same tokens, give what `gsae eval` gives?

Run as `.venv/bin/python bench/peer_evaluation.py [--work DIR]` after `make bench-peers`; `--work` keeps the store and
run it makes (SmolLM2 in float32, a few contexts) for another time. It writes SAEs, tokens and figures to a folder and
calls itself with `--peer` in the peers' venv. SAEBench is used where `--sae-bench PYTHON` names a Python that has it.
What is compared, and how closely, is in `EQUAL`; the rest of SAELens's figures is printed beside ours.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PEER = Path(".venv-peers/bin/python")
SITE = "mlp.10"
CONTEXTS = 6  # run through the model by both sides; figures of the activations are over all held-out contexts
# Few held-out contexts, no row skipped, float32: so that only definitions can differ.
HARVEST = shlex.split(
    "--model builtin:smollm2-135m --dataset builtin:pydoc --context-size 128 --rows 12000 --heldout 0.15 "
    f"--max-documents 60 --window-rows 16384 --batch-size 8 --dtype float32 --codec zstd --device cpu --site {SITE}"
)
TRAIN = shlex.split(
    "--sae 'gated width=512 l1=.1,.25' --sae 'relu width=768 l1=.07,.2' --batch-size 256 --steps 160 "
    f"--max-norm-multiple 0 --device cpu --site {SITE}"
)
# Peers' name: ours, and the largest difference relative to the larger of the two.
EQUAL = {
    "l0": ("l0", 1e-4),
    "explained_variance": ("explained_variance", 1e-4),
    "mse": ("mse", 1e-4),
    "cossim": ("cossim", 1e-4),
    "l2_ratio": ("l2_ratio", 1e-4),
    "relative_reconstruction_bias": ("gamma", 1e-4),
    "ce_loss_score": ("ce_loss_score_all_positions", 1e-3),
    "ce_loss_without_sae": ("all_positions.ce_loss_without_sae", 1e-4),
    "ce_loss_with_sae": ("all_positions.ce_loss_with_sae", 1e-4),
    "ce_loss_with_ablation": ("all_positions.ce_loss_with_ablation", 1e-4),
}
BESIDE = {"kl_div_score": "kl_div_score", "kl_div_with_sae": "kl_div_with_sae"}
# SAEBench's own: the mean square of a channel in place of its square mean, and another division by the rows.
NOT_IN_SAE_BENCH = ("explained_variance", "mse")


def main() -> int:
    """Print one JSON line an SAE and peer, and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for store, run and what passes between the two Pythons")
    parser.add_argument("--sae-bench", type=Path, help="a Python that has sae-bench")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--with", dest="which", default="sae_lens", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        for line in evaluated(options.peer, options.which):
            print(json.dumps(line))
        return 0
    if not PEER.exists():
        parser.error(f"{PEER} is not there. Run `make bench-peers` first, from the repository root.")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        ours = our_figures(work)
        peers = {"sae_lens": PEER} | ({"sae_bench": options.sae_bench} if options.sae_bench else {})
        lines = [compared(line, ours) for name, python in peers.items() for line in theirs(python, work, name)]
    for line in lines:
        print(json.dumps(line))
    met = all(line["within"] for line in lines)
    worst = {key: max(line["differences"].get(key, 0.0) for line in lines) for key in EQUAL}
    verdict = {"bench": "peer_evaluation", "met": met, "worst": worst, "saes": len(ours), "peers": sorted(peers)}
    print(json.dumps(verdict))
    return 0 if met else 1


def compared(line: dict[str, Any], ours: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Set a peer's figures of an SAE beside ours."""
    mine, figures = ours[line["sae"]], line["figures"]
    skip = NOT_IN_SAE_BENCH if line["peer"] == "sae_bench" else ()
    pairs = {key: (figures[key], mine[own]) for key, (own, _) in EQUAL.items() if key not in skip}
    apart = {key: abs(a - b) / max(abs(a), abs(b)) for key, (a, b) in pairs.items()}
    return {
        "peer": line["peer"],
        "version": line["version"],
        "sae": line["sae"],
        "ours": {
            own: mine[own] for own in ("l0", "explained_variance", "gamma", "ce_loss_score", EQUAL["ce_loss_score"][0])
        },
        "differences": apart,
        "within": all(apart[key] <= EQUAL[key][1] for key in apart),
        "beside": {key: [figures[key], mine[own]] for key, own in BESIDE.items()},
    }


# -- in our environment


def our_figures(work: Path) -> dict[str, dict[str, Any]]:
    """Harvest, train and evaluate into `work` what is not there yet; return the figures of each SAE by name."""
    from gsae.harvest import load_planned
    from gsae.store import open_store

    store, run = work / "store", work / "run"
    gsae("harvest", *HARVEST, "--out", str(store))
    gsae("train", str(store), *TRAIN, "--out", str(run))
    gsae("eval", str(run), "--contexts", str(CONTEXTS), "--device", "cpu")
    write_given(open_store(store), work / "given.pt")
    if not (work / "model").exists():
        lm = load_planned(open_store(store).plan.model, None)
        lm.model.save_pretrained(work / "model")
        lm.tokenizer.save_pretrained(work / "model")
    found = {}
    for file in sorted(run.glob("saes/*/eval.json")):
        figures = json.loads(file.read_text())
        assert figures["rows_skipped"] == 0
        model = figures["language_model"]
        inner = {f"all_positions.{key}": value for key, value in model["all_positions"].items()}
        found[file.parent.name] = figures | model | inner
    return found


def write_given(store: Any, out: Path) -> None:
    """Write the tokens of the held-out contexts, and which of them were run through the model."""
    import numpy as np

    from gsae.evaluate.spliced_documents import choose_contexts

    tokens = torch.from_numpy(store.tokens()[store.split() == 1].astype("int64"))
    heldout = np.flatnonzero(store.split() == 1)
    ran = torch.from_numpy(np.isin(heldout, choose_contexts(heldout, store.plan.seed, CONTEXTS)))
    special = list(store.plan.tokenizer.excluded_ids)
    module = store.site(SITE).spec.module
    torch.save({"tokens": tokens, "spliced": tokens[ran], "special": special, "module": module}, out)


def gsae(*arguments: str) -> None:
    """Run a command of ours."""
    print("$ gsae", shlex.join(arguments), file=sys.stderr)
    command = [sys.executable, "-m", "gsae.cli", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})


def theirs(python: Path, work: Path, name: str) -> list[dict[str, Any]]:
    """Let another Python evaluate what stands in `work`."""
    command = [str(python), __file__, "--peer", str(work), "--with", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


# -- in the peers' environment


class Given:
    """An activation store that has nothing but the tokens it was given, from the start each time it is asked."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.at = tokens, 0
        self.context_size = tokens.shape[1]
        self.store_batch_size_prompts = len(tokens)

    def get_batch_tokens(self, size: int) -> Tensor:
        """Return the next contexts."""
        self.at += size
        return self.tokens[self.at - size : self.at]

    def reset_input_dataset(self) -> None:
        """Start again."""
        self.at = 0


def evaluated(work: Path, which: str) -> Iterator[dict[str, Any]]:
    """Evaluate every SAE with the peer's own functions, at the model's own modules."""
    warnings.simplefilter("ignore")
    import sae_lens
    from sae_lens.load_model import load_model

    given = torch.load(work / "given.pt")
    model = load_model("AutoModelForCausalLM", str(work / "model"), "cpu", {"dtype": torch.float32}, [given["module"]])
    for folder in sorted((work / "run").glob("saes/*/")):
        sae = sae_lens.SAE.load_from_disk(str(folder))
        sae.cfg.metadata.hook_name = given["module"]
        run = with_sae_lens if which == "sae_lens" else with_sae_bench
        version, found = run(sae, model, given)
        figures = {key: value for group in found for category in group.values() for key, value in category.items()}
        yield {"peer": which, "version": version, "sae": folder.name, "figures": figures}


@torch.no_grad()
def with_sae_lens(sae: Any, model: Any, given: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """SAELens: reconstruction in small batches, activations in one, so that means over batches are means over rows."""
    import sae_lens
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    tokens, ran = given["tokens"], given["spliced"]
    spliced = EvalConfig(1, len(ran), compute_kl=True, compute_ce_loss=True)
    flags = {f"compute_{name}": True for name in ("l2_norms", "sparsity_metrics", "variance_metrics")}
    rows = EvalConfig(len(tokens), n_eval_sparsity_variance_batches=1, **flags)
    found = [
        run_evals(sae, Given(part), model, ActivationScaler(), config, exclude_special_tokens=given["special"])[0]
        for part, config in ((ran, spliced), (tokens, rows))
    ]
    return sae_lens.__version__, found


@torch.no_grad()
def with_sae_bench(sae: Any, model: Any, given: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """SAEBench's core evaluation; its SAEs have their hook in another place than today's SAELens."""
    from importlib.metadata import version

    from sae_bench.evals.core import main as core

    cfg = types.SimpleNamespace(
        hook_name=given["module"], hook_head_index=None, hook_layer=10, d_sae=sae.cfg.d_sae, d_in=sae.cfg.d_in
    )
    shown = types.SimpleNamespace(cfg=cfg, encode=sae.encode, decode=sae.decode, device=torch.device("cpu"))
    tokens, ran, special = given["tokens"], given["spliced"], set(given["special"])
    names = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    spliced = core.get_downstream_reconstruction_metrics(
        shown, model, Given(ran), compute_kl=True, compute_ce_loss=True, n_batches=len(ran),
        eval_batch_size_prompts=1, ignore_tokens=special, exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    rows, _ = core.get_sparsity_and_variance_metrics(
        shown, model, Given(tokens), n_batches=1, eval_batch_size_prompts=len(tokens), model_kwargs={},
        ignore_tokens=special, **{f"compute_{name}": True for name in names},
    )  # fmt: skip
    return version("sae-bench"), [{"spliced": spliced, "rows": rows}]


if __name__ == "__main__":
    sys.exit(main())
