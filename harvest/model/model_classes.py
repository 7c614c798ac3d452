"""The class of transformers that a model is loaded with, and the text decoder of a model that also takes images.

A multimodal model is loaded by the class that reads its checkpoint: its text model alone where transformers has a class
for that, otherwise the whole model, of which parts that text never reaches are dropped before it is moved to its
device. The passes over text are those of the whole model.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from gsae.errors import UsageError

# In this order: the first class that knows the config of a model loads it.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# Multimodal models that read their text in both directions. PaliGemma, of this kind too, says so in its config.
NOT_CAUSAL = ("diffusion_gemma", "pi0")


def auto_class(config: Any, trusted: bool) -> Any:
    """Return the auto class of transformers for a config. trusted: it may be one that the model's own code defines.

    It is AutoModelForCausalLM, which then says why it cannot load the model, for models that no class knows and for
    those with an encoder that reads the text. Raises UsageError if tokens attend to later ones.
    """
    import transformers

    text = config.get_text_config(decoder=True)
    if config.model_type in NOT_CAUSAL or getattr(text, "use_bidirectional_attention", None) is True:
        raise UsageError("its tokens attend to later ones, and a row may depend on earlier tokens alone")
    own = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES[:1] if config.is_encoder_decoder else AUTO_CLASSES:
        found = getattr(transformers, name, None)  # older versions have fewer classes
        if found is not None and ((trusted and name in own) or type(config) in found._model_mapping):
            return found
    return transformers.AutoModelForCausalLM


def drop_towers(model: Any) -> Any:
    """Drop the parts of a multimodal model, in place, that text does not need; return it.

    Where the text decoder is a part with its own config (Llava), all but it, the embeddings and the head is dropped.
    Where one class holds everything (GIT, Phi-4 multimodal), the models in it that do not take text are. A dropped part
    keeps its place in the model, without weights, and raises UsageError if a pass reaches it.
    """
    config = model.config
    if config.is_encoder_decoder:
        return model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or config.get_text_config(decoder=True) is config:
        if any(map(_takes_no_text, model.modules())):
            _drop(model, _text_ends(model), _takes_no_text)
    else:
        _drop(model, {id(decoder), *_text_ends(model)}, _has_weights)
    return model


def module_tree(model: Any) -> list[tuple[str, type[nn.Module]]]:
    """Return the path and the class of each module of a model."""
    return [(path, type(module)) for path, module in model.named_modules()]


class Dropped(nn.Module):
    """The place of a part that was dropped."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError: the model needs this part for text too."""
        raise UsageError(f"This model runs its {self.path} for text too, which gsae does not support.")


def _drop(module: nn.Module, kept: set[int], unneeded: Callable[[nn.Module], bool], path: str = "") -> None:
    """Replace the outermost parts of a module that are `unneeded` and contain none of the modules `kept`."""
    for name, child in module.named_children():
        if id(child) in kept:
            continue
        if unneeded(child) and not any(id(part) in kept for part in child.modules()):
            setattr(module, name, Dropped(f"{path}{name}"))
        else:
            _drop(child, kept, unneeded, f"{path}{name}.")


def _text_ends(model: Any) -> set[int]:
    """Return the ids of the modules where text enters a model and leaves it."""
    return {id(model.get_input_embeddings()), id(model.get_output_embeddings())}


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _takes_no_text(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that declares inputs, such as images, and no text among them."""
    return "text" not in getattr(module, "input_modalities", "text")
