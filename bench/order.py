"""In which order do rows reach a trainer? Counted from positions alone: no language model, no activations.

2^24 rows of contexts of 1,024, at the defaults of harvest and `batches` for d = 4096, against what a uniformly shuffled
buffer would give and against SAELens's mixing buffer (its algorithm, run on positions). docs/shuffle.md says how each
figure is defined. Takes two minutes and 2 GB.
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.store.format import row_order as order
from gsae.store.read.read_order import Mix, Shuffle, mixed, mixes

CONTEXT, BATCH, CHUNK_ROWS = 1024, 4096, 512
DEFAULT_WINDOW = 1 << 18
UNIFORM_PAIRS = BATCH * (BATCH - 1) / 2 * (CONTEXT - 1) / (10**6 - 1)
SEED = 0
# name, rows, share of the buffer that is kept; 20 contexts is SAELens's default (n_batches_in_buffer)
BUFFERS = (
    ("uniform buffer", 10**6, 0.0),
    ("SAELens mixing buffer", 20 * CONTEXT, 0.5),
    ("SAELens mixing buffer", 10**6, 0.5),
)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """The rows of one epoch in the order in which they reach the trainer.

    sources: (rows,) the place of each in the text. window: (rows,) where each was stored. mix: (rows,) with which
    others it was read.
    """

    sources: Ints
    window: Ints
    mix: Ints


def stored(rows: int, window_rows: int) -> Ints:
    """Return the source of every stored row, (rows,), as a harvest lays them."""
    contexts = rows // CONTEXT
    counts = np.full(contexts, CONTEXT, np.int64)
    laid = order.layout(np.zeros(contexts, np.uint8), counts, "train", SEED, window_rows, rows)
    found = []
    for w in range(laid.windows):
        window = laid.window(w)
        everything = np.ones((len(window.contexts), CONTEXT), bool)
        found.append(window.sources(everything)[order.stored_order(window, "train", SEED)])
    return np.concatenate(found)


def read(laid: Ints, window_rows: int, shuffle: Shuffle, number: int) -> Epoch:
    """Return epoch `number` of the stored rows `laid`, as `batches` reads them."""
    per_window = window_rows // CHUNK_ROWS
    rows, mix_of, at = np.empty(len(laid), np.int64), np.empty(len(laid), np.int64), 0
    for mix in mixes([per_window] * (len(laid) // window_rows), shuffle, number + 1, (number, 0)):
        inside = stored_rows(mix, per_window)
        rows[at + mixed(len(inside), shuffle, mix)] = inside
        mix_of[at : at + len(inside)] = mix.number
        at += len(inside)
    return Epoch(laid[rows], rows // window_rows, mix_of)


def stored_rows(mix: Mix, per_window: int) -> Ints:
    """Return the stored rows of a mix in the order of its picks."""
    first = np.array([(pick.window * per_window + pick.chunk) * CHUNK_ROWS for pick in mix.picks], np.int64)
    return (first[:, None] + np.arange(CHUNK_ROWS)).reshape(-1)


def buffered(rows: int, buffer_rows: int, kept: float, seed: int) -> Epoch:
    """Return the order that a shuffling buffer over a text's contexts gives, as long as there is text to fill it with.

    The buffer is filled up to `buffer_rows` and permuted, whole batches are served down to the share `kept` of it, and
    it is filled again: kept 0.5 is SAELens's mixing buffer, 0 a plain one.
    """
    rng = np.random.default_rng(seed)
    buffer, served, first = np.empty(0, np.int64), [], 0
    while first < rows:
        missing = -(-(buffer_rows - len(buffer)) // CONTEXT) * CONTEXT
        buffer = np.concatenate([buffer, np.arange(first, first + missing)])
        first += missing
        if first <= rows:
            buffer = rng.permutation(buffer)
            count = max(1, (len(buffer) - int(buffer_rows * kept)) // BATCH) * BATCH
            served.append(buffer[:count])
            buffer = buffer[count:]
    sources = np.concatenate(served)
    return Epoch(sources, sources // CONTEXT, np.arange(len(sources)) // BATCH)


def same_context_pairs(sources: Ints) -> Ints:
    """Return for each batch, (batches,), its pairs of rows from one context."""
    batches = np.sort((sources // CONTEXT).reshape(-1, BATCH), axis=1)
    new = np.ones(batches.shape, bool)
    new[:, 1:] = batches[:, 1:] != batches[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(new), batches.size))
    batch = np.flatnonzero(new) // BATCH
    return np.bincount(batch, weights=runs * (runs - 1) // 2).astype(np.int64)


def drift(epoch: Epoch) -> tuple[float, float]:
    """Return the rank correlation of source position and batch number, and its standard error over windows.

    Both are uniform, so ranks are linear in them and rank correlation is the ordinary one. Each window adds a term to
    the sum of products; independent terms of expectation 0 have together the variance that is the sum of their squares.
    """
    batch = np.arange(len(epoch.sources)) // BATCH
    a, b = epoch.sources - epoch.sources.mean(), batch - batch.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    terms = np.bincount(epoch.window, weights=a * b)
    return float(terms.sum()) / scale, float(np.sqrt((terms**2).sum())) / scale


def shared_pairs(one: Epoch, two: Epoch, rows: int) -> float:
    """Return the pairs of rows that are in one batch in both epochs, per batch."""
    a, b = (of_source(e, np.arange(len(e.sources)) // BATCH, rows) for e in (one, two))
    return float(pairs_by(a, b, a, rows).sum()) / (len(one.sources) // BATCH)


def beyond_chance(one: Epoch, two: Epoch, rows: int) -> tuple[float, float]:
    """Return the shared pairs per batch that chance gives, and by how many standard errors there are more.

    Chance: the chunks are read in the mixes they are read in, and the rows of every mix are permuted at random. Mixes
    are whole batches, all of one size, and each is a unit of the standard error.
    """
    batches = rows // BATCH
    a, b = (of_source(e, np.arange(rows) // BATCH, rows) for e in (one, two))
    g, h = (of_source(e, e.mix, rows) for e in (one, two))
    alike = (BATCH - 1) / (np.bincount(g)[0] - 1)  # of two rows of a mix, the share that is in one batch
    chance = pairs_by(g, h, g, rows) * alike**2
    more = pairs_by(a, b, g, rows) - chance
    return float(chance.sum()) / batches, float(more.sum() / np.sqrt((more**2).sum()))


def of_source(epoch: Epoch, label: Ints, rows: int) -> Ints:
    """Return the labels of an epoch's rows in the order of their sources, (rows,), each absent row with its own."""
    ordered = np.arange(rows)
    ordered[epoch.sources] = label
    return ordered


