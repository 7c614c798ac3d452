"""Rows as they are stored, scaled and centred on a GPU in one pass, with their sum of squares."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernel is typed by Triton.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import row_in_registers


def centred(rows: Tensor, scale: float, centre: Tensor) -> tuple[Tensor, Tensor]:
    """scale * rows - centre (rows, d_in) float32, and the sum of its squares, () float64; rows of any float type."""
    count, d_in = rows.shape
    x, squares = torch.empty_like(rows, dtype=torch.float32), torch.empty(count, device=rows.device)
    _centred[(count,)](rows, centre, x, squares, scale, d_in, **row_in_registers(d_in))
    return x, squares.sum(dtype=torch.float64)


@triton.jit
def _centred(rows, centre, x, squares, scale, d_in: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    raw = tl.load(rows + row * d_in + k, mask=inside, other=0.0).to(tl.float32)
    value = raw * scale - tl.load(centre + k, mask=inside, other=0.0)
    tl.store(x + row * d_in + k, value, mask=inside)
    tl.store(squares + row, tl.sum(tl.where(inside, value * value, 0.0), 0))
