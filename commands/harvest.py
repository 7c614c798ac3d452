"""`gsae harvest` and `gsae sites`: the commands that read a language model's config, and one that runs it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsae.commands.options import DryRun, Given, Json, TrustRemoteCode, takes
from gsae.commands.terminal import Shown, print_facts, print_json, print_table
from gsae.errors import UsageError
from gsae.harvest import HarvestConfig
from gsae.settings import NEEDED

if TYPE_CHECKING:
    from gsae.harvest import BatchDone, Event, Worker
    from gsae.store import SiteSpec

MISSING_SHOWN = 3


@takes(HarvestConfig)
def harvest(
    given: Given,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the store.", rich_help_panel=NEEDED)],
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="Number of this worker. Default: from torchrun or SLURM.", rich_help_panel="Machine"
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            metavar="WORKERS", help="Number of workers. Default: from torchrun or SLURM.", rich_help_panel="Machine"
        ),
    ] = None,
    only_tokens: Annotated[
        bool, typer.Option("--only-tokens", help="Stop when the tokens are written. Needs no weights and no GPU.")
    ] = False,
    dry_run: DryRun = False,
    do_probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="With --dry-run: run the model briefly to measure time and ratio."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Run a language model over a text and store its activations at some sites.

    The same command continues a harvest that was stopped.
    """
    from gsae.harvest import estimate_harvest, make_request, probe, split_names, weights_are_local, worker
    from gsae.harvest import harvest as make_store
    from gsae.harvest import harvest_tokens as make_tokens
    from gsae.store import describe

    if "://" in out:
        local = out.rstrip("/").split("/")[-1]
        raise UsageError(f"--out {out} is a URL. Harvest to a local folder such as {local}, then copy it there.")
    config = HarvestConfig(**given | {"sites": tuple(name for part in given["sites"] for name in split_names(part))})
    own = worker(rank, world_size, os.environ)
    if dry_run:
        request = make_request(config, runs_model=do_probe)
        if request.warning:
            typer.echo(request.warning, err=True)
        measured = probe(request) if do_probe and weights_are_local(config.model, config.revision) else None
        print_facts(estimate_harvest(request, Path(out), measured), as_json)
        return
    complete = not only_tokens
    with Shown() as shown:
        if only_tokens:
            make_tokens(config, Path(out), lambda event: show_event(shown, event))
        else:
            complete = make_store(config, Path(out), lambda event: show_event(shown, event), worker=own) is not None
    facts = describe(Path(out))
    _note_bad_rows(facts)
    if complete and not only_tokens:
        _note_few_documents(out)
    if as_json:
        print_json(facts)
    elif only_tokens:
        _print_tokens(out, facts, config.rows)
    elif complete:
        _print_store(out, facts, config.rows)
    else:
        _print_share(out, facts, own)


def _print_tokens(out: str, facts: dict[str, Any], wanted: int | None) -> None:
    _note_early_end(facts, wanted)
    typer.echo(f"{out} has its tokens: {facts['contexts']:,} contexts of {facts['context_size']:,}, which give")
    typer.echo(f"{facts['rows']['train']:,} train and {facts['rows']['heldout']:,} held-out rows.")


def _print_store(out: str, facts: dict[str, Any], wanted: int | None) -> None:
    _note_early_end(facts, wanted)
    ratios = ", ".join(f"{name} {moments['ratio']:.3f}" for name, moments in facts["moments"].items())
    typer.echo(f"{out}: {facts['rows']['train']:,} train and {facts['rows']['heldout']:,} held-out rows, digest")
    typer.echo(f"{facts['digest']}; of raw {facts['dtype']}: {ratios}")


def _print_share(out: str, facts: dict[str, Any], own: "Worker") -> None:
    missing = facts["missing_windows"]
    more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
    named = f"{', '.join(missing[:MISSING_SHOWN])}{more}"
    typer.echo(f"Worker {own.rank} of {own.world_size} is done. Other workers still have to make {named}.")
    typer.echo(f"The worker that ends last publishes {out}. Run a worker that died again.")


