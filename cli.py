"""The `gsae` command: parse, call one function, print. Data goes to stdout, progress and errors to stderr.

Heavy imports stand inside the commands, so `gsae --help` answers at once, without torch or transformers.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gsae import __version__

if TYPE_CHECKING:
    from gsae.evaluate import Effects, Progress
    from gsae.features import Vocabulary
    from gsae.store import SiteSpec, Store, StoreSet

app = typer.Typer(
    name="gsae",
    help="Run the language model once; fit Gated SAEs from its stored activations again and again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3://, gs:// or az:// URL of a store.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")]


def main() -> None:
    """Run the command line; every error that is the user's to mend is one line and has an exit code of its own."""
    try:
        with _clean_stops():
            app(standalone_mode=True)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # an InterruptedRun passes through every `except Exception`
        if "--debug" in sys.argv:
            raise
        sys.exit(_told(error))


@contextmanager
def _clean_stops() -> Iterator[None]:
    """Let the first SIGTERM or Ctrl-C end the command in order, what is being written included; the second at once."""

    def stop(number: int, frame: object) -> None:
        from gsae.errors import InterruptedRun

        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        raise InterruptedRun(f"Stopped by {name}; the same command goes on from here.", 128 + number)

    before = [(each, signal.signal(each, stop)) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def _told(error: BaseException) -> int:
    """Print an error in one line and return the exit code."""
    from gsae.errors import GsaeError, InterruptedRun

    if isinstance(error, (GsaeError, InterruptedRun)):
        print(f"gsae: {error}", file=sys.stderr)
        return error.exit_code
    print(f"gsae: {type(error).__name__}: {error} (a fault of gsae: run again with --debug)", file=sys.stderr)
    return 1


def _version(asked: bool) -> None:
    if asked:
        print(f"gsae {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    """Run the language model once; fit Gated SAEs from its stored activations again and again."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for store, run and report.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a language model and a text that come as packages.

    It takes about ten minutes on two cores, more on a CPU that cannot multiply bfloat16.
    """
    from gsae.commands.demo import demo as run_demo

    summary = run_demo(out, lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        _print_json(summary)
        return
    columns = ("arch", "d_sae", "l1_coefficient", "l0", "ce_loss_score", "explained_variance", "gamma")
    _print_table(columns, summary["saes"])
    low, high = summary["l0_ratio_interval"] or (float("nan"), float("nan"))
    print(f"\nAt equal loss recovered the baselines fire {summary['l0_ratio']:.2f} times as many latents as the")
    print(f"Gated SAEs (90 % interval {low:.2f} to {high:.2f}). gamma = 1 means no shrinkage.")
    store = summary["store"]
    print(f"Store: {store['ratio']:.3f} of raw {store['dtype']}.\n")
    print(f"The figures: open {out / 'report.html'} in a browser.")
    ours = sys.argv[0] if Path(sys.argv[0]).name == "gsae" else "gsae"  # .venv/bin/gsae after `make demo`
    print(f"What each latent fires on: {ours} browse {out / 'run'}")
    print(f"Whose are easier to read, Gated or baseline, blind: {ours} browse {out / 'run'} --blind", end="")
    print("".join(f" --sae {name}" for name in summary["alike"]))


@app.command()
def harvest(
    model: Annotated[str, typer.Option(help="Hub id, local folder, .gguf file or builtin:smollm2-135m.")],
    dataset: Annotated[str, typer.Option(help="Hub id, .jsonl[.gz|.zst], .txt or .parquet file, or builtin:pydoc.")],
    site: Annotated[
        list[str],
        typer.Option(help="resid.L, mlp.0,4,8-10, attn.all, resid.-1 or module:PATH:in|out; may be repeated."),
    ],
    out: Annotated[str, typer.Option(help="Folder of the store.")],
    rows: Annotated[int | None, typer.Option(help="Train rows wanted; all that the text has if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Revision of the dataset on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    token_field: Annotated[
        str | None, typer.Option(help="Field that holds token ids, used as they are, in place of text.")
    ] = None,
    shuffle_documents: Annotated[
        int | None,
        typer.Option(
            metavar="SEED", help="Shuffle documents: a local file whole, of a Hub dataset each 16,384 among themselves."
        ),
    ] = None,
    skip_documents: Annotated[int, typer.Option(help="Documents to leave out at the beginning.")] = 0,
    max_documents: Annotated[int | None, typer.Option(help="Documents to take at most; all if not given.")] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Read the text again until there are as many rows as wanted.")
    ] = False,
    context_size: Annotated[int, typer.Option(help="Tokens in a context, BOS included.")] = 1024,
    heldout: Annotated[
        float | None,
        typer.Option(help="Share of the documents kept for evaluation; enough for 2^17 rows if not given."),
    ] = None,
    drop_positions: Annotated[str, typer.Option(help="Positions that are never rows, for instance 0-3,9.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the held-out documents and of the order of rows.")] = 0,
    window_rows: Annotated[int, typer.Option(help="Rows in a shard file, a power of two.")] = 1 << 18,
    codec: Annotated[
        Literal["planes", "zstd", "none"], typer.Option(help="zstd is for readers that have standard codecs only.")
    ] = "planes",
    level: Annotated[int, typer.Option(help="Of the codec: planes 0 (fast) or 1 (small).")] = 1,
    batch_size: Annotated[str, typer.Option(help="Contexts in a forward pass, or auto for as many as fit.")] = "16",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="What the model runs in, and the rows are in.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread a model that is too large for one device: auto, or a JSON object.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    attn_implementation: Annotated[
        str | None, typer.Option(help="As transformers has it: sdpa, eager, ...; its own choice if not given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if not given.")] = None,
    rank: Annotated[int | None, typer.Option(help="Which worker this is; torchrun's or SLURM's if not given.")] = None,
    world_size: Annotated[int | None, typer.Option(help="How many workers there are, if any --rank is given.")] = None,
    any_hardware: Annotated[bool, typer.Option(help="Go on with a store that other hardware began.")] = False,
    only_tokens: Annotated[
        bool, typer.Option("--only-tokens", help="Stop when the tokens are written; needs no weights and no GPU.")
    ] = False,
    dry_run: DryRun = False,
    do_probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Let --dry-run measure time and ratio, if the weights are here.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Begin without room on the disk.")] = False,
    as_json: Json = False,
) -> None:
    """Run a language model over a text and write the activations at some sites to a store.

    The same command goes on with a harvest that was stopped.
    """
    from gsae.commands.terminal import Shown
    from gsae.errors import UsageError
    from gsae.harvest import (
        HarvestConfig,
        estimate,
        harvest,
        harvest_tokens,
        is_at_hand,
        probe,
        request,
        split_names,
        worker,
    )
    from gsae.store import describe

    if "://" in out:
        local = out.rstrip("/").split("/")[-1]
        raise UsageError(f"--out {out} is a URL. Harvest to a local folder such as {local}, then copy it there.")
    config = HarvestConfig.parse(
        model=model,
        revision=revision,
        dataset=dataset,
        dataset_revision=dataset_revision,
        split=split,
        text_field=text_field,
        token_field=token_field,
        shuffle_documents=shuffle_documents,
        skip_documents=skip_documents,
        max_documents=max_documents,
        repeat=repeat,
        sites=tuple(name for part in site for name in split_names(part)),
        rows=rows,
        context_size=context_size,
        heldout=heldout,
        seed=seed,
        window_rows=window_rows,
        codec=codec,
        level=level,
        batch_size=batch_size if batch_size == "auto" else _number("--batch-size", batch_size),
        dtype=dtype,
        device=device,
        device_map=device_map,
        compile=compile,
        attn_implementation=attn_implementation,
        dropped_positions=_positions(drop_positions),
        any_hardware=any_hardware,
        threads=threads,
        force=force,
    )
    own = worker(rank, world_size, os.environ)
    if dry_run:
        asked = request(config)
        measured = probe(asked) if do_probe and is_at_hand(model, revision) else None
        _print(estimate(asked, Path(out), measured), as_json)
        return
    made = None
    with Shown() as shown:
        if only_tokens:
            harvest_tokens(config, Path(out), lambda event: _show_harvest(shown, event))
        else:
            made = harvest(config, Path(out), lambda event: _show_harvest(shown, event), own=own)
    facts = describe(Path(out))
    if as_json:
        _print_json(facts)
        return
    if only_tokens:
        _say_early_end(facts, rows)
        print(f"{out} has its tokens: {facts['contexts']:,} contexts of {facts['context_size']:,}, which give")
        print(f"{facts['rows']['train']:,} train and {facts['rows']['heldout']:,} held-out rows.")
        return
    if made is None:
        missing = facts["missing_windows"]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(
            f"Worker {own.rank} of {own.world_size} is done. Others have still to make {', '.join(missing[:3])}{more}."
        )
        print(f"Who ends last publishes {out}; a worker that died is run again.")
        return
    _say_early_end(facts, rows)
    ratios = ", ".join(f"{name} {m['ratio']:.3f}" for name, m in facts["moments"].items())
    print(f"{out}: {facts['rows']['train']:,} train and {facts['rows']['heldout']:,} held-out rows, digest")
    print(f"{facts['digest']}; of raw {facts['dtype']}: {ratios}")


def _say_early_end(facts: dict[str, Any], wanted: int | None) -> None:
    if facts["text_ended_early"]:
        have = facts["rows"]["train"]
        print(f"The text ended early: it has {have:,} train rows of {wanted:,} wanted.", file=sys.stderr)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file or builtin.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    as_json: Json = False,
) -> None:
    """List the sites that a language model offers, from its config alone, without weights."""
    from gsae.harvest import load_meta, offered

    found = list(offered(load_meta(model, revision)))
    if as_json:
        _print_json([site.model_dump(mode="json", exclude={"folder"}) for site in found])
    else:
        _print_table(("site", "d_in", "module", "hook", "hook_name"), _by_layers(found))
        print("\nAny other module: module:PATH:in or module:PATH:out.")


def _by_layers(sites: "list[SiteSpec]") -> list[dict[str, Any]]:
    """Return a line for each run of layers whose sites differ in the layer's number alone, which becomes L."""
    lines: list[dict[str, Any]] = []
    for site in sites:
        kind, layer = site.name.split(".")
        line: dict[str, Any] = {
            "d_in": site.d_in,
            "module": site.module.replace(f".{layer}", ".L", 1),
            "hook": site.hook,
            "hook_name": site.hook_name.replace(f".{layer}.", ".L."),
        }
        last = lines[-1] if lines else {}
        if line.items() <= last.items() and last["site"].startswith(f"{kind}."):
            last["site"] = f"{last['site'].split('-')[0]}-{layer}"
        else:
            lines.append({"site": site.name, **line})
    return lines


@app.command()
def info(path: Annotated[str, typer.Argument(metavar="STORE|RUN")], as_json: Json = False) -> None:
    """Show what a store or a training run holds."""
    from gsae.store import describe

    if (Path(path) / "config.toml").exists():
        from gsae.train import describe_run

        _print(describe_run(Path(path)), as_json)
    else:
        _print(describe(path), as_json)


@app.command()
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: sums, chunks, moments, order.")] = False,
    as_json: Json = False,
) -> None:
    """Check that a store holds what its manifest says; exit code 4 when it does not."""
    from gsae.commands.terminal import Shown
    from gsae.errors import CorruptError
    from gsae.store import foreign_files, open_store
    from gsae.store import verify as find_faults

    opened = open_store(store)
    with Shown() as shown:
        faults = find_faults(opened, deep, lambda event: shown.show("checking files", event.done, event.files))
    foreign = foreign_files(opened)
    if as_json:
        _print_json({"store": str(store), "digest": opened.digest, "deep": deep, "faults": faults, "foreign": foreign})
    for path in foreign:
        print(f"note: {path} is not part of the store", file=sys.stderr)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise CorruptError(f"{store} is damaged: {len(faults)} faults, listed above.")
    if not as_json:
        print(f"{store} is good{': every byte was read' if deep else ''}. Digest {opened.digest}")


@app.command()
def seal(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")], as_json: Json = False
) -> None:
    """Publish the finished windows of a harvest that was cut short as a complete store, for good."""
    from gsae.store import describe
    from gsae.store import seal as publish_finished

    sealed = publish_finished(store)
    if as_json:
        _print_json(describe(store))
    else:
        print(f"{store} is sealed with {len(sealed.manifest.windows)} windows. Digest {sealed.digest}")


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or s3://, gs:// or az:// URL of a store.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL to copy it to.")],
    codec: Annotated[
        Literal["planes", "zstd", "none"] | None, typer.Option(help="Encode the rows anew; the digest stays.")
    ] = None,
    level: Annotated[int | None, typer.Option(help="Of the codec.")] = None,
    sites: Annotated[str | None, typer.Option(help="Take these sites only, for instance mlp.10,resid.10.")] = None,
    windows: Annotated[int | None, typer.Option(help="Take the first train windows only.")] = None,
    as_json: Json = False,
) -> None:
    """Copy a store between folders and object stores; every file is checked while it passes.

    The same command goes on with a copy that was stopped.
    """
    from gsae.commands.terminal import Shown
    from gsae.store import copy as copy_store

    wanted = None if sites is None else [name.strip() for name in sites.split(",")]
    with Shown() as shown:
        digest = copy_store(
            source,
            destination,
            codec=codec,
            level=level,
            sites=wanted,
            windows=windows,
            listen=lambda e: shown.show("copying bytes", e.bytes, e.all_bytes, f"{e.files} of {e.all_files} files"),
        )
    if as_json:
        _print_json({"source": source, "destination": destination, "digest": digest})
    else:
        print(f"{destination}: digest {digest}")


