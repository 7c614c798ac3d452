"""The class of transformers that a model is loaded with, and the text decoder of a model that also takes images.

A multimodal model is loaded by the class that reads its checkpoint: its text model alone where transformers has a class
for that, otherwise the whole model, of which the parts that text never reaches are dropped before it is moved to its
device. The passes over text are those of the whole model.
"""

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
    """Drop the parts of a multimodal model, in place, that are neither its text decoder nor its embeddings; return it.

    A dropped part keeps its place in the model, without weights, and raises UsageError if a pass reaches it.
    """
    config = model.config
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or config.is_encoder_decoder or config.get_text_config(decoder=True) is config:
        return model
    kept = {id(part) for part in (decoder, model.get_input_embeddings(), model.get_output_embeddings())}
    _drop(model, kept, "")
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


def _drop(module: nn.Module, kept: set[int], path: str) -> None:
    """Replace the children of a module that have weights and contain none of the modules `kept`."""
    for name, child in module.named_children():
        if id(child) in kept:
            continue
        if any(id(part) in kept for part in child.modules()):
            _drop(child, kept, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            setattr(module, name, Dropped(f"{path}{name}"))
