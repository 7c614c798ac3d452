"""The open gates of stacked SAEs on a GPU, found exactly from a product in bfloat16: lists by latent and by row.

The product goes through the margin of `screening`, doubled because tensor cores truncate where a CPU rounds. What may
be open becomes one bit in a mask, the mask a list, and each entry of the list is decided by an inner product in
float32. Latents come first in every layout: a latent's row of W_enc stays in registers while the rows of x are
gathered.

Lists have a fixed capacity and their lengths stay on the device, so nothing waits for the host. Positions come from
prefix sums and one stable sort, never from atomics: the order of a list is that of its latents and rows.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernels are typed by Triton.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .buffers import Buffers
from .encode_triton import ALIGNED, masked_product
from .gate_capacity import candidates
from .product_rounding import sums_in_float32
from .stack import Stack
from .triton_support import FIXED, NEAR, TINY, blocks, ones, row_in_registers

WORD = 32  # gates in a word of a mask
LATENTS, WORDS = 4, 16  # the tile of a program of `_mask`
ENTRIES = 32  # candidates that a program of `_decide` takes
ONE_WARP = {**FIXED, "num_warps": 1}
AT_A_TIME = 1024  # entries that a program of `_keep` takes
FULL = 2**31 - 1  # more candidates than any list holds

UNIT = 2.0**-24  # half a unit in the last place of 1 in float32
SPARE = tl.constexpr(1.0 + 2.0**-16)  # for the roundings of the margin's own arithmetic
SHARE = tl.constexpr(2.0**-8 * 1.01)  # of a product's value, the largest error of rounding it to bfloat16
FLOOR = tl.constexpr(1e-16)  # far above what a norm loses by squares that are too small for float32


@dataclass(frozen=True)
class Shadow:
    """The encoders of a stack in bfloat16 (saes, d_sae, d_in), and the factors of the margin (saes, d_sae).

    by_norm is multiplied by ||x||, by_rest by what rounding x left. All follow from W_enc.
    """

    W_enc: Tensor
    by_norm: Tensor
    by_rest: Tensor

    @classmethod
    def empty_like(cls, W_enc: Tensor) -> "Shadow":
        """Make room for that of encoders (saes, d_sae, d_in)."""
        return cls(torch.empty_like(W_enc, dtype=torch.bfloat16), *W_enc.new_empty((2, *W_enc.shape[:2])))

    def __getitem__(self, which: slice) -> "Shadow":
        """That of some of the SAEs."""
        return Shadow(self.W_enc[which], self.by_norm[which], self.by_rest[which])

    def follow(self, W_enc: Tensor) -> None:
        """Become that of encoders (saes, d_sae, d_in), float32."""
        d_in = W_enc.shape[2]
        _shadows[(self.by_norm.numel(),)](
            W_enc, self.W_enc, self.by_norm, self.by_rest, *roundings(d_in), d_in, **row_in_registers(d_in)
        )


@dataclass(frozen=True)
class GateLists:
    """The open gates of saes stacked SAEs at one batch, in lists of one capacity; what is behind `total` is undefined.

    latent_starts (saes * d_sae + 1): where the entries of each latent begin. rows, values (capacity): of each entry,
    its row, counted through all SAEs (sae * rows + row), and the encoder product. row_starts (saes * rows + 1), entries
    (capacity): the same entries by row, latents ascending in each, as places in the first list. latents (capacity): of
    each entry of the first list. overflown (saes): which SAEs have more open gates than their limit, or more candidates
    than the list holds; the lists are then useless.
    """

    latent_starts: Tensor
    latents: Tensor
    rows: Tensor
    values: Tensor
    row_starts: Tensor
    entries: Tensor
    overflown: Tensor


def open_gates(
    stack: Stack, x: Tensor, offset: Tensor, shadow: Shadow, gate: Tensor, limit: int, buffers: Buffers,
    *, fused: bool = False,
) -> GateLists:  # fmt: skip
    """List the open gates of all SAEs of a stack at x (rows, d_in), from which offset (saes, d_in) is subtracted.

    gate (saes, d_sae): the biases. limit: the largest number of open gates of one SAE. fused: the mask is the epilogue
    of the product, where d_in allows it; the lists are the same.
    """
    W_enc = stack.params["W_enc"]
    (saes, d_sae, d_in), rows = W_enc.shape, len(x)
    latents, own, room = saes * d_sae, candidates(d_in) * limit, saes * limit
    capacity = saes * own
    masks, counts = _masks(x, offset, shadow, gate, buffers, fused=fused and d_in % ALIGNED == 0)
    starts, words = _starts(counts), masks.shape[1]
    latent_of, row_of = buffers("maybe", (2, capacity), torch.int32)
    values, opened = buffers("maybe_values", (capacity,), torch.float32), buffers("opened", (capacity,), torch.int32)
    _list[(latents,)](masks, starts, latent_of, row_of, words, capacity, triton.next_power_of_2(words), **ONE_WARP)
    opened.zero_()
    _decide[blocks(capacity, ENTRIES)](
        x, offset, W_enc, gate, starts, latent_of, row_of, values, opened, latents, d_sae, capacity, d_in, ENTRIES,
        **row_in_registers(d_in),
    )  # fmt: skip
    places = opened.cumsum(0, dtype=torch.int32)
    kept, kept_values = buffers("kept", (2, room), torch.int32), buffers("values", (room,), torch.float32)
    _keep[blocks(capacity, AT_A_TIME)](
        opened, places, latent_of, row_of, values, kept[0], kept[1], kept_values, d_sae, rows, capacity, room,
        AT_A_TIME, **FIXED,
    )  # fmt: skip
    found = pad(places, (1, 0))[starts.clamp(max=capacity)]
    boundaries = torch.arange(0, latents + 1, d_sae, device=x.device)
    overflown = (starts[boundaries].diff() > own) | (found[boundaries].diff() > limit)
    row_starts, entries = _by_row(kept[1], places[-1].clamp(max=room), saes * rows)
    return GateLists(found.clamp(max=room), kept[0], kept[1], kept_values, row_starts, entries, overflown)


def _masks(
    x: Tensor, offset: Tensor, shadow: Shadow, gate: Tensor, buffers: Buffers, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """A bit for each gate that may be open, (latents, words) in words of rows, and how many each latent has."""
    (saes, d_sae, d_in), rows = shadow.W_enc.shape, len(x)
    latents, words = saes * d_sae, triton.cdiv(rows, WORD)
    low = buffers("low", (saes, rows, d_in), torch.bfloat16)
    norms = buffers("norms", (2, saes, rows), torch.float32)
    masks, counts = buffers("masks", (latents, words), torch.int32), buffers("counts", (latents,), torch.int32)
    _rounded_inputs[(saes * rows,)](
        x, offset, low, norms[0], norms[1], rows, roundings(d_in)[0], d_in, **row_in_registers(d_in)
    )
    if fused:
        masked_product(shadow.W_enc, (shadow.by_norm, shadow.by_rest), low, gate, norms, masks, counts)
        return masks, counts
    pre = buffers("low_pre", (saes, d_sae, rows), torch.bfloat16)
    with sums_in_float32():
        torch.bmm(shadow.W_enc, low.transpose(1, 2), out=pre)
    _mask[blocks(latents, LATENTS)](
        pre, gate, shadow.by_norm, shadow.by_rest, norms[0], norms[1], masks, counts, latents, d_sae, rows, words,
        LATENTS, WORDS, **FIXED,
    )  # fmt: skip
    return masks, counts


def roundings(d_in: int) -> tuple[float, float]:
    """What a norm is multiplied by so that it is not too small, and the share of both norms that products may lose.

    The second is twice 4 d_in units: d_in for each of two sums, to first order, and as much again for tensor cores.
    """
    return (1 + 2 * d_in * UNIT) * (1 + 2.0**-16), 8 * d_in * UNIT


def _starts(counts: Tensor) -> Tensor:
    """Where each of some lists begins that stand one behind the other, and where the last one ends; at most `FULL`."""
    return pad(counts.cumsum(0).clamp_(max=FULL).int(), (1, 0))


def _by_row(rows: Tensor, total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sort entries by row, stably: where the entries of each of `count` rows begin, and their places."""
    places = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
    found, entries = torch.sort(torch.where(places < total, rows, count), stable=True)
    each = torch.arange(count + 1, device=rows.device, dtype=torch.int32)
    return torch.searchsorted(found, each, out_int32=True), entries.int()


