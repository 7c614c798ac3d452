"""The list of open gates, found by row and sorted by latent; compiled for the CPU.

64 gates are compared at a time, which gives a word of bits; most words are 0. The list is not padded, because rows
differ in length a hundredfold. Sorting is a stable counting sort in a fixed number of parts, so that the list is the
same for any number of threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, assignment, var-annotated"
# Typed by numba, for float32 and float64 alike.

import numba
import numpy as np
import torch
from torch import Tensor

from .buffers import Buffers
from .compiling import compiled
from .gate_lists import GatesByLatent, OpenGates
from .vector_loops import above, count_bits, lowest

WORD = 64  # gates that are compared at once
PARTS = 16  # of the list, that are sorted in parallel


# -- which gates are open


def open_gates(pre: Tensor, bias: Tensor, limit: int, buffers: Buffers) -> OpenGates | None:
    """List the entries of pre (rows, d_sae) above -bias (d_sae), or NaN; None if there are more than `limit`."""
    rows, d_sae = pre.shape
    masks = buffers("masks", (rows, -(-d_sae // WORD)), torch.int64)
    starts = buffers("starts", (rows + 1,), torch.int64)
    bits = masks.numpy().view(np.uint64)
    _masks(pre.numpy(), bias.numpy(), bits, starts.numpy())
    torch.cumsum(starts, 0, out=starts)
    count = int(starts[-1])
    if count > limit:
        return None
    latents, values = buffers("latents", (count,), torch.int32), buffers("values", (count,), pre.dtype)
    _walk(pre.numpy(), bits, starts.numpy(), latents.numpy(), values.numpy())
    return OpenGates(starts, latents, values)


def _loop_masks(pre, bias, masks, starts):
    rows, d_sae = pre.shape
    whole = d_sae // WORD
    starts[0] = 0
    for r in numba.prange(rows):
        count = 0
        for word in range(whole):
            bits = above(pre, r, bias, word * WORD)
            masks[r, word] = bits
            count += count_bits(bits)
        if whole * WORD < d_sae:
            bits = np.uint64(0)
            for i in range(whole * WORD, d_sae):
                if not pre[r, i] + bias[i] <= 0:
                    bits |= np.uint64(1) << np.uint64(i - whole * WORD)
                    count += 1
            masks[r, whole] = bits
        starts[r + 1] = count


def _loop_walk(pre, masks, starts, latents, values):
    rows, words = masks.shape
    for r in numba.prange(rows):
        at = starts[r]
        for word in range(words):
            bits = masks[r, word]
            while bits:
                i = word * WORD + lowest(bits)
                bits &= bits - np.uint64(1)
                latents[at] = i
                values[at] = pre[r, i]
                at += 1


# -- the transposed list


def by_latent(opened: OpenGates, d_sae: int, buffers: Buffers) -> GatesByLatent:
    """The same entries by latent, those of one latent in the order of rows."""
    count = len(opened.latents)
    starts = buffers("begins", (d_sae + 1,), torch.int64)
    places = buffers("places", (PARTS, d_sae), torch.int64)
    entries, rows = buffers("entries", (count,), torch.int32), buffers("rows", (count,), torch.int32)
    _sort(*(t.numpy() for t in (opened.starts, opened.latents, places, starts, entries, rows)))
    return GatesByLatent(starts, entries, rows)


def _loop_sort(starts, latents, places, begins, entries, rows):
    count = len(starts) - 1
    parts, d_sae = places.shape
    for part in numba.prange(parts):
        place = places[part]
        place[:] = 0
        for at in range(starts[count * part // parts], starts[count * (part + 1) // parts]):
            place[latents[at]] += 1
    total = 0
    for i in range(d_sae):
        begins[i] = total
        for part in range(parts):
            here = places[part, i]
            places[part, i] = total
            total += here
    begins[d_sae] = total
    for part in numba.prange(parts):
        place = places[part]
        for r in range(count * part // parts, count * (part + 1) // parts):
            for at in range(starts[r], starts[r + 1]):
                to = place[latents[at]]
                place[latents[at]] = to + 1
                entries[to] = at
                rows[to] = r


_masks = compiled(_loop_masks)
_walk = compiled(_loop_walk)
_sort = compiled(_loop_sort)
