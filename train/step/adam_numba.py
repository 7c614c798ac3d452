"""Adam for weight matrices in one pass over memory, compiled for the CPU: the twins of `adam_plain`.

Weights and moments are float32, operands and gradients float32 or bfloat16. Every sum has one order, for any number of
threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# The loops are typed by numba, for float32 and for the words of bfloat16 alike.

from typing import Any

import numba
import numpy as np
from torch import Tensor

from .compiling import array, compiled, load, store, total

BLOCK = 32  # latents that a thread takes at a time
ZERO = np.float32(0)


def adam_decoder(
    W: Tensor, operand: Tensor, grad: Tensor, v: Tensor, lr: Tensor, beta2: float, correction: Tensor, eps: float
) -> None:
    """As `adam_plain.adam_decoder`."""
    rates = lr.numpy(), np.float32(beta2), np.float32(1 - beta2), _flat(correction), np.float32(eps)
    _adam_decoder(*map(_rows, (W, operand, grad, v)), *rates)


def adam_encoder(
    W: Tensor, operand: Tensor, grad: Tensor, sums: Tensor, offset: Tensor, v: Tensor, lr: Tensor, beta2: float,
    correction: Tensor, eps: float,
) -> None:  # fmt: skip
    """As `adam_plain.adam_encoder`."""
    rates = lr.numpy(), np.float32(beta2), np.float32(1 - beta2), _flat(correction), np.float32(eps)
    _adam_encoder(*map(_rows, (W, operand, grad)), _flat(sums), offset.numpy(), _rows(v), *rates)


def _flat(tensor: Tensor) -> Any:
    return tensor.reshape(-1).numpy()


def _rows(tensor: Tensor) -> Any:
    return array(tensor.view(-1, tensor.shape[-1]))


def _loop_adam_decoder(W, operand, grad, v, lr, beta2, rest, correction, eps):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for block in numba.prange(-(-latents // BLOCK)):
        products = np.empty(d_in, np.float32)
        for j in range(block * BLOCK, min(latents, (block + 1) * BLOCK)):
            rate, corrected = lr[j // d_sae], correction[j]
            if rate > ZERO:
                for k in range(d_in):
                    products[k] = load(grad[j, k]) * W[j, k]
                along = total(products)
                for k in range(d_in):
                    g = load(grad[j, k]) - along * W[j, k]
                    moment = beta2 * v[j, k] + rest * (g * g)
                    v[j, k] = moment
                    w = W[j, k] - rate * g / (np.sqrt(moment) * corrected + eps)
                    W[j, k] = w
                    products[k] = w * w
                shrink = np.float32(1) / np.sqrt(total(products))
                for k in range(d_in):
                    w = W[j, k] * shrink
                    W[j, k] = w
                    operand[j, k] = store(w, operand[j, k])


def _loop_adam_encoder(W, operand, grad, sums, offset, v, lr, beta2, rest, correction, eps):
    latents, d_in = W.shape
    d_sae = latents // len(lr)
    for j in numba.prange(latents):
        s = j // d_sae
        rate, corrected, along = lr[s], correction[j], sums[j]
        if rate > ZERO:
            for k in range(d_in):
                g = load(grad[j, k]) - along * offset[s, k]
                moment = beta2 * v[j, k] + rest * (g * g)
                v[j, k] = moment
                w = W[j, k] - rate * g / (np.sqrt(moment) * corrected + eps)
                W[j, k] = w
                operand[j, k] = store(w, operand[j, k])


_adam_decoder = compiled(_loop_adam_decoder)
_adam_encoder = compiled(_loop_adam_encoder)
