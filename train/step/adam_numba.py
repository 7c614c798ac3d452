"""Adam for weight matrices in one pass over memory, compiled for the CPU: the twins of `adam_plain`.

Weights and moments are float32, operands and gradients float32 or bfloat16. Every sum has one order, for any number of
threads. A row is moved only after all of its update is known, which the clip needs and which finds gradients that are
not finite: `moment * 0` is NaN for a second moment that overflowed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# The loops are typed by numba, for float32 and for the words of bfloat16 alike.

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .adam import Adam
from .compiling import array, compiled, load, store, total

BLOCK = 32  # latents that a thread takes at a time
ZERO = np.float32(0)


@numba.njit(cache=True, error_model="numpy")
def kept(square, rate, d_in, row_clip):
    """The share of a row's update that the clip leaves, NaN if it is not finite. square: the sum of its squares."""
    nothing, most = square - square, rate * rate * d_in  # nothing is NaN for an infinity or a NaN
    return np.sqrt(most / square) if row_clip and square > most and nothing == 0 else nothing + 1.0


def adam_decoder(W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, adam: Adam, correction: Tensor) -> Tensor:
    """As `adam_plain.adam_decoder`."""
    bad = torch.zeros(W.shape[:2], dtype=torch.bool)
    _adam_decoder(*map(_rows, (W, operand, grad, v)), *_rates(adam, correction), _flat(bad))
    return ~bad.any(1)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, adam: Adam, correction: Tensor
) -> Tensor:
    """As `adam_plain.adam_encoder`."""
    bad = torch.zeros(W.shape[:2], dtype=torch.bool)
    arrays = *map(_rows, (W, operand, grad)), _flat(sums), offset.numpy(), _rows(v)
    _adam_encoder(*arrays, *_rates(adam, correction), _flat(bad))
    return ~bad.any(1)


def _rates(adam: Adam, correction: Tensor) -> tuple[Any, ...]:
    one = np.float32
    return adam.lr.numpy(), one(adam.beta2), one(1 - adam.beta2), _flat(correction), one(adam.eps), adam.row_clip


def _flat(tensor: Tensor) -> Any:
    return tensor.reshape(-1).numpy()


def _rows(tensor: Tensor) -> Any:
    return array(tensor.view(-1, tensor.shape[-1]))


@numba.njit(cache=True, error_model="numpy")
def _row_update(update, products, grad, along, direction, v, rates, row_clip):
    """Adam's update of a row for the gradient grad - along * direction, and the share of it that the clip leaves."""
    rate, beta2, rest, corrected, eps = rates
    for k in range(len(update)):
        g = load(grad[k]) - along * direction[k]
        moment = beta2 * v[k] + rest * (g * g)
        v[k] = moment
        u = rate * g / (np.sqrt(moment) * corrected + eps)
        update[k] = u
        products[k] = u * u + moment * ZERO
    return np.float32(kept(total(products), rate, len(update), row_clip))


def _loop_adam_decoder(W, operand, grad, v, lr, beta2, rest, correction, eps, row_clip, bad):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for block in numba.prange(-(-latents // BLOCK)):
        update, products = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            rate, corrected = lr[j // d_sae], correction[j]
            if rate > ZERO:
                for k in range(d_in):
                    products[k] = load(grad[j, k]) * W[j, k]
                along = total(products)
                rates = rate, beta2, rest, corrected, eps
                share = _row_update(update, products, grad[j], along, W[j], v[j], rates, row_clip)
                if share != share:
                    bad[j] = True
                    continue
                for k in range(d_in):
                    w = W[j, k] - share * update[k]
                    W[j, k] = w
                    products[k] = w * w
                shrink = np.float32(1) / np.sqrt(total(products))
                for k in range(d_in):
                    w = W[j, k] * shrink
                    W[j, k] = w
                    operand[j, k] = store(w, operand[j, k])


def _loop_adam_encoder(W, operand, grad, sums, offset, v, lr, beta2, rest, correction, eps, row_clip, bad):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for block in numba.prange(-(-latents // BLOCK)):
        update, products = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            s = j // d_sae
            rate, corrected, along = lr[s], correction[j], sums[j]
            if rate > ZERO:
                rates = rate, beta2, rest, corrected, eps
                share = _row_update(update, products, grad[j], along, offset[s], v[j], rates, row_clip)
                if share != share:
                    bad[j] = True
                    continue
                for k in range(d_in):
                    w = W[j, k] - share * update[k]
                    W[j, k] = w
                    operand[j, k] = store(w, operand[j, k])


_adam_decoder = compiled(_loop_adam_decoder)
_adam_encoder = compiled(_loop_adam_encoder)
