"""`gsae eval` and `gsae report`: the figures of a run's SAEs, and the page that shows them."""

from pathlib import Path
from typing import Annotated

import typer

from gsae.commands.language_model import load_effects, torch_device
from gsae.commands.options import Device, Json, ModelOption, MovedStores, RunArgument, TrustRemoteCode
from gsae.commands.terminal import Shown, print_divergences, print_json, print_table

COLUMNS = ("sae", "l0", "ce_loss_score", "explained_variance", "gamma", "gamma_centred", "dead", "dead_rows")


def evaluate(
    run: RunArgument,
    store: MovedStores = None,
    model: ModelOption = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Measure only what needs no language model.")] = False,
    contexts: Annotated[
        int | None,
        typer.Option(metavar="CONTEXTS", help="Held-out contexts to run the language model on. Default: all."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure every SAE of a run on held-out rows, and the loss that the model recovers."""
    from gsae.evaluate import check_run, few_documents
    from gsae.evaluate import evaluate as measure
    from gsae.store import open_stores
    from gsae.train import stores_of

    opened = open_stores(store or stores_of(run))
    site = check_run(run, opened)
    with Shown() as shown:
        shown.show("loading the language model")
        results = measure(
            run,
            opened,
            None if no_model else load_effects(opened, site, model, device, trust_remote_code),
            contexts,
            lambda e: shown.show(f"evaluating {e.stage}", e.done, e.total),
            torch_device(device),
        )
    ran = None if results[0].language_model is None else results[0].language_model.documents
    if few := few_documents(results[0].heldout_documents, ran):
        typer.echo(few, err=True)
    figures = [result.model_dump(exclude={"per_document"}) for result in results]
    if as_json:
        print_json(figures)
    else:
        print_table(COLUMNS, figures)
        print_divergences(figures)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of evaluated runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Also write the plots as PNG files to this folder. Needs gsae[plots]. Default: none."
        ),
    ] = None,
) -> None:
    """Write one HTML file with the plots and tables of some runs. It needs no network."""
    from gsae.evaluate import report as write_report
    from gsae.evaluate import write_plots

    for file in write_plots(runs, png) if png is not None else ():
        typer.echo(file)
    write_report(runs, out)
    typer.echo(f"{out} ({out.stat().st_size / 1e3:.0f} kB). Open it in a browser.")
