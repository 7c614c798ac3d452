"""Loading a language model: on one device, or spread over several by a device map, with what the plan says of it.

A device map is accelerate's: `auto` fills the GPUs in order, then the CPU's memory, then the disk, so a model may be
larger than any of them; layers that do not stay on a GPU are brought there for each pass, which costs their transfer.
"""

import hashlib
import json
import platform
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gsae.errors import IncompatibleError, NotFoundError, SpaceError, UsageError
from gsae.harvest.config import HarvestConfig
from gsae.harvest.hub import one_line, quiet
from gsae.store import ModelSource

from .capture import LanguageModel, Provenance
from .model_files import Source, find, light_directory, weights_directory, weights_sha256

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_lm(
    model: str,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
    device_map: str | None = None,
) -> LanguageModel:
    """Load a builtin, a local directory, a `.gguf` file or a Hub id.

    device: torch's name of one, or "auto" for an accelerator where there is one. device_map: accelerate's name of one
    ("auto"), or a JSON object of devices by module; it takes the place of `device`. attn_implementation: None for what
    transformers has for this model, sdpa for most. Raises NotFoundError where there is
    no such model, UsageError where it, the device or the map cannot be used, SpaceError where it does not fit.
    """
    place = _device(device)
    spread = None if device_map is None else _device_map(device_map)
    source = find(model, revision, weights=True)
    tokenizer = _tokenizer(source)
    weights = weights_sha256(source)
    loaded, report = _load(source, dtype, attn_implementation, spread)
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:  # transformers would fill them with random numbers
        raise UsageError(f"The weights of model {source.id!r} lack {len(lacking)} tensors, such as {lacking[0]}.")
    with _told(source):
        loaded = (loaded if spread else loaded.to(place)).eval().requires_grad_(False)
    provenance = Provenance(
        source.id,
        source.revision,
        weights,
        tokenizer_sha256(tokenizer),
        dtype,
        loaded.config._attn_implementation,
        " + ".join(sorted({accelerator(torch.device(d)) for d in _devices(loaded)})) if spread else accelerator(place),
        device_map,
    )
    return LanguageModel(loaded, tokenizer, provenance)


def load_configured(config: HarvestConfig) -> LanguageModel:
    """Load the language model that a harvest's settings name."""
    return load_lm(
        config.model, config.revision, config.dtype, config.device, config.attn_implementation, config.device_map
    )


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads of the CPU inside; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_planned(planned: ModelSource, model: str | None, device: str = "cpu") -> LanguageModel:
    """Load the model that a store was made with, as it ran then.

    model: where it is; None for the store's own name of it. Raises IncompatibleError where its weights are others,
    and what `load_lm` raises.
    """
    spread = planned.device_map if device == "auto" else None
    lm = load_lm(model or planned.id, planned.revision, planned.dtype, device, planned.attn_implementation, spread)
    if lm.source.weights_sha256 != planned.weights_sha256:
        raise IncompatibleError(
            f"Model {model or planned.id!r} has other weights than the one the store was made with ({planned.id})."
        )
    return lm


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Load only the tokenizer of a model. Raises UsageError where the model has none."""
    return _tokenizer(find(model, revision, weights=False))


def load_meta(model: str, revision: str | None = None, attn_implementation: str | None = None) -> Any:
    """Return the model without weights, on the `meta` device: its modules, widths and config, in a second."""
    source = find(model, revision, weights=False)
    directory = light_directory(source)
    with _told(source), quiet(bars=False), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        build: Any = AutoModelForCausalLM.from_config
        return build(config, attn_implementation=attn_implementation).eval()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of a fast tokenizer's own JSON."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def accelerator(device: torch.device) -> str:
    """Name what computes: products round alike on equal names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Device {name!r} cannot be used: {one_line(error)}.") from None
    return device


def _load(source: Source, dtype: str, attn_implementation: str | None, spread: str | dict[str, Any] | None) -> Any:
    """Return the model and transformers' report on its weights."""
    directory = weights_directory(source, dtype)
    options: dict[str, Any] = {}
    with ExitStack() as undo, _told(source), quiet(bars=False):
        from transformers import AutoModelForCausalLM

        if spread is not None:  # a folder for weights that go to the disk, as long as the model lives
            folder = tempfile.mkdtemp(prefix="gsae-weights-")
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            options = {"device_map": spread, "offload_folder": folder}
        answer: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        weakref.finalize(answer[0], undo.pop_all().close)
    return answer


def _device_map(text: str) -> str | dict[str, Any]:
    """Read a device map: one of accelerate's names, or a JSON object; raises UsageError for anything else."""
    if text in DEVICE_MAPS:
        return text
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or not given or not all(isinstance(d, (str, int)) for d in given.values()):
        known = ", ".join(DEVICE_MAPS)
        raise UsageError(f'Device map {text!r}: give {known}, or a JSON object of devices, such as {{"": "cuda:0"}}.')
    for device in set(given.values()) - {"disk"}:
        _device(f"cuda:{device}" if isinstance(device, int) else device)
    return given


def _devices(model: Any) -> set[torch.device]:
    """Return the devices that a spread model computes on."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    found = {torch.device(d) for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None}
    return found or {parameter.device for parameter in model.parameters()}


def _tokenizer(source: Source) -> Any:
    directory = light_directory(source)
    with quiet(bars=False):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # transformers raises many types where files are missing or broken
            raise UsageError(f"Model {source.id!r} has no tokenizer that loads: {one_line(error)}.") from None
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab_size() == 0:
        raise UsageError(f"Model {source.id!r} has no tokenizer; a directory with a tokenizer.json is needed.")
    return tokenizer


@contextmanager
def _told(source: Source) -> Iterator[None]:
    """Tell what went wrong with a model in one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise SpaceError(f"Model {source.id!r} does not fit into memory.") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"Model {source.id!r} is not complete: {one_line(error)}.") from None
    except Exception as error:  # transformers raises many types for what it cannot load
        raise UsageError(f"Model {source.id!r} cannot be loaded: {one_line(error)}.") from None
