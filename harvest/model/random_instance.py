"""A runnable random instance of a model of which only the config is known, so that sites are proven without weights.

Widths of the residual stream and of the heads are the model's, because sites have them. The hidden layers of MLPs are
small, because no site has their width. Of layers that are built alike only the first has weights and computes anything,
and an embedding is a view of few random numbers. So a model of 70B parameters costs seconds and about 1 GB.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsae.errors import UsageError

from .model_classes import drop_towers, module_tree
from .module_values import first_argument, with_first_tensor

SMALL_WIDTH = 256
# The widths inside of MLPs, under the names that the configs of transformers have for them.
FREE_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
FREE_CHUNKS = ("chunk_size", "mamba_chunk_size")
# Elements of a weight that has memory; larger ones, such as embeddings, are views.
LARGE = 1 << 27
RANDOM_NUMBERS = (1 << 20) - 3
PLACE_NAMES = ("idx", "index", "layer_id", "layer_number", "_no")


@dataclass(frozen=True)
class Instance:
    """A model that runs on the CPU. twins: for a layer that only passes the stream on, the layer that it is like."""

    model: Any
    twins: Mapping[nn.Module, nn.Module] = field(default_factory=dict)


def run_on_instance(meta: Any, run: Callable[[Instance], Any]) -> Any:
    """Return what `run` gives for a random instance of `meta`, a model on the `meta` device.

    The smallest instance is tried first, then one with all layers, then one with all widths. Raises the UsageError of
    the last one.
    """
    for small, twins in ((True, True), (True, False), (False, False)):
        try:
            return run(_instance(meta, small, twins))
        except UsageError as error:
            fault = error
    raise fault


def _instance(meta: Any, small: bool, twins: bool) -> Instance:
    model = _built(meta, small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        joined = _join_twins(model) if twins else {}
        _fill(model, joined)
    head = model.get_output_embeddings()
    if head is not None:
        head.forward = lambda hidden, *args, **kwargs: hidden[..., :1]  # its product would cost more than all layers
    return Instance(model, joined)


def _built(meta: Any, small: bool) -> Any:
    """Return the model with its parameters on `meta` and its buffers on the CPU, as its own code makes them."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(meta.config)
    if small:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            _shrink(part)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.dtype = torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            model = type(meta)._from_config(config, attn_implementation=meta.config._attn_implementation)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # reads only the experts that are used
    except Exception as error:  # transformers raises many types for sizes that do not fit together
        raise UsageError(f"no instance of {type(meta).__name__} can be built ({type(error).__name__}).") from error
    model = drop_towers(model)
    if small and module_tree(model) != module_tree(meta):
        raise UsageError(f"a small {type(meta).__name__} has other modules than the model.")
    return model.eval()


def _shrink(config: Any) -> None:
    for name in FREE_WIDTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > SMALL_WIDTH:
            setattr(config, name, SMALL_WIDTH)
    for name in FREE_CHUNKS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 16:
            setattr(config, name, 16)


def _fill(model: nn.Module, unused: Iterable[nn.Module]) -> None:
    """Give each parameter random values: matrices keep the size of what they multiply, gains are near 1.

    unused: modules that never compute anything, with parameters that need no memory.
    """
    numbers = torch.randn(RANDOM_NUMBERS)
    filled: dict[int, nn.Parameter] = {}  # tied weights stay tied
    idle = {id(p) for module in unused for p in module.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                begin = 7919 * len(filled) % RANDOM_NUMBERS
                values = torch.zeros(()).expand(parameter.shape)
                if id(parameter) not in idle:
                    values = _values(name, parameter.shape, numbers.roll(begin))
                filled[id(parameter)] = nn.Parameter(values.to(_float(parameter)), requires_grad=False)
            module._parameters[name] = filled[id(parameter)]


def _float(parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.is_floating_point() else torch.float32


def _values(name: str, shape: torch.Size, numbers: Tensor) -> Tensor:
    count = shape.numel()
    if len(shape) < 2:
        values = numbers[:count] if count <= len(numbers) else numbers.repeat(-(-count // len(numbers)))[:count]
        return (0.1 * values if name.endswith("bias") else 1 + 0.2 * values.tanh()).reshape(shape)
    scaled = numbers / math.sqrt(shape[-1])
    if count > LARGE:
        return scaled[: shape[-1] + shape[:-1].numel()].as_strided(shape, [1] * len(shape))
    return scaled.repeat(-(-count // len(scaled)))[:count].reshape(shape)


def _join_twins(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Let each layer that is built like an earlier one of its list only pass on what it gets."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    twins: dict[nn.Module, nn.Module] = {}
    for path, layers in lists.items():
        if any(path.startswith(f"{other}.") for other in lists if other != path):
            continue
        firsts: dict[Any, nn.Module] = {}
        for layer in layers:
            first = firsts.setdefault(_build(layer), layer)
            if first is not layer:
                twins[layer] = first
    outputs: dict[nn.Module, Any] = {}
    for first in set(twins.values()):
        first.register_forward_hook(lambda module, args, output: outputs.__setitem__(module, output))
    for layer, first in twins.items():
        layer.forward = _passing_on(outputs, first)
    return twins


def _passing_on(outputs: Mapping[nn.Module, Any], first: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return with_first_tensor(outputs[first], first_argument(args, kwargs))

    return forward


def _build(layer: nn.Module) -> tuple[Any, ...]:
    """Return what makes two layers alike: modules, shapes and plain attributes, but for the layer's number."""
    return tuple(_described(path, module) for path, module in layer.named_modules())


def _described(path: str, module: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    return path, type(module), shapes, tuple(_plain(module))


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(module).items()):
        numbered = any(part in name for part in PLACE_NAMES)
        if isinstance(value, (bool, int, float, str, type(None))) and not numbered and not name.startswith("_"):
            yield name, value
