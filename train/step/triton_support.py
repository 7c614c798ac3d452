"""What all kernels of a GPU share: their grids and the width of a row in registers.

Block sizes, warps and stages are constants. Autotuning would choose them by time, and with them the order of sums.
"""

from typing import Any

import triton

# Whether products and sums are fused is fixed too: Triton's default changes with its version.
FIXED: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def blocks(count: int, size: int) -> tuple[int]:
    """The grid of a kernel whose programs take `size` of `count` things each."""
    return (triton.cdiv(count, size),)


def row_in_registers(d_in: int, warps: int = 8) -> dict[str, Any]:
    """The constants of a kernel that holds whole rows of d_in numbers: their width in registers, and its warps.

    warps: the most it may have; 16 for one that holds so many rows that two programs do not fit a multiprocessor.
    """
    width = triton.next_power_of_2(d_in)
    return {**FIXED, "WIDTH": width, "num_warps": max(1, min(warps, width // 256))}
