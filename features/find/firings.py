"""Every feature above 0 of an SAE over a split's rows, on disk, sorted by latent: what features are described from.

One pass of the SAE over the rows makes a file of each 16,384 of them, so a pass that was stopped goes on at the
next file. Sorted by latent in each file, all firings of a range of latents are a slice of every file: whatever is
asked of a latent is then exact, and memory is that of one range.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

from gsae.errors import CorruptError, NotFoundError
from gsae.evaluate import row_norms
from gsae.files import replace_file
from gsae.store import Site
from gsae.train import SAE, Firing

FILE_ROWS = 1 << 14
PASS_ELEMENTS = 1 << 25  # of the encoder's product at a time: 128 MiB, so that its weights are read for many rows
RANGE_ENTRIES = 1 << 23  # firings that are in memory at a time, but for a single latent that has more: 320 MiB

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


def write_firings(
    sae: SAE,
    site: Site,
    folder: Path,
    made_of: Mapping[str, str],
    norm_limit: float,
    listen: Callable[[int], None] = lambda rows: None,
    device: str = "cpu",
) -> tuple[list[Path], int]:
    """Write the firings on every row of norm below `norm_limit`; return the files and how many rows that is.

    made_of: what they follow from; a file in `folder` that says the same is kept, any other is written again. `listen`
    is told how many rows are behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    firing = Firing(sae)
    files, done, kept = [], 0, 0
    for number, (sources, x) in enumerate(site.in_order(FILE_ROWS)):
        files.append(folder / f"{number:05d}.safetensors")
        here = (row_norms(x) < norm_limit).numpy()
        kept += int(here.sum())
        if not _is_made_of(files[-1], made_of):
            _write(files[-1], firing, sources[here], x[torch.from_numpy(here)], made_of, device)
        done += len(x)
        listen(done)
    for path in set(folder.glob("*.safetensors")) - set(files):
        path.unlink()
    return files, kept


def _is_made_of(file: Path, made_of: Mapping[str, str]) -> bool:
    with suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(file, framework="numpy") as opened:
        return bool(opened.metadata() == _metadata(made_of))
    return False


def _metadata(made_of: Mapping[str, str]) -> dict[str, str]:
    return {"gsae": json.dumps(made_of, sort_keys=True)}  # one entry: safetensors writes several in any order


def _write(file: Path, firing: Firing, sources: Ints, x: torch.Tensor, made_of: Mapping[str, str], device: str) -> None:
    order = np.argsort(sources)  # by source before by latent: then one stable sort does both
    sources, x = sources[order], x[torch.from_numpy(order)]
    step = max(1, PASS_ELEMENTS // firing.d_sae)
    lists = [firing(x[begin : begin + step].to(device).float()) for begin in range(0, len(x), step)]
    latent = joined((part.latents.numpy() for part in lists), np.int32)
    counts = np.bincount(latent, minlength=firing.d_sae)
    # 16 bits are sorted by radix.
    by_latent = np.argsort(latent.astype(np.uint16) if firing.d_sae <= 1 << 16 else latent, kind="stable")
    each = joined((part.starts.diff().numpy() for part in lists), np.int64)
    tensors = {
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "sources": np.repeat(sources, each)[by_latent],
        "values": joined((part.values.numpy() for part in lists), np.float32)[by_latent],
    }
    replace_file(file, lambda path: save_file(tensors, path, _metadata(made_of)))


def joined(parts: Iterable[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    """Join the parts of a list, of which there may be none."""
    return np.concatenate([np.zeros(0, dtype), *parts])


def read_firings(files: Sequence[Path], first: int, last: int) -> Iterator[Firings]:
    """Yield the firings of latents `first` to `last` (not included), in ranges of bounded size.

    Raises NotFoundError for a file that is not there and CorruptError for one that cannot be read.
    """
    opened = [_open(file) for file in files]
    bounds = [file.get_slice("indptr")[first : last + 1] for file in opened]
    counts = sum((np.diff(bound) for bound in bounds), np.zeros(last - first, np.int64))
    begin = 0
    while begin < last - first:
        fitting = int(np.searchsorted(np.cumsum(counts[begin:]), RANGE_ENTRIES, side="right"))
        end = begin + max(fitting, 1)
        yield _merged(opened, [bound[begin : end + 1] for bound in bounds], first + begin, counts[begin:end])
        begin = end


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise NotFoundError(f"{file} is not there. `gsae features` writes it again.") from None
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