def _note_early_end(facts: dict[str, Any], wanted: int | None) -> None:
    if facts["text_ended_early"]:
        have = facts["rows"]["train"]
        typer.echo(f"The text ended early: it has {have:,} train rows of {wanted:,} wanted.", err=True)


def _note_bad_rows(facts: dict[str, Any]) -> None:
    if bad := facts.get("bad_rows"):
        typer.echo(f"Rows of the text without usable text, which were skipped: {bad['count']:,}. The first:", err=True)
        for line in bad["first"]:
            typer.echo(f"  {line}", err=True)


def _note_few_documents(out: str) -> None:
    """Say on stderr if the store that was asked for held-out text has few documents of it."""
    from gsae.evaluate import HeldoutDocuments, few_documents
    from gsae.store import open_store

    store = open_store(out)
    if store.plan.heldout and (few := few_documents(HeldoutDocuments.of(store).count)):
        typer.echo(few, err=True)


def show_event(shown: Shown, event: "Event") -> None:
    """Show on stderr what a harvest reports."""
    from gsae.harvest import BatchDone, BlockTokenised, Finished, Noted, StageStarted, WorkerDone

    match event:
        case Noted():
            shown.say(event.text)
        case StageStarted():
            shown.show(event.name)
        case BlockTokenised():
            shown.show("tokens", event.rows, detail=f"{event.documents:,} documents, {event.rows:,} rows")
        case BatchDone():
            shown.show("running the model", event.rows, event.total, rate(event))
        case Finished(windows=0):
            shown.show("the store is complete: nothing to do")
        case Finished() | WorkerDone():
            shown.show(f"wrote {event.windows} windows")


def rate(event: "BatchDone") -> str:
    """Return what the progress line says beside the rows: tokens a second, bytes written, their ratio to raw rows."""
    ratio = f", ratio {event.written / event.raw:.3f}" if event.raw else ""
    tokens, waiting = event.tokens / max(event.seconds, 1e-9), 100 * event.waiting
    return f"rows, {tokens:,.0f} tokens/s, {event.written / 1e9:.2f} GB written{ratio}, device waiting {waiting:.0f} %"


def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or builtin.")],
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Revision of the model. Default: the newest.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """List the sites that a language model offers, from its config, without weights."""
    from gsae.harvest import load_meta, survey

    found = survey(load_meta(model, revision, trust_remote_code=trust_remote_code))
    if as_json:
        facts = [site.model_dump(mode="json", exclude={"folder"}) for site in found.sites]
        print_json([one | {"mixer": found.mixers.get(one["name"])} for one in facts])
        return
    lines = [_site_line(site, found.mixers.get(site.name, "")) for site in found.sites]
    print_table(("site", "d_in", "module", "hook", "hook_name", "mixer"), _by_layers(lines))
    typer.echo("\nEach was confirmed on a small random instance; a harvest confirms its sites on the loaded model.")
    typer.echo("Any other module: module:PATH:in or module:PATH:out.")
    for line in _by_layers([{"site": name, "why": why} for name, why in found.missing.items()]):
        typer.echo(f"No {line['site']}: {line['why']}")


def _site_line(site: "SiteSpec", mixer: str) -> dict[str, Any]:
    """Return what the table shows of a site; the number of its layer is shown as L."""
    layer = site.name.partition(".")[2]
    return {
        "site": site.name,
        "d_in": site.d_in,
        "module": site.module.replace(f".{layer}", ".L") if layer else site.module,
        "hook": site.hook,
        "hook_name": site.hook_name.replace(f".{layer}.", ".L.") if layer else site.hook_name,
        "mixer": mixer,
    }


def _by_layers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line for consecutive layers of lines that differ only in the number of the layer."""
    joined: list[dict[str, Any]] = []
    for line in lines:
        kind, _, layer = line["site"].partition(".")
        last = joined[-1] if joined else {"site": ""}
        begin, _, end = last["site"].partition("-")
        follows = layer and f"{kind}.{int(layer) - 1}" == (f"{kind}.{end}" if end else begin)
        if follows and {**last, "site": ""} == {**line, "site": ""}:
            last["site"] = f"{begin}-{layer}"
        else:
            joined.append(dict(line))
    return joined
