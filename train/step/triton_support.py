"""What the kernels of a GPU share: their grids, the width of a row in registers, and how bits are counted.

Block sizes, warps and stages are constants. Autotuning would choose them by time, and with them the order of sums.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The kernel is typed by Triton.

from typing import Any

import triton
import triton.language as tl

NEAR = tl.constexpr(2.0**-20)  # of a bias, the largest error of adding it
TINY = tl.constexpr(1e-30)  # far above the error of flushing subnormal numbers to zero
# Whether products and sums are fused is fixed too: Triton's default changes with its version.
FIXED: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def blocks(count: int, size: int) -> tuple[int]:
    """The grid of a kernel whose programs take `size` of `count` things each."""
    return (triton.cdiv(count, size),)


def row_in_registers(d_in: int, warps: int | None = None) -> dict[str, Any]:
    """The constants of a kernel that holds whole rows of d_in numbers: their width in registers, and its warps.

    warps: the most it may have; 16 for one that holds so many rows that two programs do not fit a multiprocessor. None
    for 8, and 16 for rows of over 4,096 numbers.
    """
    width = triton.next_power_of_2(d_in)
    warps = warps or (8 if width <= 4096 else 16)
    return {**FIXED, "WIDTH": width, "num_warps": max(1, min(warps, width // 256))}


@triton.jit
def ones(bits):
    """The number of bits that are set in each of some words (uint32)."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits & 0x3F).to(tl.int32)
