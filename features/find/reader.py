"""A features folder as its readers open it: whole, of a schema that is known, its activations those of its figures."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from gsae.errors import CorruptError, IncompatibleError, NotFoundError

from .find_features import FACTS, SCHEMA
from .firings import Ints
from .parquet import arrow


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the features.json of RUN/features/NAME.

    Raises NotFoundError where there is none or it is not finished, CorruptError and IncompatibleError (newer schema).
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        run = folder.parent.parent
        raise NotFoundError(
            f"{folder} has no features, or none that are whole. Run `gsae features {run}` first."
        ) from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}. Delete it and run `gsae features` again.") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("schema"), int):
        raise CorruptError(f"{path} is no features.json. Delete it and run `gsae features` again.")
    if facts["schema"] > SCHEMA:
        raise IncompatibleError(f"{path} has schema {facts['schema']}, this gsae reads up to {SCHEMA}: update gsae.")
    return facts


def public(name: str) -> str:
    """Return a model's or a text's name as others may see it: of a path of this machine only the last part."""
    return Path(name).name if name.startswith(("/", "~", "\\")) else name


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a file as a pyarrow ParquetFile; raises NotFoundError, and CorruptError for what is wrong as it is read."""
    pa, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise NotFoundError(f"{path} is not there. Run `gsae features` again.") from None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise damaged(path, str(error).strip("'\"")) from None


def damaged(path: Path, why: str) -> CorruptError:
    """Return the error for a file of a features folder that does not hold what it should."""
    return CorruptError(f"{path} is damaged ({why}). Delete {path.parent} and run `gsae features` again.")


def rows_fired(folder: Path) -> Ints:
    """Return on how many rows each latent fires, (d_sae,), from latents.parquet."""
    with reading(folder / "latents.parquet") as latents:
        return np.asarray(latents.read(["rows"])["rows"].to_numpy(), np.int64)


def activation_files(folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Return the files of activations/ in order.

    Raises NotFoundError where they were deleted, IncompatibleError where a later `gsae features`, stopped before its
    end, wrote those of another SAE, store or split. That none is missing is seen from `rows_fired`.
    """
    files = sorted((folder / "activations").glob("*.safetensors"))
    if not files:
        raise NotFoundError(
            f"{folder / 'activations'} was deleted. `gsae features {folder.parent.parent}` writes it again."
        )
    wanted = {key: str(facts[key]) for key in ("weights_sha256", "store_digest", "split")}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                made_of = json.loads((opened.metadata() or {}).get("gsae", "{}"))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CorruptError(f"{file} cannot be read: {error}. Delete it and run `gsae features` again.") from None
        if not wanted.items() <= made_of.items():
            raise IncompatibleError(f"{file} is not what {folder / FACTS} describes. Run `gsae features` again.")
    return files
