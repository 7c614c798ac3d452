"""`gsae info`, `ls`, `verify`, `seal` and `copy`: what one does with a store that exists. None needs the model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gsae.commands.options import Json, StoreArgument
from gsae.commands.terminal import RUN_COLUMNS, Shown, print_divergences, print_facts, print_json, print_table
from gsae.errors import CorruptError


def info(
    path: Annotated[str, typer.Argument(metavar="STORE|RUN", help="Folder or URL of a store, or folder of a run.")],
    as_json: Json = False,
) -> None:
    """Show what a store or a training run holds."""
    if (Path(path) / "config.toml").exists():
        from gsae.train import describe_run

        _print_run(describe_run(Path(path)), as_json)
    else:
        from gsae.store import describe

        print_facts(describe(path), as_json)


def _print_run(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print_facts({name: value for name, value in facts.items() if name != "saes"}, as_json=False)
        typer.echo()
        print_table(RUN_COLUMNS, facts["saes"])
        print_divergences(facts["saes"])


def list_stores(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or s3://, gs:// or az:// URL.")],
    as_json: Json = False,
) -> None:
    """List the stores at or under a folder or URL: model, sites, rows, size and state."""
    from gsae.store import list_stores as find_stores

    found = [asdict(listed) for listed in find_stores(root)]
    if as_json:
        print_json(found)
    else:
        print_table(("path", "model", "sites", "rows", "bytes", "state"), found)


def verify(
    store: StoreArgument,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte: checksums, chunks, moments, order of rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that a store holds what its manifest says. Exit code 4: it does not."""
    from gsae.store import foreign_files, nonfinite_note, nonfinite_rows, open_store
    from gsae.store import verify as find_faults

    opened = open_store(store)
    with Shown() as shown:
        faults = find_faults(opened, deep, lambda event: shown.show("checking files", event.done, event.files))
    foreign = foreign_files(opened)
    if as_json:
        facts = {"store": str(store), "digest": opened.digest, "deep": deep, "faults": faults, "foreign": foreign}
        print_json(facts | {"nonfinite_rows": nonfinite_rows(opened)})
    for path in foreign:
        typer.echo(f"note: {path} is not part of the store", err=True)
    if note := nonfinite_note(opened):
        typer.echo(f"note: {note}", err=True)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise CorruptError(f"{store} is damaged: {len(faults)} faults, listed above.")
    if not as_json:
        typer.echo(f"{store} is good{': every byte was read' if deep else ''}. Digest {opened.digest}")


def seal(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")], as_json: Json = False
) -> None:
    """Publish the finished windows of an unfinished harvest as a complete store, for good."""
    from gsae.store import describe, nonfinite_note
    from gsae.store import seal as publish_finished

    sealed = publish_finished(store)
    if note := nonfinite_note(sealed):
        typer.echo(note, err=True)
    if as_json:
        print_json(describe(store))
    else:
        typer.echo(f"{store} is sealed with {len(sealed.manifest.windows)} windows. Digest {sealed.digest}")


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or s3://, gs:// or az:// URL of a store.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL to copy it to.")],
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="[planes|zstd|none]",
            help="Encode the rows again with this codec; the digest stays the same. Default: copied as they are.",
        ),
    ] = None,
    level: Annotated[
        int | None,
        typer.Option(
            metavar="LEVEL",
            help="Level of --codec: planes 0 (fast) or 1 (small), zstd 1 to 22. Default: unchanged, or 1.",
        ),
    ] = None,
    sites: Annotated[
        str | None, typer.Option(metavar="SITES", help="Copy only these sites, such as mlp.10,resid.10. Default: all.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="WINDOWS", help="Copy only the first train windows. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a store between folders and object stores, and check every file on the way.

    The same command continues a copy that was stopped.
    """
    from gsae.store import copy as copy_store

    with Shown() as shown:
        digest = copy_store(
            source,
            destination,
            codec=codec,
            level=level,
            sites=None if sites is None else [name.strip() for name in sites.split(",")],
            windows=windows,
            listen=lambda e: shown.show("copying bytes", e.bytes, e.all_bytes, f"{e.files} of {e.all_files} files"),
        )
    if as_json:
        print_json({"source": source, "destination": destination, "digest": digest})
    else:
        typer.echo(f"{destination}: digest {digest}")
