"""The open gates, found exactly from a matrix product in bfloat16, on CPUs where that is faster than one in float32.

The error of the bfloat16 product has a bound: rounding the inputs and the weights costs at most
||x - x'|| ||w'|| + ||x|| ||w - w'||, adding up in float32 costs d_in roundings, and the result is rounded once. Gates
that may be open within this margin are decided by a float32 inner product; the margin covers its error too. So a gate
is open exactly if the float32 inner product is above minus its bias (or NaN). The values of open gates are those inner
products, which differ from the unscreened step's by the rounding of float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, assignment, var-annotated"
# Typed by numba.

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from .buffers import Buffers
from .compiling import compiled, load, store
from .gate_lists import GatesByLatent, OpenGates
from .gates_numba import WORD
from .vector_loops import count_bits, dot, dots, lowest, maybe_above

LATENTS = 32  # latents, or rows, that a thread takes at a time
UNIT = 2.0**-24  # half a unit in the last place of 1 in float32
SHARE = np.float32(2.0**-8 * 1.01)  # of a product's value, the largest error of rounding it to bfloat16
SPARE = 1.0 + 2.0**-16  # for the roundings of the margin's own arithmetic
TINY = np.float32(1e-30)  # far above the error of flushing subnormal numbers to zero
FLOOR = np.float32(1e-16)  # far above what a norm loses by squares that are too small for float32


def screening_pays() -> bool:
    """Whether this CPU multiplies bfloat16 several times faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class Screen:
    """The encoder of one SAE in bfloat16, and the factors of the margin for each latent (d_sae).

    by_norm is multiplied by ||x||, by_rest by ||x - x'||. All follow from W_enc, so no checkpoint holds them.
    """

    W_enc: Tensor
    by_norm: Tensor
    by_rest: Tensor

    @classmethod
    def of(cls, W_enc: Tensor) -> "Screen":
        """Make it for encoder rows W_enc (d_sae, d_in), float32."""
        screen = cls(W_enc.bfloat16(), *(W_enc.new_empty(2, len(W_enc)).unbind()))
        screen._refresh(W_enc, torch.arange(len(W_enc) + 1))
        return screen

    def refresh(self, W_enc: Tensor, listed: GatesByLatent) -> None:
        """Update the rows of the latents in the list, which have changed."""
        self._refresh(W_enc, listed.starts)

    def _refresh(self, W_enc: Tensor, starts: Tensor) -> None:
        words = self.W_enc.view(torch.uint16).numpy()
        _refreshed(W_enc.numpy(), starts.numpy(), words, self.by_norm.numpy(), self.by_rest.numpy())

    def open_gates(self, x: Tensor, W_enc: Tensor, bias: Tensor, limit: int, buffers: Buffers) -> OpenGates | None:
        """List the open gates of x (rows, d_in), the inputs less b_dec; None if there are more than `limit`."""
        (rows, d_in), d_sae = x.shape, len(W_enc)
        low = buffers("low", (rows, d_in), torch.bfloat16).copy_(x)
        pre = torch.mm(low, self.W_enc.T, out=buffers("low_pre", (rows, d_sae), torch.bfloat16))
        masks = buffers("masks", (rows, -(-d_sae // WORD)), torch.int64)
        begins, starts = (buffers(name, (rows + 1,), torch.int64) for name in ("maybe", "starts"))
        bits = masks.numpy().view(np.uint64)
        norms = buffers("norms", (2, rows), torch.float32)
        _row_norms(x.numpy(), low.view(torch.uint16).numpy(), norms.numpy())
        raised = bias + bias.abs() * 2.0**-20 + float(TINY)
        words = pre.view(torch.uint16).numpy()
        _maybe(words, raised.numpy(), self.by_norm.numpy(), self.by_rest.numpy(), norms.numpy(), bits, begins.numpy())
        torch.cumsum(begins, 0, out=begins)
        count = int(begins[-1])
        if count > 2 * limit:
            return None
        latents, values = buffers("maybe_latents", (count,), torch.int32), buffers("maybe_values", (count,), x.dtype)
        arrays = begins.numpy(), latents.numpy(), values.numpy()
        _decide(x.numpy(), W_enc.numpy(), bias.numpy(), bits, *arrays, starts.numpy())
        torch.cumsum(starts, 0, out=starts)
        kept = int(starts[-1])
        if kept > limit:
            return None
        opened = OpenGates(starts, buffers("latents", (kept,), torch.int32), buffers("values", (kept,), x.dtype))
        _gather(*arrays, starts.numpy(), opened.latents.numpy(), opened.values.numpy())
        return opened


@numba.njit(cache=True, error_model="numpy")
def _norms(values, words, whole, rest):
    """Norms of a row's values as bfloat16, and of what that rounding left; slightly too large, never too small."""
    for k in range(len(values)):
        whole[0, k] = load(words[k])
        rest[0, k] = values[k] - whole[0, k]
    grown = np.float32(1 + 2 * len(values) * UNIT) * np.float32(SPARE)
    return np.sqrt(dot(whole[0], whole, 0)) * grown + FLOOR, np.sqrt(dot(rest[0], rest, 0)) * grown + FLOOR


def _loop_refreshed(W_enc, starts, words, by_norm, by_rest):
    d_sae, d_in = W_enc.shape
    roundings = np.float32(4 * d_in * UNIT)  # of both sums, each at most d_in * UNIT to first order
    for block in numba.prange(-(-d_sae // LATENTS)):
        whole, rest = np.empty((1, d_in), np.float32), np.empty((1, d_in), np.float32)
        for i in range(block * LATENTS, min(d_sae, (block + 1) * LATENTS)):
            if starts[i] < starts[i + 1]:
                for k in range(d_in):
                    words[i, k] = store(W_enc[i, k], words[i, k])
                norm, left = _norms(W_enc[i], words[i], whole, rest)
                by_norm[i] = (left + roundings * (norm + left)) * np.float32(SPARE)
                by_rest[i] = norm * np.float32(SPARE)


def _loop_row_norms(x, words, norms):
    rows, d_in = x.shape
    for block in numba.prange(-(-rows // LATENTS)):
        whole, rest = np.empty((1, d_in), np.float32), np.empty((1, d_in), np.float32)
        for r in range(block * LATENTS, min(rows, (block + 1) * LATENTS)):
            norm, left = _norms(x[r], words[r], whole, rest)
            norms[0, r], norms[1, r] = (norm + left) * np.float32(SPARE), left


def _loop_maybe(pre, bias, by_norm, by_rest, norms, masks, begins):
    rows, d_sae = pre.shape
    whole = d_sae // WORD
    begins[0] = 0
    for r in numba.prange(rows):
        norm, rest = norms[0, r], norms[1, r]
        count = 0
        for word in range(whole):
            bits = maybe_above(pre, r, bias, by_norm, by_rest, word * WORD, norm, rest, SHARE)
            masks[r, word] = bits
            count += count_bits(bits)
        if whole * WORD < d_sae:
            bits = np.uint64(0)
            for i in range(whole * WORD, d_sae):
                value = load(pre[r, i])
                if not value + SHARE * abs(value) + norm * by_norm[i] + rest * by_rest[i] + bias[i] <= 0:
                    bits |= np.uint64(1) << np.uint64(i - whole * WORD)
                    count += 1
            masks[r, whole] = bits
        begins[r + 1] = count


def _loop_decide(x, W_enc, bias, masks, begins, latents, values, starts):
    rows, words = masks.shape
    starts[0] = 0
    for r in numba.prange(rows):
        at = begins[r]
        for word in range(words):
            bits = masks[r, word]
            while bits:
                latents[at] = word * WORD + lowest(bits)
                bits &= bits - np.uint64(1)
                at += 1
        first, last = begins[r], begins[r + 1]
        at = first
        while at + 4 <= last:
            four = dots(x[r], W_enc, latents[at], latents[at + 1], latents[at + 2], latents[at + 3])
            for j in range(4):
                values[at + j] = four[j]
            at += 4
        while at < last:
            values[at] = dot(x[r], W_enc, latents[at])
            at += 1
        kept = first
        for at in range(first, last):
            i, a = latents[at], values[at]
            if not a + bias[i] <= 0:
                latents[kept], values[kept] = i, a
                kept += 1
        starts[r + 1] = kept - first


def _loop_gather(begins, latents, values, starts, kept_latents, kept_values):
    for r in numba.prange(len(starts) - 1):
        for j in range(starts[r + 1] - starts[r]):
            kept_latents[starts[r] + j] = latents[begins[r] + j]
            kept_values[starts[r] + j] = values[begins[r] + j]


_refreshed = compiled(_loop_refreshed)
_row_norms = compiled(_loop_row_norms)
_maybe = compiled(_loop_maybe)
_decide = compiled(_loop_decide)
_gather = compiled(_loop_gather)
