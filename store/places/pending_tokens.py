"""What is known of a store that has no plan yet: what its tokens are made from and, once written, what they are.

The plan needs the language model; tokens need only its tokenizer, and may be made days before, on another machine.
Until plan.json takes their place, two small files in `tokens/` stand for it: `begun.json`, published before the first
token, so that a command with other settings is refused, and `made.json`, published after the last. The parts that a
harvest keeps there meanwhile are its own affair.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gsae.errors import NotFoundError
from gsae.files import publish_bytes
from gsae.store.format.plan import (
    ContextsSpec,
    Count,
    DatasetSource,
    Frozen,
    Positive,
    T,
    TokenizerSource,
    canonical_json,
    parse,
)

from .folder import Folder, Place

TOKENS = "tokens"
TOKENS_ONLY, UNFINISHED_TOKENS = "tokens only", "unfinished tokens"
TOKENS_BEGUN, TOKENS_MADE = f"{TOKENS}/begun.json", f"{TOKENS}/made.json"


class TokensPlan(Frozen):
    """Everything that determines the tokens of a store; each field is as in its plan."""

    schema_version: str
    tokenizer: TokenizerSource
    dataset: DatasetSource
    context_size: Annotated[int, Field(ge=2, le=2**24)]
    requested_rows: Positive | None
    heldout: Annotated[float, Field(ge=0, lt=1)]
    dropped_positions: tuple[Count, ...]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    versions: dict[str, str]


class TokensMade(Frozen):
    """The finished tokens, and the rows that they give."""

    schema_version: str
    contexts: ContextsSpec
    rows: Count
    heldout_rows: Count


def write_tokens_plan(root: Path, plan: TokensPlan) -> None:
    """Publish what the tokens of `root` are made from; raises IncompatibleError where others were begun."""
    publish_bytes(root, TOKENS_BEGUN, canonical_json(plan.model_dump(mode="json")))


def write_tokens_made(root: Path, made: TokensMade) -> None:
    """Publish what the finished tokens of `root` are."""
    publish_bytes(root, TOKENS_MADE, canonical_json(made.model_dump(mode="json")))


def read_tokens(where: Place | Path) -> tuple[TokensPlan | None, TokensMade | None]:
    """Return what the tokens of a store without a plan are made from and what they are; None for what is not there."""
    where = Folder(where) if isinstance(where, Path) else where
    return _read(where, TOKENS_BEGUN, TokensPlan), _read(where, TOKENS_MADE, TokensMade)


def clear_tokens(root: Path) -> None:
    """Remove all of `tokens/`: the store has a plan, which says the same."""
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