@app.command(name="ls")
def list_(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URL.")],
    as_json: Json = False,
) -> None:
    """List the stores at and under a folder or URL, with model, sites, rows, size and state."""
    from dataclasses import asdict

    from gsae.store import list_stores

    found = [asdict(listed) for listed in list_stores(root)]
    if as_json:
        _print_json(found)
    else:
        _print_table(("path", "model", "sites", "rows", "bytes", "state"), found)


@app.command()
def train(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Folders or URLs, read as one set.")],
    site: Annotated[str, typer.Option(help="Site of the stores, for instance mlp.10.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    steps: Annotated[int, typer.Option(help="Batches to train on.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(help="A grid of SAEs, such as 'gated width=4096 l1=.06,.12 seed=0,1 lr=1e-3'; may be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with [[sae]] tables, in place of --sae.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = 4096,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of the SAEs that name none; 1e-3, or the paper's from 1e8 rows on."),
    ] = None,
    lr_warm_up_steps: Annotated[int, typer.Option(help="Linear warm-up of the learning rate.")] = 100,
    l1_warm_up_steps: Annotated[
        int | None, typer.Option(help="Linear warm-up of the sparsity penalty; a tenth of the steps if not given.")
    ] = None,
    lr_decay_steps: Annotated[
        int | None, typer.Option(help="Linear decay of the learning rate to 0; the last fifth if not given.")
    ] = None,
    clip_grad_norm: Annotated[
        float | None, typer.Option(help="Most that the norm of an SAE's gradients may be; slower, off if not given.")
    ] = None,
    resample_at: Annotated[
        str, typer.Option(help="Steps after which silent latents get new directions, for instance 5000,10000.")
    ] = "",
    resample_silent_rows: Annotated[
        int | None, typer.Option(help="Rows of silence before that; half the least distance of the steps if not given.")
    ] = None,
    resample_bias: Annotated[
        Literal["density", "zero"],
        typer.Option(help="Let them fire as often as the median latent, or as in the paper."),
    ] = "density",
    init: Annotated[
        str | None, typer.Option(help="Folder of a saved SAE, RUN/saes/NAME, from which those that name none go on.")
    ] = None,
    max_norm_multiple: Annotated[
        float, typer.Option(help="Skip rows over this multiple of the median norm; 0 keeps all.")
    ] = 10.0,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave out rows with a NaN or an infinity.")
    ] = False,
    data_seed: Annotated[int, typer.Option(help="Seed of the order of rows.")] = 0,
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16"],
        typer.Option(help="Of the matrix products; weights are float32. tf32 is a GPU's alone."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; all cores, or a rank's share of them, if not given.")
    ] = None,
    stack: Annotated[
        int | None, typer.Option(help="SAEs of one shape trained as one, at most; fewer make more work for ranks.")
    ] = None,
    screening: Annotated[
        bool | None,
        typer.Option(
            "--screening/--no-screening",
            help="Find open gates in bfloat16 first, exactly; if not given, on CPUs with bfloat16 products.",
        ),
    ] = None,
    io: Annotated[
        Literal["mmap", "pread"], typer.Option(help="How files are read: pread on NFS and FUSE, the rows are the same.")
    ] = "mmap",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints, at most.")] = 10.0,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 50,
    eval_every: Annotated[
        int, typer.Option(help="Steps between measurements on some held-out rows; 0 for none.")
    ] = 500,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fit SAEs to the rows of a site, all from one stream of batches.

    Neither the language model nor the text is needed. The same command goes on with a run that was stopped. Under
    torchrun the ranks take the SAEs from a queue, one shape at a time.
    """
    from gsae.commands.terminal import TrainingShown
    from gsae.errors import UsageError
    from gsae.store import open_stores
    from gsae.train import Ranks, RunConfig, describe_run, estimate, load_sweep, parse_sae
    from gsae.train import train as fit

    if (sae is None) == (config is None):
        raise UsageError("Give the SAEs with --sae or with --config, one of them.")
    saes = load_sweep(config) if config is not None else tuple(s for text in sae or () for s in parse_sae(text))
    run = RunConfig(
        site=site,
        batch_size=batch_size,
        steps=steps,
        data_seed=data_seed,
        lr=lr,
        lr_warm_up_steps=lr_warm_up_steps,
        l1_warm_up_steps=l1_warm_up_steps,
        lr_decay_steps=lr_decay_steps,
        clip_grad_norm=clip_grad_norm,
        resample_at=_steps(resample_at),
        resample_silent_rows=resample_silent_rows,
        resample_bias=resample_bias,
        skip_nonfinite=skip_nonfinite,
        max_norm_multiple=max_norm_multiple,
        precision=precision,
        device=device,
        threads=threads,
        stack=stack,
        screening=screening,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        log_every=log_every,
        eval_every=eval_every,
        init=init,
        saes=saes,
    )
    rows = open_stores(stores).site(site, io=io)
    ranks = Ranks.of(os.environ)
    if dry_run:
        _print(estimate(rows, run, ranks), as_json)
        return
    with TrainingShown() as shown:
        fit(rows, run, out, lambda event: _show_training(shown, event), ranks)
    facts = describe_run(out)
    if as_json:
        _print_json(facts)
    else:
        columns = ("sae", "l0", "explained_variance", "gamma", "dead", "loss")
        _print_table(columns, facts["saes"])
        print(f"\n{len(facts['saes'])} SAEs in {out / 'saes'}. Next: gsae eval {out}")


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    store: Annotated[
        list[str] | None, typer.Option(help="The store it was trained from, if it has moved; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The language model, if it is not found by the store's name for it.")
    ] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Leave out what needs the language model.")] = False,
    contexts: Annotated[int | None, typer.Option(help="Held-out contexts to run it on; all if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure every SAE of a run on held-out rows, and the loss that the language model recovers with it."""
    from gsae.commands.terminal import Shown
    from gsae.evaluate import check_run
    from gsae.evaluate import evaluate as measure
    from gsae.store import open_stores
    from gsae.train import stores_of

    opened = open_stores(store or stores_of(run))
    site = check_run(run, opened)
    with Shown() as shown:
        shown.show("loading the language model")
        effects = None if no_model else _effects(opened, site, model, device)
        results = measure(
            run,
            opened,
            effects,
            contexts,
            lambda e: shown.show(f"evaluating {e.stage}", e.done, e.total),
            _torch(device),
        )
    if as_json:
        _print_json([result.model_dump(exclude={"per_context"}) for result in results])
    else:
        columns = ("sae", "l0", "ce_loss_score", "explained_variance", "gamma", "gamma_centred", "dead")
        _print_table(columns, [result.model_dump(include=set(columns)) for result in results])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of evaluated runs.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option(help="Folder for the plots as PNG files too; needs the extra gsae[plots].")
    ] = None,
) -> None:
    """Write one HTML file with the plots and tables of some runs; it needs no network."""
    from gsae.evaluate import report as write_report
    from gsae.evaluate import write_plots

    for file in write_plots(runs, png) if png is not None else ():
        print(file)
    write_report(runs, out)
    print(f"{out} ({out.stat().st_size / 1e3:.0f} kB). Open it in a browser.")


