"""The passes of the sparse step on a GPU, for stacked SAEs: the twins of `sparse_plain`, in float32.

A program of `_rows` owns a row: one gather of decoder rows serves both reconstructions. A program of `_latents` owns
some latents: it reads the errors and inputs of a latent's rows, forms both derivatives and both gradients in registers
and takes the whole Adam step, so no gradient is written to memory and W_dec is not gathered a second time. A latent
with thousands of rows is added up in segments by `_segments` first, whose sums `_latents` combines in order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, unreachable"
# The kernels are typed by Triton.

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .adam import Adam
from .adam_plain import adam_vector
from .adam_triton import moved
from .batch_sums import BatchSums
from .buffers import Buffers
from .dense_triton import relu
from .gate_capacity import SEGMENT, most_segments
from .gates_triton import GateLists, Shadow, roundings, shadow_of
from .latent_vectors import GatedVectors, ReluVectors, Vectors, largest
from .stack import Stack
from .triton_support import row_in_registers

LATENTS = 8  # that a program of `_latents` takes
SUMS = tl.constexpr(5)  # numbers of a segment, beside its gradients
MOST = tl.constexpr(largest("r_mag"))


@dataclass(frozen=True)
class Derivatives:
    """What `rows_pass` leaves for `latents_pass`, in buffers.

    errors (2, saes, rows, d_in): the derivatives by both reconstructions (one for the baseline). features (capacity):
    of each entry of `GateLists`.
    """

    errors: Tensor
    features: Tensor


def rows_pass(
    lists: GateLists, x: Tensor, centre: Tensor, offset: Tensor, W_dec: Tensor, vectors: Vectors, buffers: Buffers
) -> tuple[Derivatives, Tensor]:
    """Reconstruct the inputs x (rows, d_in), less `centre`, by every SAE; offset (saes, d_in) = b_dec - centre.

    Also returns the sums of the batch (6, saes) float64, in the order of `BatchSums`.
    """
    (saes, d_sae, d_in), rows, capacity = W_dec.shape, len(x), len(lists.values)
    gated = isinstance(vectors, GatedVectors)
    errors = buffers("errors", (vectors.RECONSTRUCTIONS, saes, rows, d_in), torch.float32)
    features = buffers("features", (capacity,), torch.float32)
    sums = buffers("sums", (saes, rows, 6), torch.float32)
    _rows[(saes * rows,)](
        lists.row_starts, lists.entries, lists.latents, lists.values, x, centre, offset, W_dec, *_arrays(vectors),
        errors[0], errors[-1], features, sums, rows, d_sae, d_in, gated, **row_in_registers(d_in),
    )  # fmt: skip
    return Derivatives(errors, features), sums.sum(1, dtype=torch.float64).T


def latents_pass(
    lists: GateLists, derivatives: Derivatives, x: Tensor, offset: Tensor, l1: Tensor, stack: Stack, shadow: Shadow,
    adam: Adam, buffers: Buffers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take one Adam step for every open latent of the SAEs whose rate is above 0, and let `shadow` follow.

    l1 (saes,) = l1_coefficient / rows. Second moments first decay for the steps since their stamps. Returns the rows
    that each latent fired on (saes, d_sae), what W_enc contributes to the gradient of b_dec (saes, d_in), and which
    SAEs (saes,) have a gradient that is not finite; the latents concerned keep their weights.
    """
    p, v, rows, capacity = stack.params, stack.moments, len(x), len(lists.values)
    saes, d_sae, d_in = p["W_dec"].shape
    gated = stack.kind is GatedVectors
    width = row_in_registers(d_in)
    counts = lists.latent_starts.diff()
    segments = pad(torch.where(counts > SEGMENT, -(-counts // SEGMENT), 0).cumsum(0, dtype=torch.int32), (1, 0))
    most = most_segments(capacity, SEGMENT)
    owners = torch.searchsorted(
        segments[1:], torch.arange(most, device=x.device, dtype=torch.int32), right=True, out_int32=True
    )
    partial = buffers("segments", (most, 2, d_in), torch.float32)
    partial_sums = buffers("segment_sums", (most, SUMS.value), torch.float32)
    common = (
        lists.latent_starts, lists.rows, lists.values, derivatives.features, derivatives.errors[0],
        derivatives.errors[-1], x, offset, l1, segments, partial, partial_sums,
        p["W_dec"], p["r_mag"] if gated else p["b_enc"],
    )  # fmt: skip
    _segments[(most,)](owners, *common, saes * d_sae, d_sae, rows, d_in, gated, SEGMENT, **width)
    each = triton.cdiv(d_sae, LATENTS)
    fired = torch.zeros((saes, d_sae), dtype=torch.int32, device=x.device)
    bad = torch.zeros_like(fired)
    parts = buffers("parts", (saes, each, d_in), torch.float32)
    number = torch.full_like(stack.born.view(-1)[:1], adam.step) if isinstance(adam.step, int) else adam.step.view(1)
    names = ("b_gate", "b_mag") if gated else ("b_enc", "b_enc")
    _latents[(each, saes)](
        *common, p["W_enc"], v["W_enc"], v["W_dec"], *(p[name] for name in names), *(v[name] for name in names),
        v["r_mag"] if gated else v["b_enc"], shadow.W_enc, shadow.by_norm, shadow.by_rest, stack.stamps,
        adam.correction(stack.born).float(), adam.lr, fired, bad, parts, number, math.log2(adam.beta2),
        1 - adam.beta2, adam.eps, *roundings(d_in), d_sae, rows, d_in, gated, adam.row_clip, LATENTS, SEGMENT,
        **row_in_registers(d_in, warps=16),
    )  # fmt: skip
    return fired, parts.sum(1), (bad > 0).any(1)


def step(
    stack: Stack, x: Tensor, centre: Tensor, l1_coefficients: Tensor, adam: Adam, lists: GateLists, shadow: Shadow,
    buffers: Buffers,
) -> BatchSums:  # fmt: skip
    """Take the sparse step of every SAE of a stack at x (rows, d_in), the scaled inputs less `centre`.

    lists: the open gates at x. l1_coefficients (saes,). An SAE with a rate of 0, or with a loss that is not finite, is
    left unchanged; with a gradient that is not finite, the latents concerned are, and its sums are NaN.
    """
    p, rows = stack.params, len(x)
    offset = p["b_dec"] - centre
    derivatives, sums = rows_pass(lists, x, centre, offset, p["W_dec"], stack.vectors(), buffers)
    loss = sums[0] + sums[1] + l1_coefficients * sums[5]
    own = Adam(torch.where(torch.isfinite(loss), adam.lr, 0), adam.beta2, adam.eps, adam.step, adam.row_clip)
    l1 = (l1_coefficients / rows).float()
    fired, through, bad = latents_pass(lists, derivatives, x, offset, l1, stack, shadow, own, buffers)
    gradient = derivatives.errors[0].sum(1) - through
    correction = adam.correction(stack.born.new_zeros(1)).float()
    kept = adam_vector(p["b_dec"], gradient, stack.moments["b_dec"], own, correction)
    batch = BatchSums.of(sums, fired)
    batch.spoil(~kept | bad)
    return batch


def _arrays(vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    """What `_rows` reads of the vectors: biases of gates and magnitudes, and exp(r_mag)."""
    match vectors:
        case GatedVectors(b_gate, b_mag, r_mag):
            return b_gate, b_mag, r_mag.exp()
        case ReluVectors(b_enc):
            return b_enc, b_enc, b_enc


# -- kernels


@triton.jit
def _rows(
    row_starts, entries, latents, values, x, centre, offset, W_dec, gate, magnitude, rates, errors, auxiliary, features,
    sums, rows, d_sae, d_in: tl.constexpr, gated: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sae = row // rows
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    own = tl.load(x + row % rows * d_in + k, mask=inside, other=0.0)
    e = tl.load(offset + sae * d_in + k, mask=inside, other=0.0) - own
    other = e
    at, end = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    fired = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    while at < end:
        entry = tl.load(entries + at)
        i = tl.load(latents + entry).to(tl.int64)
        a = tl.load(values + entry)
        opening = a + tl.load(gate + i)
        f = opening
        w = tl.load(W_dec + i * d_in + k, mask=inside, other=0.0)
        if gated:
            f = relu(tl.load(rates + i) * a + tl.load(magnitude + i))
            other += opening * w
        e += f * w
        tl.store(features + entry, f)
        fired += (f > 0).to(tl.int32)
        total += opening
        at += 1
    whole = tl.where(inside, own + tl.load(centre + k, mask=inside, other=0.0), 0.0)
    x_hat = tl.where(inside, e + whole, 0.0)
    out = sums + row * 6
    tl.store(out, tl.sum(e * e, 0))
    tl.store(out + 1, tl.sum(other * other, 0) if gated else 0.0)
    tl.store(out + 2, tl.sum(x_hat * x_hat, 0))
    tl.store(out + 3, tl.sum(x_hat * whole, 0))
    tl.store(out + 4, fired.to(tl.float32))
    tl.store(out + 5, total)
    factor = 2.0 / rows
    tl.store(errors + row * d_in + k, e * factor, mask=inside)
    if gated:
        tl.store(auxiliary + row * d_in + k, other * factor, mask=inside)


@triton.jit
def _nothing(WIDTH: tl.constexpr):
    """The gradients of a latent over no entries, as `_added` returns them."""
    row = tl.zeros((WIDTH,), tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    return row, row, tl.full((), 0, tl.int32), zero, zero, zero, zero


@triton.jit
def _added(
    at, end, rows_of, values, features, errors, auxiliary, x, moved_by, l1, w, rate, sae, rows,
    d_in: tl.constexpr, gated: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one latent over its entries [at, end): both rows (WIDTH,), and five sums."""
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate = _nothing(WIDTH)
    while at < end:
        row = tl.load(rows_of + at).to(tl.int64)
        f = tl.load(features + at)
        e = tl.load(errors + row * d_in + k, mask=inside, other=0.0)
        by_f = tl.sum(e * w, 0)
        if gated:
            by_gate = tl.sum(tl.load(auxiliary + row * d_in + k, mask=inside, other=0.0) * w, 0) + l1
            by_magnitude = tl.where(f > 0, by_f, 0.0)
            da = rate * by_magnitude + by_gate
            sum_magnitude += by_magnitude
            sum_rate += by_magnitude * rate * tl.load(values + at)
        else:
            by_gate = by_f + l1
            da = by_gate
        encoder += da * (tl.load(x + (row - sae * rows) * d_in + k, mask=inside, other=0.0) - moved_by)
        decoder += f * e
        fired += (f > 0).to(tl.int32)
        total += da
        sum_gate += by_gate
        at += 1
    return encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate


@triton.jit
def _segments(
    owners, starts, rows_of, values, features, errors, auxiliary, x, offset, l1, segments, partial, partial_sums,
    W_dec, rescaling, latents, d_sae, rows, d_in: tl.constexpr, gated: tl.constexpr, SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if number < tl.load(segments + latents):
        i = tl.load(owners + number).to(tl.int64)
        sae = i // d_sae
        k = tl.arange(0, WIDTH)
        inside = k < d_in
        rate = tl.load(rescaling + i)
        rate = tl.exp(rate) if gated else rate * 0
        at = tl.load(starts + i) + (number - tl.load(segments + i)) * SEGMENT
        w = tl.load(W_dec + i * d_in + k, mask=inside, other=0.0)
        moved_by = tl.load(offset + sae * d_in + k, mask=inside, other=0.0)
        encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate = _added(
            at, tl.minimum(tl.load(starts + i + 1), at + SEGMENT), rows_of, values, features, errors, auxiliary,
            x, moved_by, tl.load(l1 + sae), w, rate, sae, rows, d_in, gated, WIDTH,
        )  # fmt: skip
        out = partial + number.to(tl.int64) * 2 * d_in + k
        tl.store(out, encoder, mask=inside)
        tl.store(out + d_in, decoder, mask=inside)
        out = partial_sums + number * SUMS
        tl.store(out, fired.to(tl.float32))
        tl.store(out + 1, total)
        tl.store(out + 2, sum_gate)
        tl.store(out + 3, sum_magnitude)
        tl.store(out + 4, sum_rate)


@triton.jit
def _combined(first, last, partial, partial_sums, d_in: tl.constexpr, WIDTH: tl.constexpr):
    """What `_added` returns, from the segments [first, last) of a latent, in order."""
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate = _nothing(WIDTH)
    while first < last:
        own = partial + first.to(tl.int64) * 2 * d_in + k
        encoder += tl.load(own, mask=inside, other=0.0)
        decoder += tl.load(own + d_in, mask=inside, other=0.0)
        sums = partial_sums + first * SUMS
        fired += tl.load(sums).to(tl.int32)
        total += tl.load(sums + 1)
        sum_gate += tl.load(sums + 2)
        sum_magnitude += tl.load(sums + 3)
        sum_rate += tl.load(sums + 4)
        first += 1
    return encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate


@triton.jit
def _entry(values, moments, i, g, lr, decay, rest, eps, correction, most, row_clip: tl.constexpr):
    """Adam's step of one entry of a vector; returns 1 where its gradient is not finite, which leaves it unchanged."""
    v = decay * tl.load(moments + i) + rest * g * g
    update = lr * g / (tl.sqrt(v) * correction + eps)
    if row_clip:
        update = tl.where(update > lr, lr, tl.where(update < -lr, -lr, update))
    finite = v - v == 0
    before = tl.load(values + i)
    after = tl.minimum(before - update, most)
    tl.store(moments + i, v)
    tl.store(values + i, tl.where(finite, after, before))
    return tl.where(finite, 0, 1)


@triton.jit
def _latents(
    starts, rows_of, values, features, errors, auxiliary, x, offset, l1, segments, partial, partial_sums,
    W_dec, rescaling, W_enc, v_enc, v_dec, gate, magnitude, v_gate, v_magnitude, v_rescaling, low, by_norm, by_rest,
    stamps, corrections, learning_rates, fired_on, bad, parts, number, log2_beta2, rest, eps, grown, lost, d_sae, rows,
    d_in: tl.constexpr, gated: tl.constexpr, row_clip: tl.constexpr, LATENTS: tl.constexpr, SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block, sae = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < d_in
    part = tl.zeros((WIDTH,), tl.float32)
    moved_by = tl.load(offset + sae * d_in + k, mask=inside, other=0.0)
    penalty = tl.load(l1 + sae)
    lr, step = tl.load(learning_rates + sae), tl.load(number)
    latent = block * LATENTS
    while latent < tl.minimum(block * LATENTS + LATENTS, d_sae):
        i = sae * d_sae + latent
        at, end = tl.load(starts + i), tl.load(starts + i + 1)
        if (end > at) & (lr > 0):
            own = i * d_in + k
            scaling = tl.load(rescaling + i)
            rate = tl.exp(scaling) if gated else scaling * 0
            w = tl.load(W_dec + own, mask=inside, other=0.0)
            if end - at > SEGMENT:
                encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate = _combined(
                    tl.load(segments + i), tl.load(segments + i + 1), partial, partial_sums, d_in, WIDTH
                )
            else:
                encoder, decoder, fired, total, sum_gate, sum_magnitude, sum_rate = _added(
                    at, end, rows_of, values, features, errors, auxiliary, x, moved_by, penalty, w, rate, sae,
                    rows, d_in, gated, WIDTH,
                )  # fmt: skip
            missed = (step - tl.load(stamps + i)).to(tl.float32)
            decay = tl.exp2(log2_beta2 * missed)
            correction = tl.load(corrections + i)
            tl.store(fired_on + i, fired)
            # The decoder's row: its gradient is projected first, and it has unit norm afterwards.
            decoder -= tl.sum(decoder * w, 0) * w
            v = tl.load(v_dec + own, mask=inside, other=0.0)
            w, v, finite = moved(w, decoder, v, lr, decay, rest, eps, correction, d_in, row_clip)
            wrong = tl.where(finite, 0, 1)
            w = tl.where(finite, w / tl.sqrt(tl.sum(w * w, 0)), w)
            tl.store(W_dec + own, w, mask=inside)
            tl.store(v_dec + own, v, mask=inside)
            # The encoder's.
            w = tl.load(W_enc + own, mask=inside, other=0.0)
            part += total * w
            v = tl.load(v_enc + own, mask=inside, other=0.0)
            w, v, finite = moved(w, encoder, v, lr, decay, rest, eps, correction, d_in, row_clip)
            wrong += tl.where(finite, 0, 1)
            tl.store(W_enc + own, w, mask=inside)
            tl.store(v_enc + own, v, mask=inside)
            rounded, whole, left = shadow_of(w, grown, lost)
            tl.store(low + own, rounded, mask=inside)
            tl.store(by_norm + i, whole)
            tl.store(by_rest + i, left)
            no_limit = float("inf")
            wrong += _entry(gate, v_gate, i, sum_gate, lr, decay, rest, eps, correction, no_limit, row_clip)
            if gated:
                wrong += _entry(
                    magnitude, v_magnitude, i, sum_magnitude, lr, decay, rest, eps, correction, no_limit, row_clip
                )
                wrong += _entry(rescaling, v_rescaling, i, sum_rate, lr, decay, rest, eps, correction, MOST, row_clip)
            tl.store(bad + i, wrong)
            tl.store(stamps + i, step)  # last: every warp has read the old stamp before the sums above
        latent += 1
    tl.store(parts + (sae * tl.num_programs(0) + block) * d_in + k, part, mask=inside)
