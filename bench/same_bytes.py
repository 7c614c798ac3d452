"""Do the commands of two checkouts write the same bytes?

Run as `.venv/bin/python bench/same_bytes.py --before DIR --after DIR [--work FOLDER] [--but PATTERN[:KEY]]...`; each
DIR is a source folder that is the package `gsae`, this one where none is given. A tiny language model and a text are
made once. Then each checkout harvests, trains, evaluates and so on by its own command line alone, in one and the same
folder, since some files name absolute paths. Every file is compared, and what the commands print; of a refused one,
its line on stderr. `--but` names intended differences: files (fnmatch), or with KEY one of their keys if they are JSON.
The work folder is kept, with both trees and logs. The first checkout's tree is taken from there if its sources, this
script and the packages are the same; compiled loops are kept by the sources that they were compiled from.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# All that differs from one run to the next on purpose: files, keys in them, and why.
EXCLUDED = (
    ("said/dry-run.json", "available_bytes", "the memory that is free at the moment"),
    ("said/dry-run.json", "measured_step_seconds_*", "measured"),
    ("said/dry-run.json", "expected_seconds", "follows from the measured seconds"),
    ("said/dry-run.json", "read_bytes_per_second_needed", "follows from the measured seconds"),
)
# What the first checkout's logs must tell, or these commands have come to miss that code.
REACHED = {
    "run": ("path dense", "path sparse", "got new directions", "held-out L0"),
    "sweep": ("path sparse", "got new directions", "going on after step", "rows left out"),
}
AT_ONCE = 2  # commands; bytes do not depend on it, since each says how many threads it takes
BESIDE = {"tests", "bench", "docs", "build", "demo-out", "gsae.egg-info"}  # what lies beside the package in a checkout
# Run before any import of a checkout's: what it lacks must not come from the folder of an editable installation.
ALONE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
WHENCE = "import gsae, sys; print(gsae.__file__, *(f for f in sys.meta_path if 'ditable' in repr(f)))"

HARVEST = (
    "harvest --model ../input/model --dataset ../input/text.jsonl --context-size 64 --heldout .15 --window-rows 2048 "
    "--batch-size 8 --device cpu --threads 1 --json"
)
STORE = f"{HARVEST} --rows 6000 --site resid.1,mlp.0 --out store"
PARTS = (
    f"{HARVEST} --rows 5000 --site mlp.0,attn.1 --site module:model.layers.0.mlp.up_proj:out --level 0 --seed 5 "
    "--skip-documents 9 --shuffle-documents 3 --drop-positions 0-2 --out parts"
)
FIT = (
    "--site mlp.0 --steps 200 --batch-size 128 --device cpu --log-every 20 --eval-every 50 --lr-warm-up-steps 10 "
    "--resample-at 80,140 --resample-silent-rows 128 --json"
)
RUN = (
    f"train store --out run {FIT} --threads 2 --checkpoint-every 40 --sae 'relu width=96 l1=.3,.8' "
    "--sae 'gated width=128 l1=.4,3' --sae 'gated width=64 l1=.2 variant=untied lr=2e-3'"
)
SWEEP = (
    f"train store parts --out sweep {FIT} --threads 1 --checkpoint-every 15 --no-screening --io pread --data-seed 1 "
    "--resample-bias zero --max-norm-multiple 1.5 --config ../input/sweep.toml"
)
SCALED = (
    f"train store --out scaled {FIT} --threads 1 --clip-grad-norm .5 --precision bfloat16 "
    "--sae 'rescale-shift width=96 init=run/saes/relu-w96-l1_0.3-seed0' "
    "--sae 'relu width=96 l1=.5 init=run/saes/relu-w96-l1_0.8-seed0'"
)
TABLE = '[[sae]]\narch = "gated"\n'
SWEEP_TOML = f'{TABLE}width = 64\nl1 = 0.3\nvariant = ["no_r_mag", "unfrozen"]\n{TABLE}width = [96, 192]\nl1 = 3\n'
GATED, RELU = "gated-w128-l1_0.4-seed0", "relu-w96-l1_0.3-seed0"
EVAL = "--model ../input/model --device cpu --json"
VERBS = "demo harvest sites info verify seal copy ls train eval report features browse export"


@dataclass(frozen=True)
class Command:
    """A command. said: the name under which what it prints is kept, if it is; code: the exit code it must have.

    stop_at: it is stopped as soon as this file is there.
    """

    said: str
    line: str
    code: int = 0
    stop_at: str = ""


Step = Command | Callable[[Path], Any]


def damage(tree: Path) -> None:
    """Change one bit of a store."""
    shard = max((tree / "damaged/train/mlp.0").rglob("c/*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


# Stages in turn; in each, one after the other, groups of steps that do not wait for one another.
STAGES: dict[str, list[list[Step]]] = {
    "harvest": [
        [Command("store", STORE), Command("tokens", f"{PARTS} --only-tokens")],
        [Command("parts-0", f"{PARTS} --rank 0 --world-size 2"), Command("sites", "sites ../input/model --json")],
        [lambda tree: shutil.copytree(tree / "parts", tree / "sealed")],
        [Command("parts-1", f"{PARTS} --rank 1 --world-size 2"), Command("seal", "seal sealed --json")],
    ],
    "train": [
        [Command("run", RUN), Command("", SWEEP, stop_at="sweep/state/0/checkpoint.safetensors")],
        [Command("sweep", SWEEP), Command("scaled", SCALED)],
        [Command("dry-run", f"{RUN} --dry-run"), Command("changed", f"{RUN} --data-seed 1", code=5)],
    ],
    "eval": [[Command("eval", f"eval run --contexts 8 {EVAL}"), Command("no-model", "eval scaled --no-model")]],
    "features": [[Command("features", f"features run --top 6 --samples 3 {EVAL}")]],
    "report, browse, export": [
        [
            Command("report", "report run scaled --out report.html --png plots"),
            Command("browse", "browse run --no-serve --json --out site"),
            Command("blind", f"browse run --blind --pairs 9 --no-serve --sae {GATED} --sae {RELU} --json"),
            Command("gated", f"export run/{GATED} --out exported/gated"),
            Command("relu", f"export run/{RELU} --out exported/relu"),
            Command("delphi", f"export run/{GATED} --out exported/delphi --format delphi"),
            Command("neuronpedia", f"export run/{GATED} --out exported/neuronpedia --format neuronpedia"),
        ]
    ],
    "copy, verify, info": [
        [
            Command("zstd", "copy store zstd --codec zstd --level 3 --json"),
            Command("part", "copy store damaged --sites mlp.0 --windows 1 --json"),
        ],
        [damage],
        [Command("verify", "verify parts --deep --json"), Command("broken", "verify damaged --deep --json", code=4)],
        [Command("info", "info store --json"), Command("info-run", "info sweep --json"), Command("ls", "ls . --json")],
        [Command(f"help-{verb}", f"{verb} --help") for verb in VERBS.split()],
    ],
}


def main() -> int:
    """Print a line a stage, the differences and the verdict; return 0 when there are none but the intended."""
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, default=here, help="a checkout; the one of this script by default")
    parser.add_argument("--after", type=Path, default=here, help="another; the same by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gsae-same-bytes")
    parser.add_argument("--but", action="append", default=[], metavar="PATTERN[:KEY]", help="an intended difference")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    packages = sorted(f"{each.name} {each.version}" for each in distributions())
    own = hashlib.sha256(repr((Path(__file__).read_bytes(), sys.version, packages)).encode()).hexdigest()
    with (work / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if read(work / "input/made") != own.encode():
            make_input(work / "input", own)
        stages = made(work, "before", options.before, own)
        told = {name: (work / f"logs-before/{name}.txt").read_text() for name in REACHED}
        if missed := [words for name, every in REACHED.items() for words in every if words not in told[name]]:
            raise SystemExit(f"The logs lack {missed}: the commands have come to miss what that stands for.")
        stages |= made(work, "after", options.after)
        return compare(work, stages, [(*each.split(":", 1), "")[:2] for each in options.but])


# -- what a checkout makes


def made(work: Path, side: str, checkout: Path, own: str = "") -> dict[str, str]:
    """Make a checkout's tree, or find it made as `own` says; return each file's stage, the last that wrote it."""
    package, tree, logs, stamp = (work / name for name in ("import/gsae", "tree", f"logs-{side}", f"{side}.json"))
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(checkout, package, ignore=beside)  # as it is now, whoever goes on working there
    (package.parent / "sitecustomize.py").write_text(ALONE)
    hashes = [(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in files(package).items()]
    digest = hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]
    kept = json.loads(read(stamp) or b"{}")
    if own and (kept.get("own"), kept.get("digest")) == (own, digest):
        print(f"{side}: {checkout}, made before", flush=True)
        return dict(kept["stages"])
    for folder in (tree, logs, work / side, work / "scratch"):
        shutil.rmtree(folder, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    (tree / "said").mkdir(parents=True)
    logs.mkdir()
    environment = variables(work, digest)
    whence = subprocess.check_output([sys.executable, "-c", WHENCE], cwd=tree, env=environment, text=True).strip()
    if whence != str(package / "__init__.py"):
        raise SystemExit(f"What is imported is not {checkout}, copied to {package}, but {whence}")
    stages: dict[str, str] = {}
    seen: dict[str, tuple[int, int]] = {}
    for stage, groups in STAGES.items():
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for group in groups:
                list(pool.map(lambda step: run(step, tree, logs, environment), group))
        now = {name: (path.stat().st_mtime_ns, path.stat().st_size) for name, path in files(tree).items()}
        stages |= {name: stage for name in now if now[name] != seen.get(name)}
        seen = now
        print(f"{side}: {stage}, {time.monotonic() - began:.0f} s", flush=True)
    tree.rename(work / side)
    stamp.write_text(json.dumps({"own": own, "digest": digest, "stages": stages}))
    return stages


def beside(folder: str, names: list[str]) -> set[str]:
    """Return what of a checkout's folder is not the package."""
    others = BESIDE if "pyproject.toml" in names else set()
    return {name for name in names if name.startswith((".", "__pycache__")) or name in others}


