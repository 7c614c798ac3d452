"""Every feature above 0 of an SAE over the rows of a split, on disk and sorted by latent.

One pass of the SAE over the rows writes a file for each 16,384 rows, so a pass that was stopped continues with the next
file. Each file is sorted by latent, so all firings of a range of latents are a slice of every file. What is computed
for a latent is therefore exact, and memory is that of one range. The cost is 12 bytes on disk for each firing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

from gsae.errors import CorruptError, NotFoundError
from gsae.evaluate import row_norms
from gsae.files import disk_errors, replace_file
from gsae.store import Site
from gsae.train import SAE, Firing

from .stamp import read_stamp, stamp

FILE_ROWS = 1 << 14
PASS_ELEMENTS = 1 << 25  # of the encoder's product at a time: 128 MiB, enough rows to share each reading of the weights
RANGE_ENTRIES = 1 << 23  # firings in memory at a time, unless a single latent has more: 320 MiB

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Firings:
    """Firings of latents from `first` on: entries of the i-th are `indptr[i]:indptr[i + 1]`, by source.

    indptr: (latents + 1,). sources: (n,) context * context_size + position. values: (n,), above 0.
    """

    first: int
    indptr: Ints
    sources: Ints
    values: Floats

    def __iter__(self) -> Iterator[tuple[int, Ints, Floats]]:
        for i, (begin, end) in enumerate(zip(self.indptr[:-1].tolist(), self.indptr[1:].tolist(), strict=True)):
            yield self.first + i, self.sources[begin:end], self.values[begin:end]


@dataclass(frozen=True)
class FiringsPass:
    """An SAE on `device`, and the rows that it runs on: those of `site` with a norm below `norm_limit`."""

    sae: SAE
    site: Site
    norm_limit: float
    device: str = "cpu"


def write_firings(
    one: FiringsPass, folder: Path, origin: Mapping[str, str], listen: Callable[[int], None] = lambda rows: None
) -> tuple[list[Path], int]:
    """Write the firings on every row of the pass; return the files and the number of rows.

    origin: what the firings follow from. A file in `folder` with the same origin is kept, any other is replaced.
    listen: gets the number of rows read so far.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    firing = Firing(one.sae)
    files, done, kept = [], 0, 0
    for number, (sources, x) in enumerate(one.site.in_order(FILE_ROWS)):
        files.append(folder / f"{number:05d}.safetensors")
        here = (row_norms(x) < one.norm_limit).numpy()
        kept += int(here.sum())
        if read_stamp(files[-1]) != stamp(origin):
            tensors = _firings(firing, sources[here], x[torch.from_numpy(here)], one.device)
            replace_file(files[-1], partial(save_file, tensors, metadata=stamp(origin)))
        done += len(x)
        listen(done)
    for path in set(folder.glob("*.safetensors")) - set(files):
        path.unlink()
    return files, kept


def _firings(firing: Firing, sources: Ints, x: torch.Tensor, device: str) -> dict[str, NDArray[Any]]:
    """Return the firings on rows x (n, d_in) with sources (n,), by latent and then by source, as a file holds them."""
    order = np.argsort(sources)  # by source first, so that one stable sort by latent gives both
    sources, x = sources[order], x[torch.from_numpy(order)]
    step = max(1, PASS_ELEMENTS // firing.d_sae)
    lists = [firing(x[begin : begin + step].to(device).float()) for begin in range(0, len(x), step)]
    latent = joined((part.latents.numpy() for part in lists), np.int32)
    counts = np.bincount(latent, minlength=firing.d_sae)
    # numpy sorts 16 bits by radix.
    by_latent = np.argsort(latent.astype(np.uint16) if firing.d_sae <= 1 << 16 else latent, kind="stable")
    each = joined((part.starts.diff().numpy() for part in lists), np.int64)
    return {
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "sources": np.repeat(sources, each)[by_latent],
        "values": joined((part.values.numpy() for part in lists), np.float32)[by_latent],
    }


def joined(parts: Iterable[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    """Concatenate arrays, of which there may be none."""
    return np.concatenate([np.zeros(0, dtype), *parts])


def read_firings(files: Sequence[Path], first: int, last: int) -> Iterator[Firings]:
    """Yield the firings of latents `first` to `last` (not included), in ranges of bounded size.

    Raises NotFoundError for a file that is not there and CorruptError for one that cannot be read.
    """
    opened = [_open(file) for file in files]
    bounds = [file.get_slice("indptr")[first : last + 1] for file in opened]
    counts = sum((np.diff(bound) for bound in bounds), np.zeros(last - first, np.int64))
    for begin, end in cut_ranges(counts, RANGE_ENTRIES):
        yield _merged(opened, [bound[begin : end + 1] for bound in bounds], first + begin, counts[begin:end])


def cut_ranges(counts: Ints, limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (first, last) of latents, each of at most `limit` entries or of one latent; counts: (latents,)."""
    first = 0
    while first < len(counts):
        fitting = int(np.searchsorted(np.cumsum(counts[first:]), limit, side="right"))
        last = first + max(fitting, 1)
        yield first, last
        first = last


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise NotFoundError(f"{file} is not there. Run `gsae features` to write it again.") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptError(f"{file} cannot be read: {error}. Delete it and run `gsae features` again.") from None


def _merged(opened: Sequence[Any], bounds: Sequence[Ints], first: int, counts: Ints) -> Firings:
    sources = np.concatenate([file.get_slice("sources")[b[0] : b[-1]] for file, b in zip(opened, bounds, strict=True)])
    values = np.concatenate([file.get_slice("values")[b[0] : b[-1]] for file, b in zip(opened, bounds, strict=True)])
    key = np.concatenate([np.repeat(np.arange(len(counts)), np.diff(bound)) for bound in bounds])
    key *= sources.max(initial=0) + 1
    key += sources
    order = np.argsort(key, kind="stable")  # each file is sorted already: they are merged
    return Firings(first, np.concatenate([[0], np.cumsum(counts)]), sources[order], values[order])
