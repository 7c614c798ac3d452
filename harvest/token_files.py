"""Writing the tokens of a store, before its plan: by one of many workers, resumable, without the model's weights.

Blocks are gathered to parts of at least 2^22 tokens, some seconds of work. Each part is a file in `tokens/` that
appears as a whole; at the end the parts are joined to the store's own arrays and removed. A killed step continues at
the first missing part, after reading past the text before it. Memory is bounded by a few parts (64 MiB for each array),
whatever the size of the text. The cost is a second copy of the tokens on disk until the end.

One worker writes the tokens while the others wait at a lock that is released when its process ends. On a file system
without locks all of them write the same bytes.
"""

import bisect
import io
import itertools
import zipfile
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsae.errors import CorruptError, UsageError
from gsae.files import alone, publish_bytes
from gsae.store import (
    BadRows,
    ContextsSpec,
    TokensMade,
    read_plan,
    read_tokens,
    write_contexts,
    write_tokens_made,
    write_tokens_plan,
)

from .plans import make_tokens_plan
from .request import Request
from .resume_check import check_same_tokens
from .text.packing import HELDOUT, TRAIN, Block, BlockTokenised, tokenise

PART_TOKENS = 1 << 22
BAD_ROWS_NAMED = 3
# The store's arrays, and the field of `Block` that each is joined from.
ARRAYS = {
    "contexts/tokens": "tokens",
    "contexts/split": "split",
    "documents/start": "start",
    "documents/id": "id",
    "documents/split": "document_split",
}


@dataclass(frozen=True)
class Progress:
    """Totals over all parts up to one.

    read: documents taken from the text. documents: those in the arrays, without empty ones. contexts: of both splits.
    rows, heldout_rows: rows of each split. bad: rows of the text that gave no document. last: whether this is the last
    part.
    """

    read: int = 0
    documents: int = 0
    contexts: int = 0
    rows: int = 0
    heldout_rows: int = 0
    bad: int = 0
    last: bool = False

    def after(self, block: Block) -> "Progress":
        """Return the progress after one more block."""
        return Progress(
            read=self.read + block.read,
            documents=self.documents + len(block.start),
            contexts=self.contexts + len(block.tokens),
            rows=self.rows + block.rows[TRAIN],
            heldout_rows=self.heldout_rows + block.rows[HELDOUT],
            bad=self.bad + len(block.bad),
        )


def write_tokens(
    request: Request,
    out: Path,
    listen: Callable[[BlockTokenised], None] = lambda event: None,
    wait: Callable[[], None] = lambda: None,
) -> ContextsSpec:
    """Write the tokens of `out`, or the rest of them, and return what the plan records about them.

    wait: called once if another worker is writing them. Raises IncompatibleError if they were begun with other
    settings, UsageError if the text gives no train rows or has a token that the model does not know, and SpaceError;
    parts published before an error are kept.
    """
    with alone(out, "making-tokens", wait):
        begun, done = read_tokens(out)[0], _finished(out)
        if begun is not None:
            check_same_tokens(begun, request, out, finished=done is not None)
        if done is None:
            done = _make(request, out, listen)
        for part in out.glob("tokens/*.npz"):
            part.unlink(missing_ok=True)
        return done


def _finished(out: Path) -> ContextsSpec | None:
    """Return what is recorded about finished tokens, None if they are not; another worker may have written the plan."""
    if made := read_tokens(out)[1]:
        return made.contexts
    plan = read_plan(out)
    return plan.contexts if plan else None


def _make(request: Request, out: Path, listen: Callable[[BlockTokenised], None]) -> ContextsSpec:
    try:
        made = _join_parts(request, out, _write_parts(request, out, listen))
        write_tokens_made(out, made)
    except FileNotFoundError:  # without locks, a faster worker may have removed the parts
        if (done := _finished(out)) is None:
            raise
        return done
    return made.contexts


