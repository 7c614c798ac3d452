"""Loading a language model, on one device or spread over several by a device map, with its provenance.

Device maps are accelerate's: `auto` fills the GPUs in order, then the CPU's memory, then the disk, so a model may be
larger than any of them. Layers that are not kept on a GPU are copied to it in each pass, which costs the transfer.
"""

import hashlib
import json
import platform
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gsae.errors import IncompatibleError, NotFoundError, SpaceError, UsageError
from gsae.harvest.config import HarvestConfig
from gsae.harvest.hub import one_line, quiet
from gsae.store import ModelSource

from .capture import LanguageModel, Provenance
from .model_files import ModelFiles, find_model, light_directory, weights_directory, weights_sha256

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

    device: a device of torch, or "auto" for a GPU if there is one. device_map: "auto" or another of accelerate's names,
    or a JSON object of devices by module; it replaces `device`. attn_implementation: None for the default of
    transformers. Raises NotFoundError if there is no such model, UsageError if the model, the device or the map cannot
    be used, and SpaceError if the model does not fit into memory.
    """
    target = _device(device)
    spread = None if device_map is None else _device_map(device_map)
    files = find_model(model, revision, weights=True)
    tokenizer = _tokenizer(files)
    weights = weights_sha256(files)
    loaded, report = _load(files, dtype, attn_implementation, spread)
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:  # transformers would fill them with random numbers
        raise UsageError(f"The weights of model {files.id!r} lack {len(lacking)} tensors, such as {lacking[0]}.")
    with _loading_errors(files):
        loaded = (loaded if spread else loaded.to(target)).eval().requires_grad_(False)
    devices = _devices(loaded) if spread else {target}
    provenance = Provenance(
        id=files.id,
        revision=files.revision,
        weights_sha256=weights,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        dtype=dtype,
        attn_implementation=loaded.config._attn_implementation,
        accelerator=" + ".join(sorted({accelerator(device) for device in devices})),
        device_map=device_map,
    )
    return LanguageModel(loaded, tokenizer, provenance)


def load_configured(config: HarvestConfig) -> LanguageModel:
    """Load the language model that the settings of a harvest name."""
    return load_lm(
        config.model, config.revision, config.dtype, config.device, config.attn_implementation, config.device_map
    )


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the `with`; None leaves torch's setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_planned(planned: ModelSource, model: str | None, device: str = "cpu") -> LanguageModel:
    """Load the model that a store was made with, with the same dtype and attention.

    model: where the model is; None for the id in the plan. Raises IncompatibleError if its weights differ from those in
    the plan, and the errors of `load_lm`.
    """
    spread = planned.device_map if device == "auto" else None
    lm = load_lm(model or planned.id, planned.revision, planned.dtype, device, planned.attn_implementation, spread)
    if lm.provenance.weights_sha256 != planned.weights_sha256:
        raise IncompatibleError(
            f"Model {model or planned.id!r} has different weights than {planned.id!r}, which the store was made with."
        )
    return lm


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Load only the tokenizer of a model. Raises UsageError if the model has none."""
    return _tokenizer(find_model(model, revision, weights=False))


def load_meta(model: str, revision: str | None = None, attn_implementation: str | None = None) -> Any:
    """Return the model on the `meta` device: its modules, widths and config, without weights, in about a second."""
    files = find_model(model, revision, weights=False)
    directory = light_directory(files)
    with _loading_errors(files), quiet(bars=False), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        build: Any = AutoModelForCausalLM.from_config
        return build(config, attn_implementation=attn_implementation).eval()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of the JSON of a fast tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def accelerator(device: torch.device) -> str:
    """Return the name of the hardware; matrix products round in the same way on hardware of equal name."""
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


def _load(files: ModelFiles, dtype: str, attn_implementation: str | None, spread: str | dict[str, Any] | None) -> Any:
    """Return the model and transformers' report on its weights."""
    directory = weights_directory(files, dtype)
    offload = None if spread is None else tempfile.mkdtemp(prefix="gsae-weights-")  # for weights kept on the disk
    options = {} if spread is None else {"device_map": spread, "offload_folder": offload}
    try:
        with _loading_errors(files), quiet(bars=False):
            from transformers import AutoModelForCausalLM

            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except BaseException:
        _remove(offload)
        raise
    weakref.finalize(loaded[0], _remove, offload)
    return loaded


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _device_map(text: str) -> str | dict[str, Any]:
    """Return one of accelerate's names, or the JSON object in `text`; raises UsageError for anything else."""
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


def _tokenizer(files: ModelFiles) -> Any:
    directory = light_directory(files)
    with quiet(bars=False):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # transformers raises many types where files are missing or broken
            raise UsageError(f"Model {files.id!r} has no tokenizer that loads: {one_line(error)}.") from None
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab_size() == 0:
        raise UsageError(f"Model {files.id!r} has no tokenizer; a directory with a tokenizer.json is needed.")
    return tokenizer


@contextmanager
def _loading_errors(files: ModelFiles) -> Iterator[None]:
    """Turn the errors of transformers and torch into one line: SpaceError, NotFoundError or UsageError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise SpaceError(f"Model {files.id!r} does not fit into memory.") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"Model {files.id!r} is not complete: {one_line(error)}.") from None
    except Exception as error:  # transformers raises many types
        raise UsageError(f"Model {files.id!r} cannot be loaded: {one_line(error)}.") from None
