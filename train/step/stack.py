"""What a fast step works on: views of SAEs of one architecture and width, stacked along the first dimension."""

from dataclasses import dataclass, fields

from torch import Tensor

from .latent_vectors import Vectors


@dataclass
class Stack:
    """Parameters and second moments (saes, ...), by name. A step changes them in place.

    kind: the type of the parameters with one number for each latent. operands: W_enc and W_dec in the type of the
    dense products; the parameters themselves if they have that type. born (saes, d_sae): the step after which the
    second moments of each latent began. stamps (saes, d_sae): the step after which they are up to date.
    """

    kind: type[Vectors]
    params: dict[str, Tensor]
    moments: dict[str, Tensor]
    operands: dict[str, Tensor]
    born: Tensor
    stamps: Tensor

    def vectors(self) -> Vectors:
        """The parameters with one number for each latent."""
        return self.kind(**{each.name: self.params[each.name] for each in fields(self.kind)})

    def __getitem__(self, which: slice | int) -> "Stack":
        """Some of the SAEs, or one; the tensors of one lack the first dimension."""
        params, moments, operands = (
            {name: tensor[which] for name, tensor in kind.items()}
            for kind in (self.params, self.moments, self.operands)
        )
        return Stack(self.kind, params, moments, operands, self.born[which], self.stamps[which])