def pairs_by(a: Ints, b: Ints, unit: Ints, rows: int) -> NDArray[np.float64]:
    """Return for each unit its pairs of rows whose labels are equal in `a` and in `b`; a unit is a union of labels a.

    a, b, unit: (rows,), all below `rows`.
    """
    place = np.argsort(a * rows + b, kind="stable")
    labels = (a * rows + b)[place]
    first = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]]))
    counts = np.diff(np.append(first, len(labels)))
    return np.bincount(unit[place[first]], weights=counts * (counts - 1) / 2)


def figures(name: str, one: Epoch, two: Epoch, rows: int) -> dict[str, Any]:
    """Return what is told of an order."""
    found, (correlation, error) = same_context_pairs(one.sources), drift(one)
    return {
        "order": name,
        "same_context_pairs": round(float(found.mean())),
        "same_context_pairs_99th_percentile": round(float(np.percentile(found, 99))),
        "of_uniform_buffer": round(float(found.mean()) / UNIFORM_PAIRS, 3),
        "rank_correlation": round(correlation, 4),
        "in_standard_errors": round(correlation / error, 2),
        "pairs_shared_by_two_epochs": round(shared_pairs(one, two, rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1 << 24)
    parser.add_argument("--mix", type=int, default=32)
    parser.add_argument("--open-windows", type=int, default=32)
    options = parser.parse_args()
    rows = options.rows
    shuffle = Shuffle(SEED, mix_chunks=options.mix, open_windows=options.open_windows)
    for name, size, kept in BUFFERS:
        one, two = (buffered(rows, size, kept, seed) for seed in (0, 1))
        print(json.dumps(figures(f"{name}, {size:,} rows", one, two, rows)), flush=True)
    for bits in range(14, 19):
        laid = stored(rows, 1 << bits)
        one, two = (read(laid, 1 << bits, shuffle, epoch) for epoch in (0, 1))
        told = figures(f"gsae, windows of 2^{bits} rows", one, two, rows)
        print(json.dumps(told), flush=True)
    chance, beyond = beyond_chance(one, two, rows)
    few, straight = told["of_uniform_buffer"] <= 1 / 3, abs(told["in_standard_errors"]) <= 3
    last = {
        "bench": "order",
        "met": bool(few and straight and beyond <= 3),
        "same_context_pairs": told["same_context_pairs"],
        "same_context_pairs_limit": round(UNIFORM_PAIRS / 3),
        "rank_correlation_in_standard_errors": told["in_standard_errors"],
        "shared_pairs": told["pairs_shared_by_two_epochs"],
        "shared_pairs_by_chance_with_whole_chunks": round(chance),
        "shared_pairs_beyond_chance_in_standard_errors": round(beyond, 2),
        "shared_pairs_by_chance_row_by_row": round(BATCH * (BATCH - 1) / 2 * (BATCH - 1) / (rows - 1)),
        "met_row_by_row": False,  # rows of a chunk are read together in every epoch: the price of reading whole chunks
    }
    print(json.dumps(last))


if __name__ == "__main__":
    main()
