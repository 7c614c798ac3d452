"""Which latents fire and how strongly, as a list: at the price of the encoder's product, where `encode` writes all.

Of a wide SAE's features one in a thousand is above 0. On a CPU the gates are found in the product as it stands
(`gate_kernels`), and what follows is done for the open ones alone; elsewhere features are listed on their device.
"""

import torch
from torch import Tensor

from gsae.train.architectures.gated import GatedParams
from gsae.train.architectures.relu import ReluParams
from gsae.train.sae import SAE

from .gate_lists import Open
from .stack import Scratch

try:
    from .gates_numba import open_gates
except ImportError:  # without numba: slower
    open_gates = None  # type: ignore[assignment]


class Firing:
    """Lists the features above 0 of one SAE, batch after batch, equal to `encode`'s to the bit."""

    def __init__(self, sae: SAE) -> None:
        self._sae, self.d_sae, params = sae, sae.d_sae, sae.params
        self._scratch = Scratch(params.W_enc.device)
        self._compiled = open_gates is not None and params.W_enc.device.type == "cpu"

    def __call__(self, x: Tensor) -> Open:
        """Features above 0 of raw activations x (rows, d_in), float32; the list is on the CPU."""
        params = self._sae.params
        if self._compiled and isinstance(params, GatedParams | ReluParams):
            return self._listed(params, x)
        f = self._sae.encode(x)
        row, latents = torch.nonzero(f > 0, as_tuple=True)
        starts = torch.searchsorted(row, torch.arange(len(x) + 1, device=x.device))
        return Open(starts.cpu(), latents.int().cpu(), f[row, latents].cpu())

    def _listed(self, params: GatedParams | ReluParams, x: Tensor) -> Open:
        inputs = torch.sub(x, params.b_dec, out=self._scratch("inputs", tuple(x.shape), x.dtype))
        pre = torch.mm(inputs, params.W_enc.T, out=self._scratch("pre", (len(x), self.d_sae), x.dtype))
        bias: Tensor = getattr(params, params.GATE)
        opened = open_gates(pre, bias, pre.numel(), self._scratch)
        assert opened is not None  # there is no limit
        at, gate = opened.latents, opened.values + bias[opened.latents]
        values = gate
        if isinstance(params, GatedParams):
            values = torch.exp(params.r_mag)[at] * opened.values + params.b_mag[at]
        above = (gate > 0) & (values > 0)  # a NaN is in the list, and does not fire
        kept = torch.nn.functional.pad(torch.cumsum(above, 0), (1, 0))
        return Open(kept[opened.starts], at[above], values[above])
