"""The structure of a loaded model, or of a random instance of one: its decoder, and the parts of each layer when asked.

Every part is confirmed by experiments on the model that is given (`layer_parts.py`). For a model on the `meta` device
they run on a random instance of it, so they hold for the code and the config; the loaded model is tested once more
before rows are stored (`confirm.py`).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layer_parts import Parts, find_parts
from .layer_runs import Layer
from .layer_trace import trace_decoder
from .random_instance import Instance, run_on_instance


class Structure:
    """The decoder of a model, and the parts of its layers, which are found when they are first asked for."""

    def __init__(self, model: Any, twins: Mapping[nn.Module, nn.Module] | None = None) -> None:
        """Trace a model that can run. twins: layers that are built like another, and need no tests of their own."""
        self._decoder = trace_decoder(model)
        self._twins = twins or {}
        self._found: dict[nn.Module, tuple[Parts, Layer]] = {}

    @property
    def path(self) -> str:
        """The path of the list of layers in the model."""
        return self._decoder.path

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self._decoder.layers)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._decoder.d_model

    @property
    def first(self) -> int:
        """The number of the first layer that runs on text."""
        return self._decoder.first

    def runs(self, number: int) -> bool:
        """Whether a layer runs on text."""
        return number in self._decoder.calls

    def parts(self, number: int) -> Parts:
        """Return the parts of a layer."""
        return self._tested(number)[0]

    def width(self, number: int, path: str) -> int:
        """Return the width of the first input of a module in a layer."""
        return int(self._tested(number)[1].seen[path].given.shape[-1])

    def mixer_kind(self, number: int, path: str) -> str:
        """Return what a mixer is: attention, linear attention, or the class of its module."""
        return _kind(self._tested(number)[1], path)

    def _tested(self, number: int) -> tuple[Parts, Layer]:
        module = self._decoder.layers[number]
        module = self._twins.get(module, module)
        if module not in self._found:
            layer = Layer(module, self._decoder.calls[self._decoder.layers.index(module)])
            self._found[module] = find_parts(layer), layer
        return self._found[module]


def structure_of(model: Any) -> Structure:
    """Return the structure of a transformers model; one on the `meta` device is tested on a random instance.

    Raises UsageError if no residual stream is found, and if tokens see later ones.
    """
    spread = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate keeps weights on `meta`
    if not spread and next(model.parameters()).is_meta:
        return run_on_instance(model, _of_instance)  # type: ignore[no-any-return]
    return Structure(model)


def _of_instance(instance: Instance) -> Structure:
    return Structure(instance.model, instance.twins)


def _kind(layer: Layer, projection: str) -> str:
    """Return what a mixer is, from the names of the modules around its projection."""
    inside = projection.split(".")
    around = [".".join(inside[:end]) for end in range(1, len(inside))] or [projection]
    classes = [type(layer.modules[path]).__name__ for path in around]
    text = " ".join([*around, *classes]).lower()
    if "rwkv" in text or not ("att" in text or "kda" in text):
        return classes[-1]
    linear = ("linear_att", "linearatt", "lightning", "deltanet", "kda", "deltaattention")
    return "linear attention" if any(word in text for word in linear) else "attention"


def is_attention(kind: str) -> bool:
    """Whether a mixer's kind has heads that attend."""
    return kind in ("attention", "linear attention")
