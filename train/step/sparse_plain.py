"""The passes of the sparse step in plain torch, in any float type: the test of the compiled twins in `sparse_numba`.

Sums of rows are embedding bags, over the open gates of a row and over those of a latent; inner products are taken for
some entries at a time.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .adam import Adam
from .adam_plain import adam_decoder, adam_rows, adam_vector
from .buffers import Buffers
from .gate_lists import Derivatives, GatesByLatent, OpenGates
from .latent_vectors import GatedVectors, ReluVectors, Vectors, largest
from .stack import Stack

ENTRIES = 4096  # that inner products are taken of at a time


def open_gates(pre: Tensor, bias: Tensor, limit: int, buffers: Buffers) -> OpenGates | None:
    """As `gates_numba.open_gates`."""
    opened = ~(pre + bias <= 0)
    starts = torch.zeros(len(pre) + 1, dtype=torch.int64)
    torch.cumsum(opened.sum(1), 0, out=starts[1:])
    if int(starts[-1]) > limit:
        return None
    return OpenGates(starts, opened.nonzero()[:, 1], pre[opened])


def rows_pass(
    opened: OpenGates, x: Tensor, centre: Tensor, offset: Tensor, W_dec: Tensor, vectors: Vectors, l1: float,
    buffers: Buffers,
) -> Derivatives:  # fmt: skip
    """As `sparse_numba.rows_pass`."""
    at, a = opened.latents, opened.values
    gate = a + vectors.gate[at]
    match vectors:
        case GatedVectors(_, b_mag, r_mag):
            f = torch.relu(r_mag.exp()[at] * a + b_mag[at])
            auxiliary = _sums(W_dec, at, opened.starts, gate) + (offset - x)
        case ReluVectors():
            f, auxiliary = gate, torch.zeros_like(x)
    e = _sums(W_dec, at, opened.starts, f) + (offset - x)
    whole = x + centre
    x_hat = e + whole
    totals = e.square(), auxiliary.square(), x_hat.square(), x_hat * whole, f > 0, gate
    sums = torch.stack([total.sum(dtype=torch.float64) for total in totals])
    e, auxiliary = e * (2 / len(x)), auxiliary * (2 / len(x))
    row = _groups(opened.starts)
    by_f = _products(e, row, W_dec, at)
    match vectors:
        case GatedVectors():
            by_mag, by_gate = torch.where(f > 0, by_f, 0), _products(auxiliary, row, W_dec, at) + l1
        case ReluVectors():
            by_mag, by_gate = torch.zeros_like(f), by_f + l1
    return Derivatives(e, torch.stack([f, by_mag, by_gate, a], 1), e.sum(0), sums)


def by_latent(opened: OpenGates, d_sae: int, buffers: Buffers) -> GatesByLatent:
    """As `gates_numba.by_latent`."""
    entries = torch.sort(opened.latents, stable=True)[1]
    starts = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(opened.latents, minlength=d_sae), 0, out=starts[1:])
    return GatesByLatent(starts, entries, _groups(opened.starts)[entries])


def latents_pass(
    listed: GatesByLatent, derivatives: Derivatives, x: Tensor, one: Stack, adam: Adam, fired: Tensor, buffers: Buffers
) -> tuple[Tensor, bool]:
    """As `sparse_numba.latents_pass`."""
    params, moments, d_sae = one.params, one.moments, len(one.born)
    touched = (listed.starts[1:] > listed.starts[:-1]).nonzero()[:, 0]
    f, by_mag, by_gate, a = derivatives.records[listed.entries].unbind(1)
    latent = _groups(listed.starts)

    def per_latent(values: Tensor) -> Tensor:
        return values.new_zeros(d_sae).index_add_(0, latent, values)

    by_vectors: Vectors
    match one.vectors():
        case GatedVectors(_, _, r_mag):
            rate = r_mag.exp()[latent]
            da = rate * by_mag + by_gate
            by_vectors = GatedVectors(per_latent(by_gate), per_latent(by_mag), per_latent(by_mag * rate * a))
        case ReluVectors():
            da = by_gate
            by_vectors = ReluVectors(per_latent(by_gate))
    fired.copy_(per_latent((f > 0).int()))
    through = per_latent(da) @ params["W_enc"]
    gradients = {
        "W_enc": _sums(x, listed.rows, listed.starts, da)[touched],
        "W_dec": _sums(derivatives.errors, listed.rows, listed.starts, f)[touched],
    }
    gradients |= {name: values[touched] for name, values in vars(by_vectors).items()}
    missed = (adam.beta2 ** (adam.step - 1 - one.stamps[touched]).double()).to(x)
    own, correction = replace(adam, lr=adam.lr.view(1)), adam.correction(one.born[touched]).to(x)[None]
    finite = True
    for name, gradient in gradients.items():
        p, g = params[name][touched][None], gradient[None]
        v = (moments[name][touched] * missed.view(-1, *[1] * (g.dim() - 2)))[None]
        if name == "W_dec":
            kept = adam_decoder(p, p, g, v, own, correction)
        elif name == "W_enc":
            kept = adam_rows(p, p, g, v, own, correction)
        else:
            kept = adam_vector(p, g, v, own, correction, largest(name))
        finite = finite and bool(kept)
        params[name][touched], moments[name][touched] = p[0], v[0]
    one.stamps[touched] = adam.step
    return through, finite


def _groups(starts: Tensor) -> Tensor:
    """The row, or the latent, of every entry of a list."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())


def _sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted rows of a table, for each row or latent of a list."""
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _products(left: Tensor, rows: Tensor, right: Tensor, latents: Tensor) -> Tensor:
    """Inner products of rows of two matrices, pair by pair."""

    def some() -> Iterator[Tensor]:
        for first in range(0, len(rows), ENTRIES):
            here = slice(first, first + ENTRIES)
            yield (left[rows[here]] * right[latents[here]]).sum(1)

    return torch.cat([left.new_empty(0), *some()])
