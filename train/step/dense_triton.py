"""The passes between the matrix products of a dense step, for GPUs: the twins of `dense_plain`, in float32.

Each is one pass over memory: where `dense_plain` moves about 257 bytes for a latent and a row, these move 20 to 28. A
program owns its latents, or its rows, from the first number to the last: it adds up in one order and writes to places
of its own. There are no atomics and no tuning by time, so one kind of GPU gives the same bytes in every run.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernels are typed by Triton.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_vectors import GatedVectors, ReluVectors, Vectors
from .triton_support import FIXED, blocks

LATENTS, ACROSS = 4, 256  # the tile of a program of `_forward` and `_backward`: latents, and rows at a time
ROWS, COLUMNS = 8, 128  # the tile of a program of `_errors`: rows, and columns at a time
SUMS = 4  # numbers that `_errors` adds up


def forward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `dense_plain.forward`."""
    latents, rows = shift.numel(), pre.shape[2]
    fired, penalty = torch.empty_like(shift, dtype=torch.int32), torch.empty_like(shift)
    gated = isinstance(vectors, GatedVectors)
    opened = torch.empty_like(fired) if gated else fired
    _forward[blocks(latents, LATENTS)](
        pre, shift, *_arrays(vectors), acts[0], acts[-1], fired, opened, penalty, latents, rows, gated, LATENTS, ACROSS,
        **FIXED,
    )  # fmt: skip
    return fired, opened, penalty