# -- kernels


@triton.jit
def shadow_of(w, grown, lost):
    """A row in bfloat16, and its two factors of the margin; w (WIDTH,) float32."""
    low = w.to(tl.bfloat16)
    whole = low.to(tl.float32)
    rest = w - whole
    norm = tl.sqrt(tl.sum(whole * whole, 0)) * grown + FLOOR
    left = tl.sqrt(tl.sum(rest * rest, 0)) * grown + FLOOR
    return low, (left + lost * (norm + left)) * SPARE, norm * SPARE


@triton.jit
def _shadows(W_enc, low, by_norm, by_rest, grown, lost, d_in: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    row, norm, rest = shadow_of(tl.load(W_enc + i * d_in + k, mask=k < d_in, other=0.0), grown, lost)
    tl.store(low + i * d_in + k, row, mask=k < d_in)
    tl.store(by_norm + i, norm)
    tl.store(by_rest + i, rest)


@triton.jit
def _rounded_inputs(x, offset, low, norms, rests, rows, grown, d_in: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    sae, r = at // rows, at % rows
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    value = tl.load(x + r * d_in + k, mask=inside, other=0.0) - tl.load(offset + sae * d_in + k, mask=inside, other=0.0)
    rounded = value.to(tl.bfloat16)
    whole = rounded.to(tl.float32)
    rest = value - whole
    norm = tl.sqrt(tl.sum(whole * whole, 0)) * grown + FLOOR
    left = tl.sqrt(tl.sum(rest * rest, 0)) * grown + FLOOR
    tl.store(low + at * d_in + k, rounded, mask=inside)
    tl.store(norms + at, (norm + left) * SPARE)
    tl.store(rests + at, left)


@triton.jit
def _mask(
    pre, gate, by_norm, by_rest, norms, rests, masks, counts, latents, d_sae, rows, words, LATENTS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    here = i < latents
    bias = tl.load(gate + i, mask=here, other=0.0)
    raised = (bias + tl.abs(bias) * NEAR + TINY)[:, None]
    by_whole = tl.load(by_norm + i, mask=here, other=0.0)[:, None]
    by_left = tl.load(by_rest + i, mask=here, other=0.0)[:, None]
    count = tl.zeros((LATENTS,), tl.int32)
    for first in range(0, words, WORDS):
        r = first * 32 + tl.arange(0, WORDS * 32)
        word = first + tl.arange(0, WORDS)
        inside = here[:, None] & (r < rows)[None, :]
        p = tl.load(pre + i[:, None] * rows + r[None, :], mask=inside, other=0.0).to(tl.float32)
        at = (i // d_sae)[:, None] * rows + r[None, :]
        margin = tl.load(norms + at, mask=inside, other=0.0) * by_whole
        margin += tl.load(rests + at, mask=inside, other=0.0) * by_left
        shut = p + SHARE * tl.abs(p) + margin + raised <= 0
        maybe = tl.where(shut | (inside == 0), 0, 1)
        bits = tl.reshape(maybe, (LATENTS, WORDS, 32)) << tl.arange(0, 32)[None, None, :]
        tl.store(masks + i[:, None] * words + word[None, :], tl.sum(bits, 2), mask=here[:, None] & (word < words))
        count += tl.sum(maybe, 1)
    tl.store(counts + i, count, mask=here)


@triton.jit
def _list(masks, starts, latent_of, row_of, words, capacity, WORDS: tl.constexpr):
    i = tl.program_id(0)
    word = tl.arange(0, WORDS)
    bits = tl.load(masks + i.to(tl.int64) * words + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
    count = ones(bits)
    at = tl.load(starts + i) + tl.cumsum(count, 0) - count
    left = tl.max(count, 0)
    while left > 0:
        lower = bits & (bits - 1)
        place = ones((bits ^ lower) - 1)  # of the lowest bit
        there = (bits != 0) & (at >= 0) & (at < capacity)  # a sum beyond int32 is negative
        tl.store(row_of + at, word * 32 + place, mask=there)
        tl.store(latent_of + at, i, mask=there)
        at += 1
        bits = lower
        left -= 1


@triton.jit
def _decide(
    x, offset, W_enc, gate, starts, latent_of, row_of, values, opened, latents, d_sae, capacity, d_in: tl.constexpr,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ENTRIES
    end = tl.minimum(tl.minimum(tl.load(starts + latents), capacity), at + ENTRIES)
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    before = tl.full((), -1, tl.int32)
    w = tl.zeros((WIDTH,), tl.float32)
    moved = tl.zeros((WIDTH,), tl.float32)
    while at < end:
        i = tl.load(latent_of + at)
        other = k + tl.where(i != before, 0, WIDTH) < d_in  # entries of one latent stand together: its row is read once
        w = tl.load(W_enc + i.to(tl.int64) * d_in + k, mask=other, other=w)
        moved = tl.load(offset + (i // d_sae) * d_in + k, mask=other, other=moved)
        row = tl.load(x + tl.load(row_of + at).to(tl.int64) * d_in + k, mask=inside, other=0.0)
        a = tl.sum(w * (row - moved), 0)
        tl.store(values + at, a)
        tl.store(opened + at, tl.where(a + tl.load(gate + i) <= 0, 0, 1))
        before = i
        at += 1


@triton.jit
def _keep(
    opened, places, latent_of, row_of, values, kept_latents, kept_rows, kept_values, d_sae, rows, capacity, room,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * AT_A_TIME + tl.arange(0, AT_A_TIME)
    there = at < capacity
    there = there & (tl.load(opened + at, mask=there, other=0) > 0)
    place = tl.load(places + at, mask=there, other=1) - 1
    there = there & (place < room)
    i = tl.load(latent_of + at, mask=there, other=0)
    tl.store(kept_latents + place, i, mask=there)
    tl.store(kept_rows + place, i // d_sae * rows + tl.load(row_of + at, mask=there, other=0), mask=there)
    tl.store(kept_values + place, tl.load(values + at, mask=there, other=0.0), mask=there)
