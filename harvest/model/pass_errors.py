"""What an exception in a model's pass means: out of memory, or something that the model's code cannot do.

Memory has its own handling (`batch_size.py`), so its errors pass. Any other error of the model's code becomes one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gsae.errors import GsaeError, UsageError
from gsae.harvest.hub import one_line


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of a pass means that the GPU or the CPU ran out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("not enough memory", "out of memory"))
    )


@contextmanager
def pass_errors(model: Any, shape: torch.Size, expected: type[Exception]) -> Iterator[None]:
    """Turn an error of the model's pass over tokens of a shape into a UsageError of one line.

    Errors of gsae and of memory pass, and `expected` ones.
    """
    try:
        yield
    except (GsaeError, expected):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"The pass of {type(model).__name__} over tokens of shape {tuple(shape)} fails: "
            f"{type(error).__name__}: {one_line(error)}."
        ) from error
