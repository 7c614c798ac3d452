"""What the tests of copies and caches run in separate processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gsae.errors import GsaeError, IncompatibleError, NotFoundError
from gsae.store import open_store
from gsae.store.manage.copy import copy
from gsae.store.places.cache import Cache, FetchedFile
from gsae.train import RunConfig, parse_sae, train

SITE = "mlp.1"


def counted(folder: Path, log: Path, max_bytes: int | None = None) -> Cache:
    """Return a cache that adds the path of every file it fetches as a line to `log`."""

    def note(fetched: FetchedFile) -> None:
        with log.open("a") as file:
            file.write(fetched.path + "\n")

    return Cache(folder, max_bytes, listen=note)


def assert_every_row_is_read(url: str, folder: Path, log: Path, seed: int, epochs: int = 1) -> None:
    """Read a remote store to the end and check the number of rows."""
    site = open_store(url, counted(folder, log)).site(SITE)
    with site.batches(64, seed=seed, epochs=epochs, mix=2, open_windows=3) as batches:
        assert sum(len(rows) for rows in batches) == epochs * site.rows


def train_from(url: str, folder: Path, log: Path, out: Path) -> None:
    """Train an SAE on more than an epoch of a remote store."""
    config = RunConfig(
        site=SITE, steps=60, batch_size=96, threads=1, device="cpu", saes=parse_sae("relu width=32 l1=.1")
    )
    train(open_store(url, counted(folder, log)).site(SITE), config, out)


def fetch_for_ever(url: str, folder: Path, begun: Path) -> None:
    """Start to fetch a shard, create `begun`, and never finish."""
    store = open_store(url, Cache(folder))
    entry = store.manifest.windows[0].arrays[0].file

    class Endless:
        name = url

        def blocks(self, entry: object) -> object:
            yield b"half"
            begun.touch()
            time.sleep(600)

    store.place.cache.open(entry, Endless())  # type: ignore[attr-defined,arg-type]


def assert_opened_whole_during_a_copy(dst: Path, digest: str, ready: Path) -> None:
    """Try to open a store that is being copied until it is complete; then check that all rows can be read."""
    ready.touch()
    while True:
        try:
            store = open_store(dst)
        except (NotFoundError, IncompatibleError):
            continue
        assert store.digest == digest
        for split in ("train", "heldout"):
            site = store.site(SITE, split)  # type: ignore[arg-type]
            assert sum(len(rows) for rows in site.batches(64, threads=1)) == site.rows
        return


def in_environment(environment: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` with `environment` in place of that of the server that started this process."""
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def copy_or_exit(src: str, dst: str) -> None:
    """Copy, and exit with the error's code."""
    try:
        copy(src, dst)
    except GsaeError as error:
        raise SystemExit(error.exit_code) from None


def copy_beside(root: Path) -> None:
    """Copy the store `source` two folders up, one file at a time."""
    copy(root.parent.parent / "source", root, streams=1)


def recode_beside(root: Path) -> None:
    """Copy a part of it in another codec."""
    copy(root.parent.parent / "source", root, codec="zstd", windows=1, streams=1)
