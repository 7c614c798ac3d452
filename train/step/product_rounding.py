"""What a GPU may round in matrix products, for some of them and for nothing else.

torch has one switch each for all products of a process. tf32, left on, also rounds what the step computes exactly: the
shift by b_dec, the gradient of b_dec, and metrics on held-out rows.
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


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Let products of bfloat16 matrices on a GPU be added up in float32 throughout, as bounds of their error assume.

    By default parts of a long sum may be rounded to bfloat16 before they are added.
    """
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