def _write_parts(request: Request, out: Path, listen: Callable[[BlockTokenised], None]) -> list[Path]:
    """Write the parts that are missing and return the paths of all."""
    config, parts = request.config, _published_parts(out)
    so_far = _progress(parts[-1]) if parts else Progress()
    if so_far.last:
        return parts
    size = config.context_size
    blocks = tokenise(
        itertools.islice(request.text.read(), so_far.read, None),
        request.tokenizer,
        context_size=size,
        rows=None if config.rows is None else config.rows - so_far.rows,
        heldout=config.heldout_share,
        seed=config.seed,
        dropped_positions=config.dropped_positions,
    )
    gathered: list[Block] = []
    for block in blocks:
        request.known_tokens.check(block)
        if sum(each.tokens.size for each in gathered) >= PART_TOKENS:
            parts.append(_publish(request, out, len(parts), gathered, so_far))
            gathered = []
        gathered.append(replace(block, start=block.start + so_far.contexts * size))
        so_far = so_far.after(block)
        listen(BlockTokenised(so_far.read, so_far.contexts, so_far.rows))
        if block.again and not so_far.rows:
            break  # reading the text again would give no rows either
    if not so_far.rows:
        raise UsageError(
            f"The text gives no train rows: {so_far.read} documents, {so_far.contexts} contexts, a share of "
            f"{config.heldout_share:g} of the documents held out. Use more documents or a smaller --heldout."
        )
    return [*parts, _publish(request, out, len(parts), gathered, replace(so_far, last=True))]


def _published_parts(out: Path) -> list[Path]:
    """Return the paths of the parts that exist, up to the first gap."""
    paths = (_path(out, number) for number in itertools.count())
    return list(itertools.takewhile(Path.exists, paths))


def _path(out: Path, number: int) -> Path:
    return out / f"tokens/{number:05d}.npz"


def _publish(request: Request, out: Path, number: int, blocks: list[Block], progress: Progress) -> Path:
    if not number:  # a text that gives no rows leaves no file behind
        write_tokens_plan(out, make_tokens_plan(request))
    arrays: dict[str, Any] = {name: np.concatenate([getattr(b, name) for b in blocks]) for name in ARRAYS.values()}
    bad = np.array([line for block in blocks for line in block.bad][:BAD_ROWS_NAMED], np.str_)
    data = io.BytesIO()
    np.savez(data, progress=np.array(astuple(progress), np.int64), bad=bad, **arrays)
    path = _path(out, number)
    publish_bytes(out, str(path.relative_to(out)), data.getvalue())
    return path


def _read(path: Path, *names: str) -> list[NDArray[Any]]:
    """Read arrays of a part; NumPy checks their crc32. Raises CorruptError."""
    try:
        with np.load(path) as part:
            return [part[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise CorruptError(
            f"{path} is damaged. Remove the folder {path.parent} and run the same command again."
        ) from None


def _progress(part: Path) -> Progress:
    read, documents, found, rows, heldout_rows, bad, last = _read(part, "progress")[0].tolist()
    return Progress(read, documents, found, rows, heldout_rows, bad, bool(last))


def _join_parts(request: Request, out: Path, parts: list[Path]) -> TokensMade:
    """Write the store's arrays from the parts and return what they hold."""
    wanted, progress = request.config.rows, [_progress(part) for part in parts]
    whole = progress[-1]
    ends = {
        "contexts": tuple(each.contexts for each in progress),
        "documents": tuple(each.documents for each in progress),
    }
    values = {}
    for path, name in ARRAYS.items():
        ends_here = ends[path.split("/")[0]]
        width = (request.config.context_size,) if name == "tokens" else ()
        values[path] = _JoinedArray(tuple(parts), name, ends_here, (ends_here[-1], *width))
    contexts = write_contexts(out, values, wanted is not None and whole.rows < wanted)
    if whole.bad:
        contexts = contexts.model_copy(update={"bad_rows": BadRows(count=whole.bad, first=_first_bad(parts))})
    return TokensMade(
        schema_version=contexts.schema_version,
        contexts=contexts,
        rows=whole.rows if wanted is None else min(wanted, whole.rows),
        heldout_rows=whole.heldout_rows,
    )


def _first_bad(parts: list[Path]) -> tuple[str, ...]:
    lines = itertools.chain.from_iterable(_read(part, "bad")[0].tolist() for part in parts)
    return tuple(itertools.islice(lines, BAD_ROWS_NAMED))


@dataclass(frozen=True)
class _JoinedArray:
    """One array of all parts, joined along its first axis and read slice by slice; ends: (parts,) where each ends."""

    parts: tuple[Path, ...]
    name: str
    ends: tuple[int, ...]
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        whole = np.empty(0)
        for number in range(bisect.bisect_right(self.ends, rows.start), len(self.ends)):
            before = self.ends[number - 1] if number else 0
            if before >= rows.stop:
                break
            (part,) = _read(self.parts[number], self.name)
            if not len(whole):
                whole = np.empty((rows.stop - rows.start, *self.shape[1:]), part.dtype)
            first, last = max(rows.start, before), min(rows.stop, self.ends[number])
            whole[first - rows.start : last - rows.start] = part[first - before : last - before]
        return whole