@app.command()
def features(
    run: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="Of this SAE only; may be repeated.")] = None,
    store: Annotated[
        list[str] | None, typer.Option(help="The store it was trained from, if it has moved; may be repeated.")
    ] = None,
    split: Annotated[Literal["heldout", "train"], typer.Option(help="The rows to look at.")] = "heldout",
    top: Annotated[int, typer.Option(min=0, help="Contexts with the largest features to keep of each latent.")] = 20,
    quantiles: Annotated[int, typer.Option(min=1, help="Quantiles of a latent's features to sample from.")] = 5,
    samples: Annotated[int, typer.Option(min=0, help="Samples of each quantile.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="The language model, if it is not found by the store's name for it.")
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out the texts of tokens and the effects on logits.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Describe every latent of a run's SAEs: how often it fires, where most, and which tokens it speaks for.

    The same command goes on where it was stopped. Writes Parquet files below RUN/features.
    """
    from gsae.commands.terminal import Shown
    from gsae.features import FeatureSettings, Vocabulary, check_features, find_features
    from gsae.store import open_stores
    from gsae.train import stores_of

    opened = open_stores(store or stores_of(run))
    names = tuple(sae or ())
    site = check_features(run, opened, names, split)
    with Shown() as shown:
        shown.show("loading the language model")
        found = find_features(
            run,
            opened,
            Vocabulary() if no_model else _vocabulary(opened, site, model, device),
            names=names,
            split=split,
            settings=FeatureSettings(top=top, quantiles=quantiles, samples=samples),
            listen=lambda e: shown.show(f"{e.sae}: {e.stage}", e.done, e.total),
            device=_torch(device),
        )
    if as_json:
        _print_json([facts.values() for facts in found])
    else:
        columns = ("sae", "architecture", "d_sae", "site", "split", "rows", "has_tokens", "has_logits")
        _print_table(columns, [facts.values() for facts in found])
        print(f"\n{len(found)} SAEs in {run / 'features'}, as Parquet. Next: gsae browse {run}")


@app.command()
def browse(
    run: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="This SAE only; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; else RUN/browser or RUN/blind.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 for any that is free.")] = 8427,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Write the files, and end.")] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Rate latents of two SAEs without being told whose each is.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Of --blind: latents to rate of each SAE.")] = 50,
    seed: Annotated[int, typer.Option(help="Of --blind: which latents are drawn, and their order.")] = 0,
    minimum_rows: Annotated[
        int, typer.Option(min=1, help="Of --blind: latents that fire on fewer rows are not drawn.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Show what `gsae features` found in a browser of this machine, or compare two SAEs blind.

    The folder that it writes is static files: any web server shows it to others. Ctrl-C ends serving.
    """
    from gsae.commands.terminal import Shown
    from gsae.features import BlindSettings, build_blind, build_browser, compare_ratings, ratings_of, serve

    names = tuple(sae or ())
    with Shown() as shown:

        def listen(event: "Progress") -> None:
            shown.show(f"{event.sae or 'trials'}: {event.stage}", event.done, event.total)

        if blind:
            settings = BlindSettings(pairs=pairs, seed=seed, minimum_rows=minimum_rows)
            folder = build_blind(run, names, out, settings, listen)
        else:
            folder = build_browser(run, names, out, listen)
    if not no_serve:
        site, ratings = (folder / "site", ratings_of(folder)) if blind else (folder, None)
        serve(site, port, lambda url: print(f"{url} (Ctrl-C ends)", file=sys.stderr, flush=True), ratings)
    if blind:
        _print_ratings(compare_ratings(folder), as_json)
    elif as_json:
        _print_json({"browser": str(folder)})
    else:
        print(f"{folder}: any static web server shows it.")


@app.command()
def export(
    sae: Annotated[Path, typer.Argument(metavar="RUN/NAME", help="An SAE of a run, or the folder of any saved one.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format_: Annotated[
        Literal["dictionary_learning", "delphi", "neuronpedia"],
        typer.Option("--format", help="SAELens's is how SAEs are saved. The last two need `gsae features` first."),
    ] = "dictionary_learning",
    store: Annotated[
        list[str] | None, typer.Option(help="For delphi: the store, if it has moved; may be repeated.")
    ] = None,
) -> None:
    """Write a trained SAE, or what its latents fire on, for another project's loader."""
    from gsae.features import export_sae

    print(export_sae(sae, out, format_, stores=store or ()))


def _effects(store: "Store | StoreSet", site: str, model: str | None, device: str) -> "Effects":
    """Load the store's language model and return what edits of a site do to it."""
    from functools import partial

    from gsae.harvest import effects, load_planned

    lm = load_planned(store.plan.model, model, device)
    return partial(effects, lm, store.site(site).spec)


def _vocabulary(store: "Store | StoreSet", site: str, model: str | None, device: str) -> "Vocabulary":
    """Load the store's language model and return what only it knows of tokens and logits."""
    from gsae.features import Vocabulary
    from gsae.harvest import load_planned, logit_effects, token_texts

    lm = load_planned(store.plan.model, model, device)
    return Vocabulary(token_texts(lm.tokenizer), logit_effects(lm, store.site(site).spec))


def _torch(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _steps(text: str) -> tuple[int, ...]:
    from gsae.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--resample-at {text!r}: give steps, for instance 5000,10000.") from None


def _number(option: str, text: str) -> int:
    from gsae.errors import UsageError

    if not text.isdecimal():
        raise UsageError(f"{option} {text!r}: give a number or auto.")
    return int(text)


def _positions(text: str) -> tuple[int, ...]:
    from gsae.errors import UsageError

    try:
        ranges = [[int(end) for end in part.split("-", 1)] for part in text.split(",") if part.strip()]
    except ValueError:
        ranges = [[]]
    if not all(ends and ends[0] <= ends[-1] for ends in ranges):
        raise UsageError(f"--drop-positions {text!r}: give numbers or ranges, for instance 0-3,9.")
    return tuple(sorted({position for ends in ranges for position in range(ends[0], ends[-1] + 1)}))


def _show_harvest(shown: Any, event: Any) -> None:
    from gsae.harvest import BlockTokenised, Finished, Left, Running, Stage

    match event:
        case Stage():
            shown.show(event.name)
        case BlockTokenised():
            shown.show("tokens", event.rows, detail=f"{event.documents:,} documents, {event.rows:,} rows")
        case Running():
            shown.show("running the model", event.rows, event.total, _rate(event))
        case Finished(windows=0):
            shown.show("the store is complete: nothing to do")
        case Finished() | Left():
            shown.show(f"wrote {event.windows} windows")


def _rate(event: Any) -> str:
    """What a harvest's line says beside its rows."""
    ratio = f", ratio {event.written / event.raw:.3f}" if event.raw else ""
    rate, waiting = event.tokens / max(event.seconds, 1e-9), 100 * event.waiting
    return f"rows, {rate:,.0f} tokens/s, {event.written / 1e9:.2f} GB written{ratio}, device waiting {waiting:.0f} %"


def _show_training(shown: Any, event: Any) -> None:
    from gsae.train import Finished, Left, Progress, Resampled, Started, Stopped

    match event:
        case Started():
            begun = f"going on after step {event.step:,}" if event.step else "beginning"
            groups = f"{len(event.saes)} SAEs in {event.groups} group{'s' if event.groups > 1 else ''}"
            shares = (
                "" if event.ranks == 1 else f", of {event.ranks} ranks (OMP_NUM_THREADS does not count, --threads does)"
            )
            shown.say(f"{begun}: {groups} on {event.device} with {event.threads} threads{shares}")
            if event.rows_skipped:
                shown.say(f"rows left out: {event.rows_skipped:,}, of which not finite: {event.rows_nonfinite:,}")
        case Progress():
            shown.figures(event.step, event.steps, event.rows_per_second, event.wait_share, event.metrics)
        case Stopped():
            shown.say(f"{event.sae} was stopped at step {event.step:,}: its loss is not finite")
        case Resampled():
            shown.say(f"{event.sae}: {event.latents:,} silent latents got new directions after step {event.step:,}")
        case Left():
            shown.say(f"nothing left to take; others still train {event.groups} groups")
        case Finished(already=True):
            shown.say("the run is complete: nothing to do")


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, inner in value.items():
                print(f"  {name}: {_text(inner)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            _print_table(tuple(value[0]), value)
        else:
            print(f"{key}: {_text(value)}")


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
        case list() | tuple():
            return ", ".join(map(_text, value)) or "-"
    return str(value)


def _print_table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    cells = [columns, *(tuple(_text(row.get(column)) for column in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]))


def _print_ratings(found: dict[str, Any], as_json: bool) -> None:
    """Print what a blind comparison has come to so far."""
    if as_json:
        _print_json(found)
        return
    rows = [{"sae": name, **found["counts"][name], "mean": found["means"][name]} for name in found["saes"]]
    _print_table(("sae", "no", "maybe", "yes", "mean"), rows)
    print(f"\n{found['rated']} of {found['trials']} rated.")
    if found["interval"]:
        low, high = found["interval"]
        of = f"{found['saes'][0]} less {found['saes'][1]}, over {found['pairs']} pairs"
        interval = f"{100 * found['confidence']:.0f} % interval {low:.2f} to {high:.2f}"
        print(f"Mean difference, {of}: {found['difference']:.2f} ({interval}).")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
