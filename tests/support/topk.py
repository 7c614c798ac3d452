"""An architecture that is not in the registry: a top-k SAE, of which each row opens the K largest latents."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gsae.train.architectures.base import Params, Terms


@dataclass(frozen=True)
class TopKParams(Params):
    """W_enc, W_dec (d_sae, d_in); b_dec (d_in); b_enc (d_sae)."""

    b_enc: Tensor

    K: ClassVar[int] = 4
    GATE: ClassVar[str] = "b_enc"
    BIASES: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")
    PRODUCTS: ClassVar[int] = 5
    PENALISED: ClassVar[bool] = False
    SAVED_AS: ClassVar[str] = "gsae_topk"

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in): the K largest pre-activations of each row, if above 0."""
        pi = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        return torch.relu(pi) * (pi >= pi.topk(self.K).values[:, -1:])

    def terms(self, x: Tensor) -> Terms:
        """The squared error alone: K sets the sparsity."""
        f = self.encode(x)
        zeros = f.new_zeros(len(x))
        return Terms(f, self.decode(f), zeros, zeros)
