"""Reading a features folder: its Parquet files, and the files of activations, after a check that they belong to it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gsae.errors import CorruptError, IncompatibleError, NotFoundError

from .features_json import FACTS, FeatureFacts
from .firings import Ints
from .parquet import arrow
from .stamp import read_stamp


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a file as a pyarrow ParquetFile. Raises NotFoundError, and CorruptError where reading it fails."""
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


def activation_files(folder: Path, facts: FeatureFacts) -> list[Path]:
    """Return the files of activations/ in order.

    Raises NotFoundError where they were deleted, CorruptError for one that cannot be read, and IncompatibleError where
    a later `gsae features`, stopped before its end, wrote those of another SAE, store or split. A missing file is not
    noticed here; compare the counts with `rows_fired`.
    """
    files = sorted((folder / "activations").glob("*.safetensors"))
    if not files:
        raise NotFoundError(
            f"{folder / 'activations'} was deleted. Run `gsae features {folder.parent.parent}` to write it again."
        )
    wanted = {"weights_sha256": facts.weights_sha256, "store_digest": facts.store_digest, "split": facts.split}
    for file in files:
        header = read_stamp(file)
        if header is None:
            raise CorruptError(f"{file} cannot be read. Delete it and run `gsae features` again.")
        origin = json.loads(header.get("gsae", "{}"))
        if not wanted.items() <= origin.items():
            raise IncompatibleError(f"{file} is not what {folder / FACTS} describes. Run `gsae features` again.")
    return files
