"""Loading a language model, on one device or spread over several, with its provenance.

Its weights are read once for their hash and once to load them. An adapter is merged into its base on the CPU.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gsae.errors import IncompatibleError, NotFoundError, SpaceError, UsageError
from gsae.harvest.config import HarvestConfig
from gsae.harvest.hub import one_line, quiet
from gsae.store import BaseSource, ModelSource

from .adapters import adapter_sha256, check_mergeable, joined_sha256, merge
from .capture import LanguageModel, Provenance
from .checkpoint_dtype import checkpoint_dtype
from .devices import Placement, accelerator, compute_devices, place
from .model_classes import auto_class, drop_towers
from .model_files import ModelFiles, find_model, light_directory, tokenizer_directory, weights_directory, weights_sha256
from .quantisation import (
    check_plain,
    check_runs,
    check_same_quantisation,
    one_device,
    quantisation_of,
    recorded,
)
from .remote_code import check_executed, check_same_code, refusal, trusted_code


def load_lm(
    model: str,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a builtin, a local directory, a `.gguf` file or a Hub id; an adapter of peft is merged into its base.

    dtype: "auto" for the checkpoint's. device: a device of torch, or "auto" for a GPU if there is one. device_map:
    "auto" or another of accelerate's names, or a JSON object of devices by module; it replaces `device`.
    attn_implementation: None for the default of transformers. trust_remote_code: run the Python code that the model
    brings. Raises NotFoundError if there is no such model, UsageError if the model, the device or the map cannot be
    used, and SpaceError if the model does not fit into memory.
    """
    where = place(device, device_map)
    files = find_model(model, revision, weights=True, code=trust_remote_code)
    if dtype == "auto":
        dtype = checkpoint_dtype(files)
    return _load_files(files, dtype, where, attn_implementation, trusted_code(files, trust_remote_code))


def _load_files(
    files: ModelFiles, dtype: str, where: Placement, attn_implementation: str | None, code: dict[str, str]
) -> LanguageModel:
    """Load a model with the hashes of its own code, which runs if there is any."""
    check_files(files, dtype, str(where.device), where.device_map)
    quantisation = declared_quantisation(files)
    tokenizer = _tokenizer(files, bool(code))
    weights, base, adapter = _hashes(files)
    loaded, report = _load(files, dtype, attn_implementation, where, bool(code))
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:  # transformers would fill them with random numbers
        raise UsageError(f"The weights of model {files.id!r} lack {len(lacking)} tensors, such as {lacking[0]}.")
    if quantisation is None:
        check_plain(list(report["unexpected_keys"]), files.id)
    check_executed((*loaded.modules(), loaded.config, tokenizer), code, files.id)
    if files.base:
        loaded = merge(loaded, files.path, files.id)
    with _loading_errors(files):
        loaded = drop_towers(loaded)
        stays = where.spread or getattr(loaded, "is_quantized", False)  # quantised weights were loaded to their device
        loaded = (loaded if stays else loaded.to(where.device)).eval().requires_grad_(False)
    devices = compute_devices(loaded) if where.spread else {where.device}
    provenance = Provenance(
        id=files.id,
        revision=files.revision,
        weights_sha256=weights,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        dtype=dtype,
        attn_implementation=loaded.config._attn_implementation,
        accelerator=" + ".join(sorted({accelerator(device) for device in devices})),
        device_map=where.device_map,
        base=base,
        adapter_sha256=adapter,
        code=code,
        quantization=recorded(quantisation, not getattr(loaded, "is_quantized", False)),
    )
    return LanguageModel(loaded, tokenizer, provenance)


def declared_quantisation(files: ModelFiles) -> dict[str, Any] | None:
    """Return the quantization_config of a model; None if its weights are plain, as those of a GGUF file become."""
    return None if files.whole.is_gguf else quantisation_of(light_directory(files))


def check_files(files: ModelFiles, dtype: str, device: str, device_map: str | None) -> None:
    """Check what can be checked before weights are read: that an adapter can be merged, and quantised weights run.

    Raises UsageError and NotFoundError.
    """
    quantisation = declared_quantisation(files)
    if quantisation is not None:
        check_runs(quantisation, dtype, place(device, device_map), files.whole.id)
    if files.base is None:
        return
    if quantisation is not None:
        raise UsageError(
            f"Adapter {files.id!r} cannot be merged into a quantised base without rounding its weights again. Name the "
            "plain model as base_model_name_or_path in its adapter_config.json."
        )
    if device_map is not None:
        raise UsageError(f"Adapter {files.id!r} cannot be merged with --device-map. Merge it and save the whole model.")
    check_mergeable(files.path, files.id)