def errors(recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `dense_plain.errors`."""
    copies, saes, rows, d_in = recon.shape
    count = triton.cdiv(rows, ROWS)
    columns = recon.new_empty((saes, count, d_in), dtype=torch.float32)
    sums = recon.new_empty((saes, count, SUMS), dtype=torch.float64)
    _errors[(count, saes)](
        recon[0], recon[-1], x, offset, centre, columns, sums, rows, d_in, copies == 2, ROWS, COLUMNS, **FIXED
    )
    return columns.sum(1), sums.sum(1)


def backward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor, l1: Tensor) -> tuple[Tensor, Vectors]:
    """As `dense_plain.backward`."""
    (saes, d_sae), rows = shift.shape, pre.shape[2]
    sums = shift.new_empty((4, saes, d_sae))
    gated = isinstance(vectors, GatedVectors)
    _backward[blocks(shift.numel(), LATENTS)](
        pre, shift, *_arrays(vectors), acts[0], acts[-1], l1, *sums, saes * d_sae, d_sae, rows, gated, LATENTS, ACROSS,
        **FIXED,
    )  # fmt: skip
    return sums[0], GatedVectors(sums[1], sums[2], sums[3]) if gated else ReluVectors(sums[0])


def _arrays(vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors that kernels read; of the baseline, which has one, it stands for all three."""
    match vectors:
        case GatedVectors(b_gate, b_mag, r_mag):
            return b_gate, b_mag, r_mag
        case ReluVectors(b_enc):
            return b_enc, b_enc, b_enc


@triton.jit
def relu(value):
    """The positive part; a NaN stays one."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def _forward(
    pre, shift, gate, magnitude, rescaling, features, positive, fired, opened, penalty, latents, rows,
    gated: tl.constexpr, LATENTS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    here = i < latents
    moved = tl.load(shift + i, mask=here, other=0.0)[:, None]
    bias = tl.load(gate + i, mask=here, other=0.0)[:, None]
    if gated:
        second = tl.load(magnitude + i, mask=here, other=0.0)[:, None]
        rate = tl.exp(tl.load(rescaling + i, mask=here, other=0.0))[:, None]
    firing = tl.zeros((LATENTS, ACROSS), tl.int32)
    opening = tl.zeros((LATENTS, ACROSS), tl.int32)
    total = tl.zeros((LATENTS, ACROSS), tl.float32)
    for first in range(0, rows, ACROSS):
        r = first + tl.arange(0, ACROSS)
        inside = here[:, None] & (r < rows)[None, :]
        at = i[:, None] * rows + r[None, :]
        a = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32) - moved
        gates = relu(a + bias)
        f = gates
        if gated:
            f = tl.where(gates == 0, 0.0, relu(rate * a + second))
            f = tl.where(gates != gates, gates, f)
            tl.store(positive + at, gates.to(positive.dtype.element_ty), mask=inside)
        tl.store(features + at, f.to(features.dtype.element_ty), mask=inside)
        firing += ((f > 0) & inside).to(tl.int32)
        opening += ((gates > 0) & inside).to(tl.int32)
        total += tl.where(inside, gates, 0.0)
    tl.store(fired + i, tl.sum(firing, 1), mask=here)
    tl.store(penalty + i, tl.sum(total, 1), mask=here)
    if gated:
        tl.store(opened + i, tl.sum(opening, 1), mask=here)


@triton.jit
def _errors(
    recon, other, x, offset, centre, columns, sums, rows, d_in, two: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    block, sae, count = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    r = block * ROWS + tl.arange(0, ROWS)
    factor = 2.0 / rows
    error = tl.zeros((ROWS, COLUMNS), tl.float32)
    auxiliary = tl.zeros((ROWS, COLUMNS), tl.float32)
    norm = tl.zeros((ROWS, COLUMNS), tl.float32)
    inner = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, d_in, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        wide = k < d_in
        inside = (r < rows)[:, None] & wide[None, :]
        at = r.to(tl.int64)[:, None] * d_in + k[None, :]
        of_sae = sae * rows * d_in + at
        own = tl.load(x + at, mask=inside, other=0.0)
        moved = tl.load(offset + sae * d_in + k, mask=wide, other=0.0)[None, :] - own
        e = tl.where(inside, tl.load(recon + of_sae, mask=inside, other=0.0).to(tl.float32) + moved, 0.0)
        whole = own + tl.load(centre + k, mask=wide, other=0.0)[None, :]
        x_hat = tl.where(inside, e + whole, 0.0)
        error += e * e
        norm += x_hat * x_hat
        inner += x_hat * whole
        e *= factor
        tl.store(recon + of_sae, e.to(recon.dtype.element_ty), mask=inside)
        tl.store(columns + (sae * count + block) * d_in + k, tl.sum(e, 0), mask=wide)
        if two:
            e = tl.where(inside, tl.load(other + of_sae, mask=inside, other=0.0).to(tl.float32) + moved, 0.0)
            auxiliary += e * e
            tl.store(other + of_sae, (e * factor).to(other.dtype.element_ty), mask=inside)
    out = sums + (sae * count + block) * 4
    tl.store(out, tl.sum(tl.sum(error, 1).to(tl.float64), 0))
    tl.store(out + 1, tl.sum(tl.sum(auxiliary, 1).to(tl.float64), 0))
    tl.store(out + 2, tl.sum(tl.sum(norm, 1).to(tl.float64), 0))
    tl.store(out + 3, tl.sum(tl.sum(inner, 1).to(tl.float64), 0))


@triton.jit
def _backward(
    pre, shift, gate, magnitude, rescaling, by_features, by_positive, l1, sum_da, sum_gate, sum_magnitude, sum_rate,
    latents, d_sae, rows, gated: tl.constexpr, LATENTS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    here = i < latents
    moved = tl.load(shift + i, mask=here, other=0.0)[:, None]
    bias = tl.load(gate + i, mask=here, other=0.0)[:, None]
    penalty = tl.load(l1 + i // d_sae, mask=here, other=0.0)[:, None]
    if gated:
        second = tl.load(magnitude + i, mask=here, other=0.0)[:, None]
        rate = tl.exp(tl.load(rescaling + i, mask=here, other=0.0))[:, None]
    by_product = tl.zeros((LATENTS, ACROSS), tl.float32)
    by_gate = tl.zeros((LATENTS, ACROSS), tl.float32)
    by_magnitude = tl.zeros((LATENTS, ACROSS), tl.float32)
    by_rate = tl.zeros((LATENTS, ACROSS), tl.float32)
    for first in range(0, rows, ACROSS):
        r = first + tl.arange(0, ACROSS)
        inside = here[:, None] & (r < rows)[None, :]
        at = i[:, None] * rows + r[None, :]
        a = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32) - moved
        opened = (a + bias > 0) & inside
        by_f = tl.load(by_features + at, mask=inside, other=0.0).to(tl.float32)
        if gated:
            other = tl.load(by_positive + at, mask=inside, other=0.0).to(tl.float32)
            d_gate = tl.where(opened, other + penalty, 0.0)
            d_magnitude = tl.where(opened & (rate * a + second > 0), by_f, 0.0)
            da = rate * d_magnitude + d_gate
            by_gate += d_gate
            by_magnitude += d_magnitude
            by_rate += d_magnitude * rate * a
        else:
            da = tl.where(opened, by_f + penalty, 0.0)
        tl.store(pre + at, da.to(pre.dtype.element_ty), mask=inside)
        by_product += da
    tl.store(sum_da + i, tl.sum(by_product, 1), mask=here)
    if gated:
        tl.store(sum_gate + i, tl.sum(by_gate, 1), mask=here)
        tl.store(sum_magnitude + i, tl.sum(by_magnitude, 1), mask=here)
        tl.store(sum_rate + i, tl.sum(by_rate, 1), mask=here)
