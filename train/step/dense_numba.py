"""The work between a dense step's matrix products, and Adam for its weight matrices, as one pass over memory each.

Compiled by numba for the CPU, float32 sums, operands in float32 or bfloat16 (read as their bits). Every sum has one
order, whatever the compiler and the number of threads, so these functions never change a bit of a run. The twins in
`elementwise` and `optim`, in plain torch, are what tests compare with and what other devices use.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# The loops are typed by numba, for float32 and for the words of bfloat16 alike.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

BLOCK = 32  # latents, or rows, that a thread takes at a time
ZERO = np.float32(0)


def usable(operands: Tensor) -> bool:
    """Whether the compiled functions take this stack's tensors."""
    return operands.device.type == "cpu" and operands.dtype in (torch.float32, torch.bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use so many threads, or as many as there are."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _compiled(function: Callable[..., None]) -> Any:
    # No fast math: numba optimises code once more when it caches it, so sums in an order that the compiler may choose
    # would differ between the process that compiled them and the next; and a NaN must be seen.
    return numba.njit(parallel=True, cache=True, error_model="numpy")(function)


def _array(tensor: Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


# What loops below read and write numbers with: arrays of floats as they are, of 16-bit words as bfloat16.
def _load(value):
    raise NotImplementedError


def _store(value, like):
    raise NotImplementedError


def _load_as(value):
    if value == numba.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _store_as(value, like):
    if like == numba.uint16:  # to the nearest, ties to even

        def rounded(value, like):
            bits = np.float32(value).view(np.uint32)
            up = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            # Rounding up must not turn a NaN into an infinity or a zero.
            return np.uint16(0x7FC0) if value != value else np.uint16(up >> np.uint32(16))

        return rounded
    return lambda value, like: value


overload(_load)(_load_as)
overload(_store)(_store_as)


def _add_up(values):
    """The sum of a float array, which is overwritten: halves onto halves, so the order is fixed and vectors fit."""
    left = len(values)
    while left > 1:
        half = left // 2
        front, back = values[:half], values[left - half : left]
        for i in range(half):
            front[i] += back[i]
        left -= half
    return values[0]


_total = numba.njit(cache=True, error_model="numpy")(_add_up)


# -- gates


def gated_forward(
    pre: Tensor, shift: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, acts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `elementwise.gated_forward`."""
    fired, opened = torch.empty((2, *shift.shape), dtype=torch.int32)
    sums = torch.empty_like(shift)
    rows = pre.shape[2]
    _gated_forward(
        _array(pre.view(-1, rows)), *map(_flat, (shift, b_gate, b_mag, r_mag.exp())),
        _array(acts.view(2, -1, rows)), _flat(fired), _flat(opened), _flat(sums),
    )  # fmt: skip
    return fired, opened, sums


def relu_forward(pre: Tensor, shift: Tensor, b_enc: Tensor, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `elementwise.relu_forward`."""
    fired, sums = torch.empty_like(shift, dtype=torch.int32), torch.empty_like(shift)
    rows = pre.shape[2]
    arrays = _array(pre.view(-1, rows)), _flat(b_enc - shift), _array(acts.view(-1, rows))
    _relu_forward(*arrays, _flat(fired), _flat(sums))
    return fired, fired, sums


def gated_backward(
    pre: Tensor, shift: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, acts: Tensor, l1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `elementwise.gated_backward`."""
    sums = shift.new_empty((4, *shift.shape))
    rows = pre.shape[2]
    _gated_backward(
        _array(pre.view(-1, rows)), *map(_flat, (shift, b_gate, b_mag, r_mag.exp())),
        _array(acts.view(2, -1, rows)), l1.numpy(), sums.view(4, -1).numpy(),
    )  # fmt: skip
    return sums[0], sums[1], sums[2], sums[3]


def relu_backward(pre: Tensor, shift: Tensor, b_enc: Tensor, acts: Tensor, l1: Tensor) -> Tensor:
    """As `elementwise.relu_backward`."""
    sums = torch.empty_like(shift)
    rows = pre.shape[2]
    arrays = _array(pre.view(-1, rows)), _flat(b_enc - shift), _array(acts.view(-1, rows))
    _relu_backward(*arrays, l1.numpy(), _flat(sums))
    return sums


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
                a = _load(pre[j, r]) - c
                gate, mag = a + bg, scale * a + bm
                gate = ZERO if gate <= ZERO else gate
                f = ZERO if mag <= ZERO else mag
                f = f if gate > ZERO else gate  # a NaN gate stays one
                acts[0, j, r] = _store(f, acts[0, j, r])
                acts[1, j, r] = _store(gate, acts[1, j, r])
                gates[r] = gate
                count += np.int32(f > ZERO)
                shown += np.int32(gate > ZERO)
            fired[j], opened[j], sums[j] = count, shown, _total(gates)


def _loop_relu_forward(pre, bias, acts, fired, sums):
    latents, rows = pre.shape
    for block in numba.prange(-(-latents // BLOCK)):
        values = np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            b = bias[j]
            count = np.int32(0)
            for r in range(rows):
                f = _load(pre[j, r]) + b
                f = ZERO if f <= ZERO else f
                acts[j, r] = _store(f, acts[j, r])
                values[r] = f
                count += np.int32(f > ZERO)
            fired[j], sums[j] = count, _total(values)


def _loop_gated_backward(pre, shift, b_gate, b_mag, rate, acts, l1, sums):
    latents, rows = pre.shape
    d_sae = latents // len(l1)
    for block in numba.prange(-(-latents // BLOCK)):
        gates, mags, rates = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            c, bg, bm, scale, penalty = shift[j], b_gate[j], b_mag[j], rate[j], l1[j // d_sae]
            for r in range(rows):
                a = _load(pre[j, r]) - c
                magnified = scale * a
                opened = a + bg > ZERO
                d_gate = _load(acts[1, j, r]) + penalty
                d_gate = d_gate if opened else ZERO
                d_mag = _load(acts[0, j, r])
                d_mag = d_mag if opened else ZERO
                d_mag = d_mag if magnified + bm > ZERO else ZERO
                pre[j, r] = _store(scale * d_mag + d_gate, pre[j, r])
                gates[r] = d_gate
                mags[r] = d_mag
                rates[r] = d_mag * magnified
            sums[1, j], sums[2, j], sums[3, j] = _total(gates), _total(mags), _total(rates)
            sums[0, j] = scale * sums[2, j] + sums[1, j]


def _loop_relu_backward(pre, bias, acts, l1, sums):
    latents, rows = pre.shape
    d_sae = latents // len(l1)
    for block in numba.prange(-(-latents // BLOCK)):
        values = np.empty(rows, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            b, penalty = bias[j], l1[j // d_sae]
            for r in range(rows):
                da = _load(acts[j, r]) + penalty
                da = da if _load(pre[j, r]) + b > ZERO else ZERO
                pre[j, r] = _store(da, pre[j, r])
                values[r] = da
            sums[j] = _total(values)


# -- errors


def errors(recon: Tensor, x: Tensor, offset: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `elementwise.errors`."""
    _, saes, rows, d_in = recon.shape
    blocks = -(-rows // BLOCK)
    columns, sums = x.new_empty(saes, blocks, d_in), x.new_empty(saes, blocks, 4)
    _errors(_array(recon), x.numpy(), offset.numpy(), centre.numpy(), columns.numpy(), sums.numpy())
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
                e = _load(recon[0, s, r, k]) + (offset[s, k] - x[r, k])
                x_hat = e + whole
                parts[0, k] += e * e
                parts[2, k] += x_hat * x_hat
                parts[3, k] += x_hat * whole
                column[k] += e * factor
                recon[0, s, r, k] = _store(e * factor, recon[0, s, r, k])
            if copies == 2:
                for k in range(d_in):
                    e = _load(recon[1, s, r, k]) + (offset[s, k] - x[r, k])
                    parts[1, k] += e * e
                    recon[1, s, r, k] = _store(e * factor, recon[1, s, r, k])
        for part in range(4):
            sums[s, block, part] = _total(parts[part])


# -- Adam


def adam_decoder(
    W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float
) -> None:
    """As `optim.adam_decoder`."""
    rates = lr.numpy(), np.float32(beta2), np.float32(1 - beta2), _flat(correction), np.float32(eps)
    _adam_decoder(*map(_rows, (W, operand, grad, v)), *rates)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, lr: Tensor, beta2: float,
    correction: Tensor, eps: float,
) -> None:  # fmt: skip
    """As `optim.adam_encoder`."""
    rates = lr.numpy(), np.float32(beta2), np.float32(1 - beta2), _flat(correction), np.float32(eps)
    _adam_encoder(*map(_rows, (W, operand, grad)), _flat(sums), offset.numpy(), _rows(v), *rates)


def _rows(tensor: Tensor) -> Any:
    return _array(tensor.view(-1, tensor.shape[-1]))


def _loop_adam_decoder(W, operand, grad, v, lr, beta2, rest, correction, eps):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for block in numba.prange(-(-latents // BLOCK)):
        products = np.empty(d_in, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            rate, corrected = lr[j // d_sae], correction[j]
            if rate > ZERO:
                for k in range(d_in):
                    products[k] = _load(grad[j, k]) * W[j, k]
                along = _total(products)
                for k in range(d_in):
                    g = _load(grad[j, k]) - along * W[j, k]
                    moment = beta2 * v[j, k] + rest * (g * g)
                    v[j, k] = moment
                    w = W[j, k] - rate * g / (np.sqrt(moment) * corrected + eps)
                    W[j, k] = w
                    products[k] = w * w
                shrink = np.float32(1) / np.sqrt(_total(products))
                for k in range(d_in):
                    w = W[j, k] * shrink
                    W[j, k] = w
                    operand[j, k] = _store(w, operand[j, k])


def _loop_adam_encoder(W, operand, grad, sums, offset, v, lr, beta2, rest, correction, eps):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for j in numba.prange(latents):
        s = j // d_sae
        rate, corrected, total = lr[s], correction[j], sums[j]
        if rate > ZERO:
            for k in range(d_in):
                g = _load(grad[j, k]) - total * offset[s, k]
                moment = beta2 * v[j, k] + rest * (g * g)
                v[j, k] = moment
                w = W[j, k] - rate * g / (np.sqrt(moment) * corrected + eps)
                W[j, k] = w
                operand[j, k] = _store(w, operand[j, k])


_gated_forward = _compiled(_loop_gated_forward)
_relu_forward = _compiled(_loop_relu_forward)
_gated_backward = _compiled(_loop_gated_backward)
_relu_backward = _compiled(_loop_relu_backward)
_errors = _compiled(_loop_errors)
_adam_decoder = _compiled(_loop_adam_decoder)
_adam_encoder = _compiled(_loop_adam_encoder)
