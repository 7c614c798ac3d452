"""The step before the plan: the tokens of a store, written by one of many workers, resumable, without the model.

Blocks are gathered to parts of at least 2^22 tokens, some seconds of work, each a file in `tokens/` that appears whole;
then the parts are laid end to end in the store's own arrays and removed. So a step that was killed goes on at the first
part that is missing, reading over the text before it, and memory is bounded by a few files of an array (64 MiB each),
whatever the text's size. It costs a second copy of the tokens on disk while it lasts. One worker makes them while the
others wait at a lock that dies with its holder; where a file system has no locks, all make the same bytes.
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
    SCHEMA_VERSION,
    ContextsSpec,
    TokensMade,
    read_plan,
    read_tokens,
    write_contexts,
    write_tokens_made,
    write_tokens_plan,
)

from .request import Request, check_same_tokens, make_tokens_plan
from .text.packing import HELDOUT, TRAIN, Block, BlockTokenised, tokenise

PART_TOKENS = 1 << 22
# The store's arrays, and the field of a block that each is made of.
ARRAYS = {
    "contexts/tokens": "tokens",
    "contexts/split": "split",
    "documents/start": "start",
    "documents/id": "id",
    "documents/split": "document_split",
}


@dataclass(frozen=True)
class Progress:
    """What the parts up to one hold.

    read: documents taken from the text. documents: those in the arrays, which empty ones are not. contexts; rows,
    heldout_rows: of each split. last: there are no more parts.
    """

    read: int = 0
    documents: int = 0
    contexts: int = 0
    rows: int = 0
    heldout_rows: int = 0
    last: bool = False

    def after(self, block: Block) -> "Progress":
        """Return the progress after one more block."""
        return Progress(
            read=self.read + block.read,
            documents=self.documents + len(block.start),
            contexts=self.contexts + len(block.tokens),
            rows=self.rows + block.rows[TRAIN],
            heldout_rows=self.heldout_rows + block.rows[HELDOUT],
        )


def write_tokens(
    asked: Request,
    out: Path,
    listen: Callable[[BlockTokenised], None] = lambda event: None,
    wait: Callable[[], None] = lambda: None,
) -> ContextsSpec:
    """Return what the plan says of the tokens of `out`, which are made, or made whole, where that is still to do.

    wait: called once where another worker is making them. Raises IncompatibleError when they were begun with other
    settings, UsageError for a text that gives no train rows, SpaceError; what was published before an error stays.
    """
    with alone(out, "making-tokens", wait):
        begun, done = read_tokens(out)[0], _finished(out)
        if begun is not None:
            check_same_tokens(begun, asked, out, made=done is not None)
        if done is None:
            done = _make(asked, out, listen)
        for part in out.glob("tokens/*.npz"):
            part.unlink(missing_ok=True)
        return done


def _finished(out: Path) -> ContextsSpec | None:
    """Return what is known of finished tokens; another worker may have come as far as to the plan."""
    if made := read_tokens(out)[1]:
        return made.contexts
    plan = read_plan(out)
    return plan.contexts if plan else None


def _make(asked: Request, out: Path, listen: Callable[[BlockTokenised], None]) -> ContextsSpec:
    try:
        made = _laid_end_to_end(asked, out, _parts(asked, out, listen))
        write_tokens_made(out, made)
    except FileNotFoundError:  # there are no locks, and another worker was faster and removed the parts
        if (done := _finished(out)) is None:
            raise
        return done
    return made.contexts


def _parts(asked: Request, out: Path, listen: Callable[[BlockTokenised], None]) -> list[Path]:
    """Make the parts that are missing, and return all."""
    config, parts = asked.config, _published(out)
    so_far = _progress(parts[-1]) if parts else Progress()
    if so_far.last:
        return parts
    size = config.context_size
    blocks = tokenise(
        itertools.islice(asked.text.read(), so_far.read, None),
        asked.tokenizer,
        context_size=size,
        rows=None if config.rows is None else config.rows - so_far.rows,
        heldout=config.heldout_share,
        seed=config.seed,
        dropped_positions=config.dropped_positions,
    )
    gathered: list[Block] = []
    for block in blocks:
        if sum(each.tokens.size for each in gathered) >= PART_TOKENS:
            parts.append(_publish(asked, out, len(parts), gathered, so_far))
            gathered = []
        gathered.append(replace(block, start=block.start + so_far.contexts * size))
        so_far = so_far.after(block)
        listen(BlockTokenised(so_far.read, so_far.contexts, so_far.rows))
        if block.again and not so_far.rows:
            break  # reading on for ever would give none
    if not so_far.rows:
        raise UsageError(
            f"The text gives no train rows: {so_far.read} documents, {so_far.contexts} contexts, a share of "
            f"{config.heldout_share:g} of the documents held out. More documents or a smaller share are needed."
        )
    return [*parts, _publish(asked, out, len(parts), gathered, replace(so_far, last=True))]


def _published(out: Path) -> list[Path]:
    """Return the parts that are there without a gap."""
    paths = (_path(out, number) for number in itertools.count())
    return list(itertools.takewhile(Path.exists, paths))


def _path(out: Path, number: int) -> Path:
    return out / f"tokens/{number:05d}.npz"


def _publish(asked: Request, out: Path, number: int, blocks: list[Block], progress: Progress) -> Path:
    if not number:  # only now is there something to go on with
        write_tokens_plan(out, make_tokens_plan(asked))
    arrays: dict[str, Any] = {name: np.concatenate([getattr(b, name) for b in blocks]) for name in ARRAYS.values()}
    data = io.BytesIO()
    np.savez(data, progress=np.array(astuple(progress), np.int64), **arrays)
    path = _path(out, number)
    publish_bytes(out, str(path.relative_to(out)), data.getvalue())
    return path


def _read(path: Path, *names: str) -> list[NDArray[Any]]:
    """Read some arrays of a part; their crc32 are checked."""
    try:
        with np.load(path) as part:
            return [part[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise CorruptError(
            f"{path} is damaged. Remove the folder {path.parent} and run the same command again."
        ) from None


def _progress(part: Path) -> Progress:
    read, documents, found, rows, heldout_rows, last = _read(part, "progress")[0].tolist()
    return Progress(read, documents, found, rows, heldout_rows, bool(last))


def _laid_end_to_end(asked: Request, out: Path, parts: list[Path]) -> TokensMade:
    """Write the store's arrays from the parts."""
    wanted, progress = asked.config.rows, [_progress(part) for part in parts]
    whole = progress[-1]
    ends = {"contexts": [each.contexts for each in progress], "documents": [each.documents for each in progress]}
    shapes = {"contexts/tokens": (whole.contexts, asked.config.context_size)}
    values = {
        path: _Laid(parts, name, ends[path.split("/")[0]], shapes.get(path, (ends[path.split("/")[0]][-1],)))
        for path, name in ARRAYS.items()
    }
    return TokensMade(
        schema_version=SCHEMA_VERSION,
        contexts=write_contexts(out, values, wanted is not None and whole.rows < wanted),
        rows=whole.rows if wanted is None else min(wanted, whole.rows),
        heldout_rows=whole.heldout_rows,
    )


@dataclass(frozen=True)
class _Laid:
    """An array of all parts end to end, read slice by slice; ends: the row after the last of each part."""

    parts: list[Path]
    name: str
    ends: list[int]
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
