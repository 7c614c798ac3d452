"""What a safetensors file was made from, noted in its header, so that a later run knows whether to keep the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors


def stamp(origin: Mapping[str, Any]) -> dict[str, str]:
    """Return the header entry for a file that was made from `origin`; safetensors would write several in any order."""
    return {"gsae": json.dumps(origin, sort_keys=True)}


def read_stamp(file: Path) -> dict[str, str] | None:
    """Return the header entries of a file, None where it is not there or cannot be read."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return dict(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return None
