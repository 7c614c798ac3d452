"""The passes between the matrix products of a dense step, compiled for the CPU: the twins of `dense_plain`.

Each is one pass over memory. Sums are float32; operands are float32 or bfloat16. Every sum has one order, for any
compiler and any number of threads, so these functions never change a bit of a run.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# The loops are typed by numba, for float32 and for the words of bfloat16 alike.

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .compiling import array, compiled, load, store, total
from .latent_vectors import GatedVectors, ReluVectors, Vectors

BLOCK = 32  # latents, or rows, that a thread takes at a time
ZERO = np.float32(0)


# -- gates


def forward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `dense_plain.forward`."""
    rows = pre.shape[2]
    fired, sums = torch.empty_like(shift, dtype=torch.int32), torch.empty_like(shift)
    match vectors:
        case GatedVectors():
            opened = torch.empty_like(fired)
            _gated_forward(
                array(pre.view(-1, rows)), _flat(shift), *_gated_arrays(vectors), array(acts.view(2, -1, rows)),
                _flat(fired), _flat(opened), _flat(sums),
            )  # fmt: skip
            return fired, opened, sums
        case ReluVectors(b_enc):
            arrays = array(pre.view(-1, rows)), _flat(b_enc - shift), array(acts.view(-1, rows))
            _relu_forward(*arrays, _flat(fired), _flat(sums))
            return fired, fired, sums


def backward(pre: Tensor, shift: Tensor, vectors: Vectors, acts: Tensor, l1: Tensor) -> tuple[Tensor, Vectors]:
    """As `dense_plain.backward`."""
    rows = pre.shape[2]
    match vectors:
        case GatedVectors():
            sums = shift.new_empty((4, *shift.shape))
            _gated_backward(
                array(pre.view(-1, rows)), _flat(shift), *_gated_arrays(vectors), array(acts.view(2, -1, rows)),
                l1.numpy(), sums.view(4, -1).numpy(),
            )  # fmt: skip
            return sums[0], GatedVectors(b_gate=sums[1], b_mag=sums[2], r_mag=sums[3])
        case ReluVectors(b_enc):
            da = torch.empty_like(shift)
            arrays = array(pre.view(-1, rows)), _flat(b_enc - shift), array(acts.view(-1, rows))
            _relu_backward(*arrays, l1.numpy(), _flat(da))
            return da, ReluVectors(b_enc=da)


def _gated_arrays(vectors: GatedVectors) -> tuple[Any, Any, Any]:
    """b_gate, b_mag and the rescaling exp(r_mag), one number for each latent of all SAEs."""
    return _flat(vectors.b_gate), _flat(vectors.b_mag), _flat(vectors.r_mag.exp())


def _flat(tensor: Tensor) -> Any:
    return tensor.reshape(-1).numpy()


