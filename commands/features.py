"""`gsae features`, `browse` and `export`: what the latents of a run's SAEs fire on, for people and for other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gsae.commands.language_model import load_vocabulary, torch_device
from gsae.commands.options import Device, Given, Json, ModelOption, MovedStores, RunArgument, TrustRemoteCode, takes
from gsae.commands.terminal import Shown, print_json, print_table
from gsae.features import BlindSettings, FeatureSettings

if TYPE_CHECKING:
    from gsae.evaluate import Progress

COLUMNS = ("sae", "architecture", "d_sae", "site", "split", "rows", "has_tokens", "has_logits")
SAENames = Annotated[
    list[str] | None, typer.Option("--sae", metavar="NAME", help="Only this SAE. Repeatable. Default: all.")
]


@takes(FeatureSettings)
def features(
    given: Given,
    run: RunArgument,
    sae: SAENames = None,
    store: MovedStores = None,
    split: Annotated[
        Literal["heldout", "train"], typer.Option(metavar="[heldout|train]", help="The rows to look at.")
    ] = "heldout",
    model: ModelOption = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out the texts of tokens and the effects on logits.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Describe every latent of a run's SAEs: its firings, tokens and effect on logits.

    Writes Parquet files to RUN/features. The same command continues where it was stopped.
    """
    from gsae.features import Vocabulary, check_features, find_features
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
            Vocabulary() if no_model else load_vocabulary(opened, site, model, device, trust_remote_code),
            names=names,
            split=split,
            settings=FeatureSettings(**given),
            listen=lambda e: shown.show(f"{e.sae}: {e.stage}", e.done, e.total),
            device=torch_device(device),
        )
    if as_json:
        print_json([facts.values() for facts in found])
    else:
        print_table(COLUMNS, [facts.values() for facts in found])
        typer.echo(f"\n{len(found)} SAEs in {run / 'features'}, as Parquet. Next: gsae browse {run}")


@takes(BlindSettings)
def browse(
    given: Given,
    run: RunArgument,
    sae: SAENames = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write. Default: RUN/browser, or RUN/blind.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port on 127.0.0.1. 0: any free port.")
    ] = 8427,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Write the files and end.")] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Rate latents of two SAEs, whose names are hidden while you rate.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show in a browser what `gsae features` found, or compare two SAEs blind.

    The folder that it writes is static files, which any web server can show to others. Ctrl-C ends serving.
    """
    from gsae.features import build_blind, build_browser, compare_ratings, ratings_of, serve

    names = tuple(sae or ())
    with Shown() as shown:

        def listen(event: "Progress") -> None:
            shown.show(f"{event.sae or 'trials'}: {event.stage}", event.done, event.total)

        if blind:
            folder = build_blind(run, names, out, BlindSettings(**given), listen)
        else:
            folder = build_browser(run, names, out, listen)
    if not no_serve:
        site, ratings = (folder / "site", ratings_of(folder)) if blind else (folder, None)
        serve(site, port, lambda url: typer.echo(f"{url} (Ctrl-C ends)", err=True), ratings)
    if blind:
        _print_ratings(compare_ratings(folder), as_json)
    elif as_json:
        print_json({"browser": str(folder)})
    else:
        typer.echo(f"{folder}: any static web server shows it.")


def _print_ratings(found: dict[str, Any], as_json: bool) -> None:
    """Print the result of a blind comparison so far."""
    if as_json:
        print_json(found)
        return
    rows = [{"sae": name, **found["counts"][name], "mean": found["means"][name]} for name in found["saes"]]
    print_table(("sae", "no", "maybe", "yes", "mean"), rows)
    typer.echo(f"\n{found['rated']} of {found['trials']} rated.")
    if found["interval"]:
        low, high = found["interval"]
        of = f"{found['saes'][0]} minus {found['saes'][1]}, over {found['pairs']} pairs"
        interval = f"{100 * found['confidence']:.0f} % interval {low:.2f} to {high:.2f}"
        typer.echo(f"Mean difference, {of}: {found['difference']:.2f} ({interval}).")


def export(
    sae: Annotated[
        Path,
        typer.Argument(metavar="RUN/NAME", help="Name of an SAE in a run's folder, or the folder of any saved SAE."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="dictionary_learning, delphi or neuronpedia; the last two need `gsae features` first. "
            "Saved SAEs are in SAELens's layout already.",
        ),
    ] = "dictionary_learning",
    store: MovedStores = None,
) -> None:
    """Write a trained SAE, or what its latents fire on, for the loader of another project."""
    from gsae.features import export_sae

    typer.echo(export_sae(sae, out, format_, stores=store or ()))
