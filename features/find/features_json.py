"""features.json: what a features folder was made from. The only place that knows its keys.

It is written last, so a folder that has it is complete. The keys stand in the file in the order of the fields here.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.files import replace_text
from gsae.settings import Contract, first_fault
from gsae.store import Split

FACTS = "features.json"
SCHEMA = 1


class FeatureFacts(Contract):
    """The contents of features.json: which SAE, which rows, and how much is kept of each latent."""

    schema_version: int = Field(alias="schema")
    sae: str
    architecture: str
    d_in: int
    d_sae: int
    weights_sha256: str
    site: str
    module: str
    hook_name: str
    model: str
    dataset: str
    store_digest: str
    context_size: int
    split: Split
    rows: int
    rows_skipped: int
    contexts: int
    top: int
    quantiles: int
    samples: int
    bins: int
    neighbours: int
    logits: int
    has_tokens: bool
    has_logits: bool

    def values(self) -> dict[str, Any]:
        """Return the keys and values of the file, in its order."""
        return self.model_dump(by_alias=True)


def write_facts(folder: Path, facts: FeatureFacts) -> None:
    """Replace the features.json of a features folder."""
    replace_text(folder / FACTS, json.dumps(facts.values(), indent=2, allow_nan=False) + "\n")


def read_facts(folder: Path) -> FeatureFacts:
    """Return the features.json of RUN/features/NAME.

    Raises NotFoundError where there is none because the search did not finish, CorruptError, and IncompatibleError for
    a newer schema.
    """
    path, again = folder / FACTS, "Delete it and run `gsae features` again."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        run = folder.parent.parent
        raise NotFoundError(f"{folder} has no complete features. Run `gsae features {run}` first.") from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}. {again}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise IncompatibleError(f"{path} has schema {schema}, this gsae reads up to {SCHEMA}: update gsae.")
    try:
        return FeatureFacts.model_validate(found)
    except ValidationError as error:
        raise CorruptError(f"{path}: {first_fault(error)}. {again}") from None
