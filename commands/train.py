"""`gsae train`: SAEs from the rows of stores. It imports nothing that a language model needs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gsae.commands.extras import is_installed
from gsae.commands.options import DryRun, Given, Json, takes
from gsae.commands.terminal import RUN_COLUMNS, TrainingShown, print_divergences, print_facts, print_json, print_table
from gsae.errors import SpaceError, UsageError
from gsae.settings import NEEDED
from gsae.train import RunConfig

if TYPE_CHECKING:
    from gsae.train import Event


@takes(RunConfig)
def train(
    given: Given,
    stores: Annotated[list[str], typer.Argument(metavar="STORE", help="Folders or URLs of stores, read as one.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run.", rich_help_panel=NEEDED)],
    sae: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SAES",
            help="A grid of SAEs: 'gated width=4096 l1=.06,.12 seed=0,1 lr=1e-3'. Repeatable. Default: --config.",
            rich_help_panel=NEEDED,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with [[sae]] tables. Default: --sae.",
            rich_help_panel=NEEDED,
        ),
    ] = None,
    io: Annotated[
        Literal["mmap", "pread"],
        typer.Option(
            metavar="[mmap|pread]",
            help="How files are read: pread on NFS and FUSE. The rows are the same.",
            rich_help_panel="Machine",
        ),
    ] = "mmap",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fit SAEs to the rows of a site, all from one stream of batches.

    The language model and the text are not needed. The same command continues a run that was stopped. Under torchrun
    the ranks take the SAEs from a queue, one shape at a time.
    """
    from gsae.store import open_stores
    from gsae.train import Ranks, describe_run, estimate, load_sweep, parse_sae
    from gsae.train import train as fit

    if (sae is None) == (config is None):
        raise UsageError("Give the SAEs with --sae or with --config, one of them.")
    saes = load_sweep(config) if config is not None else tuple(s for text in sae or () for s in parse_sae(text))
    run = RunConfig(**given, saes=saes)
    rows = open_stores(stores).site(run.site, io=io)
    ranks = Ranks.of(os.environ)
    if dry_run:
        planned = estimate(rows, run, ranks)
        print_facts(planned, as_json)
        if planned["refusal"] is not None:
            raise SpaceError(planned["refusal"])
        return
    with TrainingShown() as shown:
        fit(rows, run, out, lambda event: show_event(shown, event), ranks)
    facts = describe_run(out)
    if as_json:
        print_json(facts)
    else:
        print_table(RUN_COLUMNS, facts["saes"])
        print_divergences(facts["saes"])
        typer.echo(f"\n{len(facts['saes'])} SAEs in {out / 'saes'}. Next: {_next_command(out)}")


def _next_command(out: Path) -> str:
    """Return the command that measures the run: without the language model where its libraries are not installed."""
    if is_installed("transformers"):
        return f"gsae eval {out}"
    return f"gsae eval {out} --no-model (with the language model: pip install 'gsae[harvest]')"


def show_event(shown: TrainingShown, event: "Event") -> None:
    """Show on stderr what a training run reports."""
    from gsae.train import Diverged, Finished, Left, Moved, Progress, Resampled, Started

    match event:
        case Started():
            begun = f"continuing after step {event.step:,}" if event.step else "beginning"
            groups = f"{len(event.saes)} SAEs in {event.groups} group{'s' if event.groups > 1 else ''}"
            shares = "" if event.ranks == 1 else f", of {event.ranks} ranks (OMP_NUM_THREADS is ignored; use --threads)"
            shown.say(f"{begun}: {groups} on {event.device} with {event.threads} threads{shares}")
            if event.later:
                shown.say(f"groups that do not fit in memory beside these, and follow: {event.later}")
            if event.rows_skipped:
                shown.say(f"rows left out: {event.rows_skipped:,}, of which not finite: {event.rows_nonfinite:,}")
        case Moved():
            shown.say(f"the last bits may differ from those of a run in one place: {event.changed}")
        case Progress():
            shown.figures(event.step, event.steps, event.rows_per_second, event.wait_share, event.metrics)
        case Diverged():
            healthy = f"the weights of step {event.back_to:,}" if event.back_to else "its first weights"
            done = {"stop": f"stopped, with {healthy}", "retry": f"goes on from {healthy} with a third of its rate"}
            said = done.get(event.action, "marked, and goes on")
            shown.say(f"{event.sae} diverged at step {event.step:,}: {event.because}; {said}")
        case Resampled():
            shown.say(f"{event.sae}: {event.latents:,} silent latents got new directions after step {event.step:,}")
        case Left():
            shown.say(f"no groups are left to take; other processes still train {event.groups}")
        case Finished(already=True):
            shown.say("the run is complete: nothing to do")
