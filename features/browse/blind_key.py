"""key.json of a blind comparison: which SAE and latent each trial shows. A judge must not look at it before the end."""

import json
from pathlib import Path

from pydantic import ValidationError

from gsae.errors import CorruptError, NotFoundError
from gsae.files import replace_text
from gsae.settings import Contract, first_fault

KEY = "key.json"


class Trial(Contract):
    """One latent to judge. sae: 0 or 1, an index into `BlindKey.saes`. pair: of which it is one half."""

    pair: int
    sae: int
    latent: int


class BlindKey(Contract):
    """What is compared, and which latent each trial shows.

    saes: the two names; differences are the first SAE's mean minus the second's.
    """

    saes: tuple[str, str]
    architectures: tuple[str, str]
    weights_sha256: tuple[str, str]
    seed: int
    minimum_rows: int
    trials: tuple[Trial, ...]


def write_key(folder: Path, key: BlindKey) -> None:
    """Replace the key.json of a comparison's folder."""
    replace_text(folder / KEY, json.dumps(key.model_dump(), indent=2) + "\n")


def read_key(folder: Path) -> BlindKey:
    """Return the key.json of a comparison's folder. Raises NotFoundError and CorruptError."""
    path = folder / KEY
    try:
        return BlindKey.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{folder} is no blind comparison. `gsae browse RUN --blind` makes one.") from None
    except ValidationError as error:
        raise CorruptError(f"{path}: {first_fault(error)}.") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}.") from None
