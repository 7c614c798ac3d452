"""The passes of the sparse step in plain torch, for where numba is missing: exact, on any float type, and slower.

Sums of rows are embedding bags, over the open gates of a row and over those of a latent; inner products are taken for
some entries at a time. `sparse_kernels` does the same in passes that leave nothing in memory between them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import adam as optim
from .adam import Adam
from .gate_lists import ByLatent, Errors, Open
from .stack import Scratch, Stack

ENTRIES = 4096  # whose rows are gathered at a time


def open_gates(pre: Tensor, bias: Tensor, limit: int, scratch: Scratch) -> Open | None:
    """As `sparse_kernels.open_gates`."""
    opened = ~(pre + bias <= 0)
    starts = torch.zeros(len(pre) + 1, dtype=torch.int64)
    torch.cumsum(opened.sum(1), 0, out=starts[1:])
    if int(starts[-1]) > limit:
        return None
    return Open(starts, opened.nonzero()[:, 1], pre[opened])


def rows_pass(
    opened: Open, x: Tensor, centre: Tensor, offset: Tensor, W_dec: Tensor, vectors: list[Tensor], l1: float,
    scratch: Scratch,
) -> Errors:  # fmt: skip
    """As `sparse_kernels.rows_pass`."""
    at, a = opened.latents, opened.values
    gate = a + vectors[0][at]
    gated = len(vectors) == 3
    f = torch.relu(vectors[2].exp()[at] * a + vectors[1][at]) if gated else gate
    e = _sums(W_dec, at, opened.starts, f) + (offset - x)
    whole = x + centre
    x_hat = e + whole
    auxiliary = _sums(W_dec, at, opened.starts, gate) + (offset - x) if gated else torch.zeros_like(e)
    totals = e.square(), auxiliary.square(), x_hat.square(), x_hat * whole, f > 0, gate
    sums = torch.stack([total.sum(dtype=torch.float64) for total in totals])
    e, auxiliary = e * (2 / len(x)), auxiliary * (2 / len(x))
    row = _groups(opened.starts)
    by_f = _products(e, row, W_dec, at)
    by_gate = (_products(auxiliary, row, W_dec, at) if gated else by_f) + l1
    by_mag = torch.where(f > 0, by_f, 0) if gated else torch.zeros_like(f)
    return Errors(e, torch.stack([f, by_mag, by_gate, a], 1), e.sum(0), sums)


def by_latent(opened: Open, d_sae: int, scratch: Scratch) -> ByLatent:
    """As `sparse_kernels.by_latent`."""
    entries = torch.sort(opened.latents, stable=True)[1]
    starts = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(opened.latents, minlength=d_sae), 0, out=starts[1:])
    return ByLatent(starts, entries, _groups(opened.starts)[entries])


def latents_pass(
    listed: ByLatent, errors: Errors, x: Tensor, one: Stack, adam: Adam, fired: Tensor, scratch: Scratch
) -> Tensor:
    """As `sparse_kernels.latents_pass`."""
    params, moments, d_sae = one.params, one.moments, len(one.born)
    touched = (listed.starts[1:] > listed.starts[:-1]).nonzero()[:, 0]
    f, by_mag, by_gate, a = errors.records[listed.entries].unbind(1)
    latent = _groups(listed.starts)
    rate = params["r_mag"].exp()[latent] if "r_mag" in params else torch.zeros_like(f)
    da = rate * by_mag + by_gate

    def per_latent(values: Tensor) -> Tensor:
        return values.new_zeros(d_sae).index_add_(0, latent, values)

    fired.copy_(per_latent((f > 0).int()))
    through = per_latent(da) @ params["W_enc"]
    gradients = {
        "W_enc": _sums(x, listed.rows, listed.starts, da)[touched],
        "W_dec": _sums(errors.errors, listed.rows, listed.starts, f)[touched],
    }
    biases = (by_gate, by_mag, by_mag * rate * a)
    gradients |= {name: per_latent(values)[touched] for name, values in zip(one.vectors(), biases, strict=False)}
    missed = (adam.beta2 ** (adam.step - 1 - one.stamps[touched]).double()).to(x)
    rates = adam.lr.view(1), adam.beta2, adam.correction(one.born[touched]).to(x)[None], adam.eps
    for name, gradient in gradients.items():
        p, g = params[name][touched][None], gradient[None]
        v = (moments[name][touched] * missed.view(-1, *[1] * (g.dim() - 2)))[None]
        if name == "W_dec":
            optim.adam_decoder(p, p, g, v, *rates)
        elif name == "W_enc":
            optim.adam_encoder(p, p, g, g.new_zeros(g.shape[:2]), g.new_zeros(1, x.shape[1]), v, *rates)
        else:
            optim.adam_vector(p, g, v, *rates)
        params[name][touched], moments[name][touched] = p[0], v[0]
    one.stamps[touched] = adam.step
    return through


def _groups(starts: Tensor) -> Tensor:
    """The row, or latent, of every entry of a list."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())


def _sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted rows of a table, a group at a time."""
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _products(left: Tensor, rows: Tensor, right: Tensor, latents: Tensor) -> Tensor:
    """Inner products of rows of two matrices, pair by pair."""

    def some() -> Iterator[Tensor]:
        for first in range(0, len(rows), ENTRIES):
            here = slice(first, first + ENTRIES)
            yield (left[rows[here]] * right[latents[here]]).sum(1)

    return torch.cat([left.new_empty(0), *some()])