def _hashes(files: ModelFiles) -> tuple[str, BaseSource | None, str | None]:
    """Return the hash of the weights and, if they are an adapter's, the base and the hash of the adapter alone."""
    weights = weights_sha256(files)
    if files.base is None:
        return weights, None, None
    adapter = adapter_sha256(files.path)
    base = BaseSource(id=files.base.id, revision=files.base.revision, weights_sha256=weights)
    return joined_sha256((weights, adapter)), base, adapter


def load_configured(config: HarvestConfig) -> LanguageModel:
    """Load the language model that the settings of a harvest name."""
    return load_lm(
        config.model,
        config.revision,
        config.dtype,
        config.device,
        config.attn_implementation,
        config.device_map,
        config.trust_remote_code,
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


def load_planned(
    planned: ModelSource, model: str | None, device: str = "cpu", trust_remote_code: bool = False
) -> LanguageModel:
    """Load the model that a store was made with, with the same dtype and attention.

    model: where the model is; None for the id in the plan. trust_remote_code: run the Python code that the model
    brings, if the store was made with it. Raises IncompatibleError if the weights or the code differ from those in the
    plan, UsageError if the store was made with code and that is not trusted, and the errors of `load_lm`.
    """
    if planned.code and not trust_remote_code:
        raise UsageError(
            f"The store was made with Python code that model {planned.id!r} brings ({', '.join(planned.code)}). "
            "Read it, then run the command again with --trust-remote-code."
        )
    where = place(device, planned.device_map if device == "auto" else None)
    name, base_revision = model or planned.id, planned.base.revision if planned.base else None
    files = find_model(name, planned.revision, weights=True, code=bool(planned.code), base_revision=base_revision)
    code = trusted_code(files, bool(planned.code))
    check_same_code(code, planned.code, name)
    lm = _load_files(files, planned.dtype, where, planned.attn_implementation, code)
    check_same_quantisation(lm.provenance.quantization, planned, name)
    if lm.provenance.weights_sha256 != planned.weights_sha256:
        raise IncompatibleError(
            f"Model {name!r} has different weights than {planned.id!r}, which the store was made with."
        )
    return lm


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load only the tokenizer of a model. Raises UsageError if the model has none."""
    files = find_model(model, revision, weights=False, code=trust_remote_code)
    return _tokenizer(files, bool(trusted_code(files, trust_remote_code)))


def load_meta(
    model: str,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the model on the `meta` device: its modules, widths and config, without weights.

    Raises UsageError if the model cannot be built, or needs its own code and that is not trusted.
    """
    files = find_model(model, revision, weights=False, code=trust_remote_code)
    trusted = bool(trusted_code(files, trust_remote_code))
    directory = light_directory(files)
    with _loading_errors(files), quiet(bars=False), torch.device("meta"):
        config = _config(directory, trusted)
        build = auto_class(config, trusted).from_config
        return drop_towers(build(config, attn_implementation=attn_implementation, trust_remote_code=trusted).eval())


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of the JSON of a fast tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _load(files: ModelFiles, dtype: str, attn_implementation: str | None, where: Placement, trusted: bool) -> Any:
    """Return the model and transformers' report on its weights."""
    directory = weights_directory(files, dtype)
    spread = where.spread or (one_device(where.device) if declared_quantisation(files) else None)
    offload = None if spread is None else tempfile.mkdtemp(prefix="gsae-weights-")  # for weights kept on the disk
    options = {} if spread is None else {"device_map": spread, "offload_folder": offload}
    try:
        with _loading_errors(files), quiet(bars=False):
            loaded: Any = auto_class(_config(directory, trusted), trusted).from_pretrained(
                str(directory),
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trusted,
                **options,
            )
    except BaseException:
        _remove(offload)
        raise
    weakref.finalize(loaded[0], _remove, offload)
    return loaded


def _config(directory: Path, trusted: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trusted)


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenizer(files: ModelFiles, trusted: bool) -> Any:
    directory = tokenizer_directory(files)
    with quiet(bars=False):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trusted)
        except Exception as error:  # transformers raises many types where files are missing or broken
            if needs_code := refusal(files, error):
                raise needs_code from None
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
        if needs_code := refusal(files, error):
            raise needs_code from None
        raise UsageError(f"Model {files.id!r} cannot be loaded: {one_line(error)}.") from None
