"""tf32 for the large matrix products of a GPU's dense step, and for nothing else.

torch has one switch for all products of a process. Left on, it also rounds what the step computes exactly: the shift by
b_dec, the gradient of b_dec, and metrics on held-out rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in_tf32(wanted: bool) -> Iterator[None]:
    """Let products of float32 matrices on a GPU be rounded to tf32, or not, meanwhile."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
