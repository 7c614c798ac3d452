"""Which latents fire and how strongly, as a list, for the cost of the encoder product; `encode` writes all features.

Of the features of a wide SAE one in a thousand is above 0. On a CPU the open gates are found in the product
(`gates_numba`) and everything else is computed for them alone; elsewhere, and for other architectures, features are
listed after `encode`.
"""

import torch
from torch import Tensor

from gsae.train.architectures.gated import GatedParams
from gsae.train.architectures.relu import ReluParams
from gsae.train.sae import SAE

from .buffers import Buffers
from .gate_lists import OpenGates
from .gates_numba import open_gates


class Firing:
    """Lists the features above 0 of one SAE, batch after batch. They are equal to those of `encode`, bit for bit."""

    def __init__(self, sae: SAE) -> None:
        self._sae, self.d_sae, device = sae, sae.d_sae, sae.params.W_enc.device
        self._buffers = Buffers(device)
        self.compiled = device.type == "cpu"

    def __call__(self, x: Tensor) -> OpenGates:
        """Features above 0 of raw activations x (rows, d_in), float32; the list is on the CPU."""
        params = self._sae.params
        if self.compiled and isinstance(params, GatedParams | ReluParams):
            return self._listed(params, x)
        f = self._sae.encode(x)
        row, latents = torch.nonzero(f > 0, as_tuple=True)
        starts = torch.searchsorted(row, torch.arange(len(x) + 1, device=x.device))
        return OpenGates(starts.cpu(), latents.int().cpu(), f[row, latents].cpu())

    def _listed(self, params: GatedParams | ReluParams, x: Tensor) -> OpenGates:
        inputs = torch.sub(x, params.b_dec, out=self._buffers("inputs", tuple(x.shape), x.dtype))
        pre = torch.mm(inputs, params.W_enc.T, out=self._buffers("pre", (len(x), self.d_sae), x.dtype))
        bias: Tensor = getattr(params, params.GATE)
        opened = open_gates(pre, bias, pre.numel(), self._buffers)
        assert opened is not None  # there is no limit
        at, gate = opened.latents, opened.values + bias[opened.latents]
        values = gate
        if isinstance(params, GatedParams):
            values = torch.exp(params.r_mag)[at] * opened.values + params.b_mag[at]
        above = (gate > 0) & (values > 0)  # a NaN is in the list and does not fire
        kept = torch.nn.functional.pad(torch.cumsum(above, 0), (1, 0))
        return OpenGates(kept[opened.starts], at[above], values[above])
