"""How long a context may be: a table of positions is a limit, the trained length of other models is not.

The config says a length. A model has a table if one of its embeddings or buffers of positions has that many rows
(GPT-2, OPT, BERT; GPT-J and CodeGen keep sines and cosines in one). Rotary models compute positions of any number.
Everything is read from the model on the `meta` device, without a pass.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gsae.errors import UsageError

# The names that configs have for the length; the last two are those of MPT and Whisper.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
TABLE = re.compile(r"(^|_)(wpe|pos|position|positions)(_|$)")


@dataclass(frozen=True)
class Positions:
    """What limits a context. trained: the length in the config; table: the positions of the model's table, if any."""

    trained: int | None
    table: int | None

    def check(self, context_size: int) -> str | None:
        """Return a warning if a context is longer than the model was trained for; None if it is not.

        Raises UsageError if the model has no position for its last tokens.
        """
        if self.table is not None and context_size > self.table:
            raise UsageError(
                f"context_size {context_size} is more than the {self.table} positions of the model's table. "
                f"Use --context-size {self.table} or less."
            )
        if self.trained is None or context_size <= self.trained:
            return None
        return (
            f"--context-size {context_size} is longer than the {self.trained} tokens that the model's config gives: "
            "rows at later positions may be unlike those that the model was trained to make."
        )


def positions_of(model: Any) -> Positions:
    """Return the positions of a transformers model, which may be on the `meta` device."""
    config = model.config.get_text_config()
    trained = next((n for name in LENGTHS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    sizes = [usable for all_rows, usable in _tables(model) if trained in (all_rows, usable)]
    return Positions(trained, min(sizes, default=None))


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the rows of each table of positions, and how many of them are positions of tokens."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.search(path.rsplit(".", 1)[-1]):
            yield module.num_embeddings, module.num_embeddings - _reserved(module)
        for name, value in (module._buffers | vars(module)).items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point() and TABLE.search(name):
                yield len(value), len(value)
        if type(module).__name__ == "MptAttention":  # its ALiBi biases are a table of this size
            yield int(module.max_seq_length), int(module.max_seq_length)


def _reserved(table: nn.Embedding) -> int:
    """Return the first rows that are no positions: OPT and Bart skip 2, RoBERTa those up to the padding's."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1
