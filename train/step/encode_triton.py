"""The encoder product of a GPU's sparse step with the mask as its epilogue: no product is written to memory.

At 65,536 latents and 4,096 rows the product has 512 MB in bfloat16, its mask 34 MB. Whether this beats cuBLAS followed
by a pass over its result depends on the GPU (`crossovers.FUSED_ENCODER`). Sums are float32 to the end here, so the
margin need not cover the rounding of the product, and fewer gates have to be decided.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernels are typed by Triton.

import triton
import triton.language as tl
from torch import Tensor

from .triton_support import FIXED, NEAR, TINY, blocks, ones

LATENTS, ROWS, DEPTH = 128, 128, 64  # the tile of a program, and columns of both matrices at a time
ALIGNED = 8  # numbers of bfloat16 that rows of both matrices must begin at a multiple of
OPTIONS = {**FIXED, "num_warps": 8, "num_stages": 4}
COUNTED = 8  # latents that a program of `_count` takes


def masked_product(
    W_enc: Tensor, factors: tuple[Tensor, Tensor], low: Tensor, gate: Tensor, norms: Tensor, masks: Tensor,
    counts: Tensor,
) -> None:  # fmt: skip
    """Fill `masks` (saes * d_sae, words) with the gates that may be open, and `counts` (saes * d_sae) with how many.

    W_enc (saes, d_sae, d_in) and low (saes, rows, d_in), bfloat16: encoders and inputs; d_in must be a multiple of
    `ALIGNED`. factors: of the margin, two of (saes, d_sae). gate (saes, d_sae): biases. norms (2, saes, rows): of the
    inputs, and of what rounding left of them.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # of newer versions of Triton

    interpreted = not low.is_cuda  # Triton's interpreter cannot multiply bfloat16
    (saes, rows, d_in), d_sae, words = low.shape, gate.shape[1], masks.shape[1]
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(d_sae, LATENTS)
    _masked_product[(tiles, saes)](
        TensorDescriptor.from_tensor(W_enc.view(-1, d_in), [LATENTS, DEPTH]),
        TensorDescriptor.from_tensor(low.view(-1, d_in), [ROWS, DEPTH]),
        gate, *factors, norms[0], norms[1], masks, d_sae, rows, words, d_in, interpreted,
        LATENTS, ROWS, DEPTH, **OPTIONS,
    )  # fmt: skip
    width = triton.next_power_of_2(words)
    _count[blocks(saes * d_sae, COUNTED)](masks, counts, saes * d_sae, words, COUNTED, width, **FIXED)


@triton.jit
def _masked_product(
    W_enc, low, gate, by_norm, by_rest, norms, rests, masks, d_sae, rows, words, d_in: tl.constexpr,
    interpreted: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(rows, ROWS)
    # Neighbours share a tile of W_enc, which is read from memory once; all of `low` stays in the cache.
    first_row, first = tl.program_id(0) % across * ROWS, tl.program_id(0) // across * LATENTS
    sae = tl.program_id(1)
    total = tl.zeros((LATENTS, ROWS), tl.float32)
    for k in range(0, d_in, DEPTH):
        w = W_enc.load([sae * d_sae + first, k])
        x = low.load([sae * rows + first_row, k])
        if interpreted:
            total = tl.dot(w.to(tl.float32), x.to(tl.float32).T, total, input_precision="ieee")
        else:
            total = tl.dot(w, x.T, total)
    latent, row = first + tl.arange(0, LATENTS), first_row + tl.arange(0, ROWS)
    i, at = sae.to(tl.int64) * d_sae + latent, sae.to(tl.int64) * rows + row
    here, there = latent < d_sae, row < rows
    bias = tl.load(gate + i, mask=here, other=0.0)
    raised = (bias + tl.abs(bias) * NEAR + TINY)[:, None]
    margin = tl.load(norms + at, mask=there, other=0.0)[None, :] * tl.load(by_norm + i, mask=here, other=0.0)[:, None]
    margin += tl.load(rests + at, mask=there, other=0.0)[None, :] * tl.load(by_rest + i, mask=here, other=0.0)[:, None]
    inside = here[:, None] & there[None, :]
    maybe = tl.where((total + margin + raised <= 0) | (inside == 0), 0, 1)
    bits = tl.reshape(maybe, (LATENTS, ROWS // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = first_row // 32 + tl.arange(0, ROWS // 32)
    tl.store(masks + i[:, None] * words + word[None, :], tl.sum(bits, 2), mask=here[:, None] & (word < words)[None, :])


@triton.jit
def _count(masks, counts, latents, words, COUNTED: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COUNTED + tl.arange(0, COUNTED)
    word = tl.arange(0, WIDTH)
    inside = (i < latents)[:, None] & (word < words)[None, :]
    bits = tl.load(masks + i[:, None] * words + word[None, :], mask=inside, other=0)
    tl.store(counts + i, tl.sum(ones(bits.to(tl.uint32, bitcast=True)), 1), mask=i < latents)