def run(step: Step, tree: Path, logs: Path, environment: dict[str, str]) -> None:
    """Do a step; what it prints goes to said/, its stderr to the logs. Ends the comparison where it goes wrong."""
    if not isinstance(step, Command):
        step(tree)
        return
    log = logs / f"{step.said or 'stopped'}.txt"
    command = [sys.executable, "-m", "gsae.cli", *shlex.split(step.line)]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        if step.stop_at:
            while process.poll() is None and not (tree / step.stop_at).exists():
                time.sleep(0.01)
            process.terminate()
        out = process.communicate()[0]
    if process.returncode not in ((0, 143) if step.stop_at else (step.code,)):
        raise SystemExit(f"gsae {step.line}\nended with {process.returncode}, not {step.code}:\n{log.read_text()}")
    if step.code:
        out += "".join(line for line in log.read_text().splitlines(keepends=True) if line.startswith("gsae: "))
    if step.said:
        ending = "json" if "--json" in step.line and not step.code else "txt"
        (tree / f"said/{step.said}.{ending}").write_text(out)


def variables(work: Path, digest: str) -> dict[str, str]:
    """Return the environment of a checkout's commands; two checkouts share no cache of what gsae makes."""
    others = ("PYTHON", "GSAE", "SLURM", "HF_", "NUMBA", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    folders = {"PYTHONPATH": "import", "NUMBA_CACHE_DIR": f"compiled/{digest}", "MPLCONFIGDIR": "matplotlib"}
    folders |= {"HF_HOME": "scratch/hf", "GSAE_CACHE": "scratch/gsae"}
    fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    return kept | fixed | threads | {name: str(work / folder) for name, folder in folders.items()}


def make_input(folder: Path, stamp: str) -> None:
    """Write a random Llama of two layers in bfloat16, its tokenizer, a text of 150 documents, and a sweep."""
    from pydoc_data.topics import topics

    import numpy as np
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    shutil.rmtree(folder, ignore_errors=True)
    texts = [topics[name] for name in sorted(topics)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    letters: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    learn = trainers.BpeTrainer(vocab_size=512, special_tokens=[*special.values()], **letters)
    backend.train_from_iterator(texts, learn)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "model")
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    words, draw = " ".join(texts).split(), np.random.default_rng(0)
    spans = draw.integers((0, 30), (len(words) - 120, 120), (150, 2)).tolist()
    documents = [json.dumps({"text": " ".join(words[first : first + count])}) for first, count in spans]
    (folder / "text.jsonl").write_text("\n".join(documents) + "\n")
    (folder / "sweep.toml").write_text(SWEEP_TOML)
    (folder / "made").write_text(stamp)


# -- how two trees differ


def compare(work: Path, stages: dict[str, str], but: list[tuple[str, ...]]) -> int:
    """Print what differs, stage by stage, and the verdict; return the exit code."""
    sides = [files(work / side) for side in ("before", "after")]
    names = sorted({*sides[0], *sides[1]})
    found: dict[str, dict[str, str]] = {"differs": {}, "intended": {}}
    for name in names:
        one, two = (read(side[name]) if name in side else None for side in sides)
        excused = [key for pattern, key, _ in EXCLUDED if fnmatch(name, pattern)]
        if where := difference(one, two, excused):
            keys = [key for pattern, key in but if fnmatch(name, pattern)]
            meant = "" in keys or not difference(one, two, excused + keys)
            found["intended" if meant else "differs"][name] = where
    for stage in STAGES:
        own = [name for name in names if stages[name] == stage]
        told = [f"  {kind}: {name}: {some[name]}" for kind, some in found.items() for name in own if name in some]
        print(f"{stage}: {len(own) - len(told)} of {len(own)} files equal", *told, sep="\n")
    verdict = {"met": not found["differs"], "files": len(names), "differ": [*found["differs"]]}
    print(json.dumps({"bench": "same_bytes", **verdict, "intended": [*found["intended"]]}))
    return 0 if verdict["met"] else 1


def difference(one: bytes | None, two: bytes | None, excused: list[str]) -> str:
    """Say where two files first differ; "" where they are equal but for the excused keys of JSON."""
    if one is None or two is None:
        return f"is there {'after' if one is None else 'before'} only"
    if one == two:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    try:
        flat = [list(flattened(parsed(data))) for data in (one, two)]
    except ValueError:
        line, shown = one.count(b"\n", 0, at) + 1, slice(at, at + 40)
        return f"line {line}, offset {at} of {len(one)} and {len(two)} bytes: {one[shown]!r} and {two[shown]!r}"
    kept = [[(key, value) for key, value in side if not any(fnmatch(key, e) for e in excused)] for side in flat]
    for a, b in zip(*kept, strict=False):
        if a != b:
            return f"{a[0]}: {a[1]} and {b[1]}" if a[0] == b[0] else f"{a[0]} where {b[0]} stands after"
    if len(kept[0]) != len(kept[1]):
        return f"{len(kept[0])} and {len(kept[1])} values"
    return "" if kept != flat else f"the same values, written otherwise from offset {at}"


def parsed(data: bytes) -> Any:
    """Return what a JSON document or lines of such say, each number as it is written; ValueError if it is neither."""
    try:
        return json.loads(data, parse_float=Decimal)
    except ValueError:
        return [json.loads(line, parse_float=Decimal) for line in data.splitlines()]


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and text of every value in a JSON document, in its order."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flattened(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value) if isinstance(value, Decimal) else repr(value)


def files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by their relative paths, in order."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path: Path) -> bytes | None:
    """Return a file's bytes, None where there is none."""
    return path.read_bytes() if path.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())