def _loop_gated_forward(pre, shift, b_gate, b_mag, rate, acts, fired, opened, sums):
    latents, rows = pre.shape
    for block in numba.prange(-(-latents // BLOCK)):
        gates = np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            c, bg, bm, scale = shift[j], b_gate[j], b_mag[j], rate[j]
            count, shown = np.int32(0), np.int32(0)
            for r in range(rows):
                a = load(pre[j, r]) - c
                gate, mag = a + bg, scale * a + bm
                gate = ZERO if gate <= ZERO else gate
                f = ZERO if mag <= ZERO else mag
                f = f if gate > ZERO else gate  # a NaN gate stays one
                acts[0, j, r] = store(f, acts[0, j, r])
                acts[1, j, r] = store(gate, acts[1, j, r])
                gates[r] = gate
                count += np.int32(f > ZERO)
                shown += np.int32(gate > ZERO)
            fired[j], opened[j], sums[j] = count, shown, total(gates)


def _loop_relu_forward(pre, bias, acts, fired, sums):
    latents, rows = pre.shape
    for block in numba.prange(-(-latents // BLOCK)):
        values = np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            b = bias[j]
            count = np.int32(0)
            for r in range(rows):
                f = load(pre[j, r]) + b
                f = ZERO if f <= ZERO else f
                acts[j, r] = store(f, acts[j, r])
                values[r] = f
                count += np.int32(f > ZERO)
            fired[j], sums[j] = count, total(values)


def _loop_gated_backward(pre, shift, b_gate, b_mag, rate, acts, l1, sums):
    latents, rows = pre.shape
    d_sae = latents // len(l1)
    for block in numba.prange(-(-latents // BLOCK)):
        gates, mags, rates = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            c, bg, bm, scale, penalty = shift[j], b_gate[j], b_mag[j], rate[j], l1[j // d_sae]
            for r in range(rows):
                a = load(pre[j, r]) - c
                magnified = scale * a
                opened = a + bg > ZERO
                d_gate = load(acts[1, j, r]) + penalty
                d_gate = d_gate if opened else ZERO
                d_mag = load(acts[0, j, r])
                d_mag = d_mag if opened else ZERO
                d_mag = d_mag if magnified + bm > ZERO else ZERO
                pre[j, r] = store(scale * d_mag + d_gate, pre[j, r])
                gates[r] = d_gate
                mags[r] = d_mag
                rates[r] = d_mag * magnified
            sums[1, j], sums[2, j], sums[3, j] = total(gates), total(mags), total(rates)
            sums[0, j] = scale * sums[2, j] + sums[1, j]


def _loop_relu_backward(pre, bias, acts, l1, sums):
    latents, rows = pre.shape
    d_sae = latents // len(l1)
    for block in numba.prange(-(-latents // BLOCK)):
        values = np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            b, penalty = bias[j], l1[j // d_sae]
            for r in range(rows):
                da = load(acts[j, r]) + penalty
                da = da if load(pre[j, r]) + b > ZERO else ZERO
                pre[j, r] = store(da, pre[j, r])
                values[r] = da
            sums[j] = total(values)


# -- errors


def errors(recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `dense_plain.errors`."""
    _, saes, rows, d_in = recon.shape
    blocks = -(-rows // BLOCK)
    columns, sums = x.new_empty(saes, blocks, d_in), x.new_empty(saes, blocks, 4)
    _errors(array(recon), x.numpy(), offset.numpy(), centre.numpy(), columns.numpy(), sums.numpy())
    return columns.sum(1), sums.sum(1, dtype=torch.float64)


def _loop_errors(recon, x, offset, centre, columns, sums):
    copies, saes, rows, d_in = recon.shape
    blocks = columns.shape[1]
    factor = np.float32(2 / rows)
    for task in numba.prange(saes * blocks):
        s, block = task // blocks, task % blocks
        column = columns[s, block]
        column[:] = ZERO
        parts = np.zeros((4, d_in), np.float32)
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            for k in range(d_in):
                whole = x[r, k] + centre[k]
                e = load(recon[0, s, r, k]) + (offset[s, k] - x[r, k])
                x_hat = e + whole
                parts[0, k] += e * e
                parts[2, k] += x_hat * x_hat
                parts[3, k] += x_hat * whole
                column[k] += e * factor
                recon[0, s, r, k] = store(e * factor, recon[0, s, r, k])
            if copies == 2:
                for k in range(d_in):
                    e = load(recon[1, s, r, k]) + (offset[s, k] - x[r, k])
                    parts[1, k] += e * e
                    recon[1, s, r, k] = store(e * factor, recon[1, s, r, k])
        for part in range(4):
            sums[s, block, part] = total(parts[part])


_gated_forward = compiled(_loop_gated_forward)
_relu_forward = compiled(_loop_relu_forward)
_gated_backward = compiled(_loop_gated_backward)
_relu_backward = compiled(_loop_relu_backward)
_errors = compiled(_loop_errors)
