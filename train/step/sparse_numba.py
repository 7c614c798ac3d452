"""The passes of the sparse step, compiled for the CPU.

`open_gates` lists the open gates and `by_latent` sorts the list (`gates_numba`). `rows_pass` reads the decoder row of
each open latent for both reconstructions and then, while it is in the cache, for both inner products. `latents_pass`
sums the gradients of one latent and takes its Adam step, projection and renormalisation in the cache: no gradient is
written to memory, no row of an untouched latent is read.

In all about 6 d_in multiply-adds for each open gate, and 4 rows of d_in read. Sums have one order for any number of
threads. `sparse_plain` has the twins in plain torch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, assignment, var-annotated"
# Typed by numba, for float32 and float64 alike.

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from .adam import Adam
from .adam_numba import kept
from .buffers import Buffers
from .compiling import compiled
from .gate_lists import Derivatives, GatesByLatent, OpenGates
from .gates_numba import by_latent, open_gates
from .latent_vectors import GatedVectors, ReluVectors, Vectors, largest
from .stack import Stack
from .vector_loops import add_row, add_rows, dot, dots

__all__ = ["by_latent", "latents_pass", "open_gates", "rows_pass"]

ROWS, LATENTS = 16, 32  # that a thread takes at a time
MOST = largest("r_mag")


# What the compiled loops take: numpy arrays by name. Only a Gated SAE reads `magnitude` and `rate`; for the baseline,
# the arrays of `gate` stand in their place, so that both are compiled from one code.


class _Gates(NamedTuple):
    starts: Any
    latents: Any
    values: Any


class _ByLatent(NamedTuple):
    starts: Any
    entries: Any
    rows: Any


class _Inputs(NamedTuple):
    x: Any
    centre: Any
    offset: Any


class _Vectors(NamedTuple):
    gate: Any
    magnitude: Any
    rate: Any  # exp(r_mag)


class _Out(NamedTuple):
    errors: Any
    records: Any
    sums: Any
    columns: Any


class _Trained(NamedTuple):
    values: Any
    moments: Any


class _Parameters(NamedTuple):
    encoder: _Trained
    decoder: _Trained
    gate: _Trained
    magnitude: _Trained
    rescaling: _Trained  # r_mag


class _Rates(NamedTuple):
    lr: float
    beta2: float
    eps: float
    step: int
    row_clip: bool
    correction: Any
    stamps: Any


# -- rows: reconstructions, errors, and the derivatives of every open gate


def rows_pass(
    opened: OpenGates, x: Tensor, centre: Tensor, offset: Tensor, W_dec: Tensor, vectors: Vectors, l1: float,
    buffers: Buffers,
) -> Derivatives:  # fmt: skip
    """Reconstruct the inputs x (rows, d_in), less `centre`, and form the derivatives of eq. 8 (or 4) by the gates.

    offset (d_in) = b_dec - centre. l1 = l1_coefficient / rows.
    """
    rows, d_in = x.shape
    count, blocks = len(opened.latents), -(-rows // ROWS)
    errors = buffers("errors", (rows, d_in), x.dtype)
    records = buffers("records", (count, 4), x.dtype)
    sums = buffers("sums", (rows, 6), torch.float64)
    columns = buffers("columns", (blocks, d_in), x.dtype)
    match vectors:
        case GatedVectors(b_gate, b_mag, r_mag):
            arrays = _Vectors(b_gate.numpy(), b_mag.numpy(), r_mag.exp().numpy())
        case ReluVectors(b_enc):
            arrays = _Vectors(*[b_enc.numpy()] * 3)
    _rows(
        _Gates(opened.starts.numpy(), opened.latents.numpy(), opened.values.numpy()),
        _Inputs(x.numpy(), centre.numpy(), offset.numpy()),
        W_dec.numpy(),
        arrays,
        l1,
        isinstance(vectors, GatedVectors),
        _Out(errors.numpy(), records.numpy(), sums.numpy(), columns.numpy()),
    )
    return Derivatives(errors, records, columns.sum(0), sums.sum(0))


def _loop_rows(opened, inputs, W_dec, vectors, l1, gated, out):
    starts, latents, values = opened
    x, centre, offset = inputs
    bias, magnitude, rate = vectors
    errors, records, sums, columns = out
    rows, d_in = x.shape
    one = W_dec.dtype.type
    factor, penalty, zero = one(2 / rows), one(l1), one(0)
    for block in numba.prange(columns.shape[0]):
        e = np.empty((2, d_in), W_dec.dtype)
        whole = np.empty((2, d_in), W_dec.dtype)
        column = columns[block]
        column[:] = zero
        for r in range(block * ROWS, min(rows, (block + 1) * ROWS)):
            begin, end = starts[r], starts[r + 1]
            fired, total = 0, 0.0
            for at in range(begin, end):
                i, a = latents[at], values[at]
                gate = a + bias[i]
                f = gate
                if gated:
                    f = rate[i] * a + magnitude[i]
                    f = zero if f <= zero else f
                records[at, 0], records[at, 1], records[at, 3] = f, gate, a
                fired += f > zero
                total += gate
            for k in range(d_in):
                e[0, k] = e[1, k] = offset[k] - x[r, k]
                whole[1, k] = x[r, k] + centre[k]
            _add_up(e, W_dec, latents, records, begin, end, 1 + gated)
            sums[r, 0] = dot(e[0], e, 0)
            sums[r, 1] = dot(e[1], e, 1) if gated else zero
            for k in range(d_in):
                whole[0, k] = e[0, k] + whole[1, k]
                e[0, k] *= factor
                e[1, k] *= factor
                errors[r, k] = e[0, k]
                column[k] += e[0, k]
            sums[r, 2], sums[r, 3] = dot(whole[0], whole, 0), dot(whole[0], whole, 1)
            sums[r, 4], sums[r, 5] = fired, total
            _derivatives(e, W_dec, latents, records, begin, end, penalty, gated)


@numba.njit(cache=True, error_model="numpy")
def _add_up(e, W_dec, latents, records, begin, end, copies):
    """Add to e (2, d_in) the decoder rows of a row's entries, times their features and, if asked, their gates."""
    at = begin
    while at + 4 <= end:
        a, b, c, d = latents[at], latents[at + 1], latents[at + 2], latents[at + 3]
        for copy in range(copies):
            add_rows(
                e[copy], W_dec, a, b, c, d,
                records[at, copy], records[at + 1, copy], records[at + 2, copy], records[at + 3, copy],
            )  # fmt: skip
        at += 4
    while at < end:
        for copy in range(copies):
            add_row(e[copy], W_dec, latents[at], records[at, copy])
        at += 1


