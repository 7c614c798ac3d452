"""What a GPU may round in matrix products, for some of them and for nothing else.

torch has one switch each for all products of a process. tf32, left on, also rounds what the step computes exactly: the
shift by b_dec, the gradient of b_dec, and metrics on held-out rows.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def products_in_tf32(wanted: bool) -> AbstractContextManager[None]:
    """Let products of float32 matrices on a GPU be rounded to tf32, or not, meanwhile."""
    return _switched("allow_tf32", wanted)


def sums_in_float32() -> AbstractContextManager[None]:
    """Let products of bfloat16 matrices on a GPU be added up in float32 throughout, as bounds of their error assume.

    By default parts of a long sum may be rounded to bfloat16 before they are added.
    """
    return _switched("allow_bf16_reduced_precision_reduction", False)


@contextmanager
def _switched(name: str, value: bool) -> Iterator[None]:
    """Set a switch of torch's products on a GPU meanwhile."""
    before = getattr(torch.backends.cuda.matmul, name)
    setattr(torch.backends.cuda.matmul, name, value)
    try:
        yield
    finally:
        setattr(torch.backends.cuda.matmul, name, before)
