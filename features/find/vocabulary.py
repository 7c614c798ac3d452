"""What only the language model knows of tokens: their texts, and how a direction at the site moves their logits.

It comes in as values, because features are found without the language model and its libraries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

LogitEffects = Callable[[Tensor], Tensor]
"""Maps directions at a site (n, d_in) to what a unit of each adds to the logits, (n, vocabulary)."""


@dataclass(frozen=True)
class Vocabulary:
    """texts: of every token id; None without a tokenizer. logit_effects: None without weights, or at other sites."""

    texts: Sequence[str] | None = None
    logit_effects: LogitEffects | None = None
