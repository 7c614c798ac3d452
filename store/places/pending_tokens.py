"""A store without a plan: what its tokens are made from and, once they are written, their sizes and sums.

The plan needs the language model; tokens need only its tokenizer, and may be made days before, on another machine.
Until there is a plan.json, two small files in `tokens/` replace it: `begun.json`, published before the first token, so
that a command with other settings is refused, and `made.json`, published after the last. A harvest may keep temporary
files in the same folder; `clear_tokens` removes all of it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gsae.errors import NotFoundError
from gsae.files import publish_bytes
from gsae.store.format.json_files import Count, Positive, StoredValue, T, parse, to_json
from gsae.store.format.plan import ContextsSpec, DatasetSource, TokenizerSource

from .folder import Folder
from .place import Place

TOKENS = "tokens"
TOKENS_ONLY, UNFINISHED_TOKENS = "tokens only", "unfinished tokens"
TOKENS_BEGUN, TOKENS_MADE = f"{TOKENS}/begun.json", f"{TOKENS}/made.json"


class TokensPlan(StoredValue):
    """Everything that determines the tokens of a store; the fields are those of its plan."""

    schema_version: str
    tokenizer: TokenizerSource
    dataset: DatasetSource
    context_size: Annotated[int, Field(ge=2, le=2**24)]
    requested_rows: Positive | None
    heldout: Annotated[float, Field(ge=0, lt=1)]
    dropped_positions: tuple[Count, ...]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    versions: dict[str, str]


class TokensMade(StoredValue):
    """The finished tokens, and the numbers of rows that they give."""

    schema_version: str
    contexts: ContextsSpec
    rows: Count
    heldout_rows: Count


def write_tokens_plan(root: Path, plan: TokensPlan) -> None:
    """Publish what the tokens of `root` are made from. Raises IncompatibleError if other tokens were begun."""
    publish_bytes(root, TOKENS_BEGUN, to_json(plan))


def write_tokens_made(root: Path, made: TokensMade) -> None:
    """Publish the sizes and sums of the finished tokens of `root`."""
    publish_bytes(root, TOKENS_MADE, to_json(made))


def read_tokens(where: Place | Path) -> tuple[TokensPlan | None, TokensMade | None]:
    """Return the two files of a store that has no plan; None for each that does not exist."""
    where = Folder(where) if isinstance(where, Path) else where
    return _read(where, TOKENS_BEGUN, TokensPlan), _read(where, TOKENS_MADE, TokensMade)


def clear_tokens(root: Path) -> None:
    """Remove `tokens/`, because the plan has the same content."""
    for path in (root / TOKENS).glob("*"):
        with suppress(FileNotFoundError):
            path.unlink()
    with suppress(OSError):
        (root / TOKENS).rmdir()


def _read(where: Place, name: str, kind: type[T]) -> T | None:
    try:
        return parse(kind, where.read(name), f"{where.name}/{name}")
    except NotFoundError:
        return None