@numba.njit(cache=True, error_model="numpy")
def _derivatives(e, W_dec, latents, records, begin, end, penalty, gated):
    """Records (f, gate, ., a) become (f, derivative by pi_mag, derivative by pi_gate, a).

    From the last entry to the first, as the last decoder rows that were added are still in the cache.
    """
    zero = e.dtype.type(0)
    at = end
    while at - 4 >= begin:
        at -= 4
        a, b, c, d = latents[at], latents[at + 1], latents[at + 2], latents[at + 3]
        by_f = dots(e[0], W_dec, a, b, c, d)
        by_gate = dots(e[1], W_dec, a, b, c, d) if gated else by_f
        for j in range(4):
            records[at + j, 1] = by_f[j] if gated and records[at + j, 0] > zero else zero
            records[at + j, 2] = by_gate[j] + penalty
    while at > begin:
        at -= 1
        by_one = dot(e[0], W_dec, latents[at])
        by_other = dot(e[1], W_dec, latents[at]) if gated else by_one
        records[at, 1] = by_one if gated and records[at, 0] > zero else zero
        records[at, 2] = by_other + penalty


# -- latents: gradients, Adam, projection, unit norm


def latents_pass(
    listed: GatesByLatent, derivatives: Derivatives, x: Tensor, one: Stack, adam: Adam, fired: Tensor, buffers: Buffers
) -> tuple[Tensor, bool]:
    """Take one Adam step for every latent in the list, of one SAE, in place; x (rows, d_in): the inputs less b_dec.

    Second moments first decay for the steps since their stamps. fired (d_sae) receives the number of rows that each
    latent fired on. Returns what W_enc contributes to the gradient of b_dec (d_in), and whether all gradients are
    finite; latents with others keep their weights.
    """
    d_sae, d_in = one.params["W_dec"].shape
    parts = buffers("parts", (-(-d_sae // LATENTS), d_in), x.dtype)
    bad = torch.zeros(len(parts), dtype=torch.bool)
    correction = adam.correction(one.born).to(x).numpy()
    gated, names = _names(one.kind)
    trained = (_Trained(one.params[name].numpy(), one.moments[name].numpy()) for name in ("W_enc", "W_dec", *names))
    _latents(
        _ByLatent(listed.starts.numpy(), listed.entries.numpy(), listed.rows.numpy()),
        derivatives.records.numpy(),
        derivatives.errors.numpy(),
        x.numpy(),
        _Parameters(*trained),
        gated,
        _Rates(float(adam.lr), adam.beta2, adam.eps, adam.step, adam.row_clip, correction, one.stamps.numpy()),
        fired.numpy(),
        parts.numpy(),
        bad.numpy(),
    )
    return parts.sum(0), not bool(bad.any())


def _names(kind: type[Vectors]) -> tuple[bool, tuple[str, str, str]]:
    """Whether SAEs of a kind are gated, and the names of the parameters after the decoder in `_Parameters`."""
    if kind is GatedVectors:
        return True, ("b_gate", "b_mag", "r_mag")
    return False, ("b_enc",) * 3


def _loop_latents(listed, records, errors, x, parameters, gated, rates, fired, parts, bad):
    starts, entries, rows = listed
    (W_enc, v_enc), (W_dec, v_dec), (b_gate, v_gate), (b_mag, v_mag), (r_mag, v_rate) = parameters
    lr, beta2, eps, step, row_clip, correction, stamps = rates
    d_sae, d_in = W_dec.shape
    one = W_dec.dtype.type
    zero, rest, rate, small, most = one(0), one(1 - beta2), one(lr), one(eps), one(MOST)
    for block in numba.prange(parts.shape[0]):
        g = np.empty((2, d_in), W_dec.dtype)
        update = np.empty((2, d_in), W_dec.dtype)
        part = parts[block]
        part[:] = zero
        for i in range(block * LATENTS, min(d_sae, (block + 1) * LATENTS)):
            begin, end = starts[i], starts[i + 1]
            if begin == end:
                continue
            decay, corrected = one(beta2 ** (step - stamps[i])), correction[i]
            stamps[i] = step
            scale = np.exp(r_mag[i]) if gated else zero
            sums = _gradients(g, entries, rows, records, errors, x, begin, end, scale)
            fired[i] = sums[0]
            add_row(part, W_enc, i, sums[1])
            # The encoder's row.
            _update(update, g[0], v_enc[i], decay, rest, rate, corrected, small)
            share = one(kept(dot(update[0], update, 1), rate, d_in, row_clip))
            if share == share:
                for k in range(d_in):
                    W_enc[i, k] -= share * update[0, k]
            # The decoder's: its gradient is projected first, and it has unit norm afterwards.
            along = dot(g[1], W_dec, i)
            for k in range(d_in):
                g[1, k] -= along * W_dec[i, k]
            _update(update, g[1], v_dec[i], decay, rest, rate, corrected, small)
            other = one(kept(dot(update[0], update, 1), rate, d_in, row_clip))
            if other == other:
                for k in range(d_in):
                    W_dec[i, k] -= other * update[0, k]
                shrink = one(1) / np.sqrt(dot(W_dec[i], W_dec, i))
                for k in range(d_in):
                    W_dec[i, k] *= shrink
            finite = share == share and other == other
            finite &= _adam(b_gate, v_gate, i, sums[2], decay, rest, rate, corrected, small, row_clip)
            if gated:
                finite &= _adam(b_mag, v_mag, i, sums[3], decay, rest, rate, corrected, small, row_clip)
                finite &= _adam(r_mag, v_rate, i, sums[4], decay, rest, rate, corrected, small, row_clip)
                r_mag[i] = min(r_mag[i], most)
            bad[block] |= not finite


@numba.njit(cache=True, error_model="numpy")
def _update(update, g, v, decay, rest, rate, corrected, small):
    """Adam's update of a row, in update[0]; update[1] is the same, or NaN where a second moment overflowed."""
    zero = update.dtype.type(0)
    for k in range(len(g)):
        moment = decay * v[k] + rest * (g[k] * g[k])
        v[k] = moment
        u = rate * g[k] / (np.sqrt(moment) * corrected + small)
        update[0, k] = u
        update[1, k] = u + moment * zero


@numba.njit(cache=True, error_model="numpy")
def _gradients(g, entries, rows, records, errors, x, begin, end, scale):
    """Sum one latent's gradients of W_enc and W_dec into g (2, d_in); return what else is summed over its entries."""
    zero = g.dtype.type(0)
    g[:] = zero
    fired, total, by_gate, by_mag, by_rate = 0, zero, zero, zero, zero
    f, da = np.empty(4, g.dtype), np.empty(4, g.dtype)
    for first in range(begin, end, 4):
        several = min(4, end - first)
        for j in range(several):
            record = records[entries[first + j]]
            f[j], da[j] = record[0], scale * record[1] + record[2]
            fired += record[0] > zero
            total += da[j]
            by_gate += record[2]
            by_mag += record[1]
            by_rate += record[1] * record[3] * scale
        if several == 4:
            a, b, c, d = rows[first], rows[first + 1], rows[first + 2], rows[first + 3]
            add_rows(g[0], x, a, b, c, d, da[0], da[1], da[2], da[3])
            add_rows(g[1], errors, a, b, c, d, f[0], f[1], f[2], f[3])
        else:
            for j in range(several):
                add_row(g[0], x, rows[first + j], da[j])
                add_row(g[1], errors, rows[first + j], f[j])
    return fired, total, by_gate, by_mag, by_rate


@numba.njit(cache=True, error_model="numpy")
def _adam(p, v, i, g, decay, rest, rate, corrected, small, row_clip):
    """The step of one entry of a vector; returns whether its gradient is finite."""
    v[i] = decay * v[i] + rest * (g * g)
    u = rate * g / (np.sqrt(v[i]) * corrected + small)
    if row_clip:
        u = min(max(u, -rate), rate)
    finite = np.isfinite(v[i])
    if finite:
        p[i] -= u
    return finite


_rows = compiled(_loop_rows)
_latents = compiled(_loop_latents)
