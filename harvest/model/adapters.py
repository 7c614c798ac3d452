"""Adapters of PEFT: which base an adapter belongs to, its hash, and merging it into the base.

The model of a harvest is the base with the adapter merged into its weights, in the dtype of the settings, on the CPU.
Only an adapter that leaves the structure of the base as it is can be merged. Merging costs a pass over its layers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError, UsageError
from gsae.files import hash_file
from gsae.harvest.hub import one_line, quiet

from .model_classes import module_tree

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_MODEL = ("model.safetensors*", "pytorch_model.bin*")
# Where the base is, which does not change what the adapter computes.
PLACE = {"base_model_name_or_path", "revision"}
MISSING = "The package peft is not installed. Install it: pip install 'gsae[peft]'."


def is_adapter(folder: Path, has_weights: Callable[[], bool]) -> bool:
    """Return whether a folder holds an adapter instead of a model.

    has_weights: whether the weights of a whole model belong to the folder; called only if there are both configs.
    Raises UsageError for a folder with an adapter and a whole model, because it does not say which of them is meant.
    """
    if not (folder / CONFIG).is_file():
        return False
    if (folder / "config.json").is_file() and has_weights():
        raise UsageError(
            f"{str(folder)!r} holds both a model and an adapter ({CONFIG}). Give a folder with one of them."
        )
    return True


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the name and the revision of the base that an adapter was made for.

    A path is looked for from the current folder, as peft does, then from the adapter's folder. Raises UsageError if the
    adapter names no base.
    """
    config = read_config(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UsageError(f"The adapter in {str(folder)!r} names no base: set base_model_name_or_path in its {CONFIG}.")
    if not Path(name).expanduser().exists() and (folder / name).exists():
        name = str((folder / name).resolve())
    return name, revision if isinstance(revision, str) and revision else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return what an adapter_config.json holds. Raises UsageError if it is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UsageError(f"{str(folder / CONFIG)!r} is not a JSON object.")
    return config


def adapter_sha256(folder: Path) -> str:
    """Return the sha256 over an adapter's config, without the place of its base, and its weights."""
    config = {key: value for key, value in read_config(folder).items() if key not in PLACE}
    digests = [hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()]
    return joined_sha256([*digests, hash_file(_weights(folder))])


def joined_sha256(digests: Iterable[str]) -> str:
    """Return the sha256 over hex sha256s, one after the other."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_mergeable(folder: Path, name: str) -> None:
    """Raise UsageError if an adapter cannot be merged by its kind, NotFoundError if peft is not installed.

    name: of the adapter, for the message.
    """
    config = _peft_config(folder, name)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise UsageError(f"Adapter {name!r} cannot be merged: {kind} adds to the context, and not to the weights.")
    for setting in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, setting, None):
            raise UsageError(f"Adapter {name!r} cannot be merged: it has {setting}.")


def merge(model: Any, folder: Path, name: str) -> Any:
    """Merge an adapter into the weights of its base and return the base.

    Raises UsageError if the adapter does not fit the base, tensor by tensor, or cannot be merged.
    """
    config = _peft_config(folder, name)
    _weights(folder)
    structure = module_tree(model)
    try:
        with quiet(bars=False):
            adapted = _adapted(model, config, folder)
            fault = _fault(*adapted)
            merged = None if fault else adapted[0].merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises many types, and torch for shapes that do not fit
        raise UsageError(f"Adapter {name!r} cannot be merged into its base: {one_line(error)}.") from None
    if fault:
        raise UsageError(f"Adapter {name!r} cannot be merged into its base: {fault}.")
    if module_tree(merged) != structure:
        raise UsageError(f"Adapter {name!r} cannot be merged: it changes the modules of its base.")
    return merged


def _adapted(model: Any, config: Any, folder: Path) -> tuple[Any, Any]:
    """Return the base with the adapter beside its weights, and what did not fit when these were loaded."""
    from peft import PeftModel

    config.inference_mode = True
    adapted = PeftModel(model, config)
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    return adapted, adapted.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=renamed)


def _fault(adapted: Any, loaded: Any) -> str:
    """Say why merging would give something else than the adapter computes; "" if it would not."""
    for said, keys in (("it lacks", loaded.missing_keys), ("the base has no place for", loaded.unexpected_keys)):
        if keys:
            return f"{said} {len(keys)} tensors, such as {keys[0]}"
    tied = next(_tied(adapted), None)
    return f"it changes {tied}, and the base uses the same weights elsewhere" if tied else ""


def _tied(adapted: Any) -> Iterator[str]:
    """Yield the adapted layers with weights that another module uses too: merging would change that module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    users: dict[int, int] = {}
    modules = dict(adapted.base_model.model.named_modules())
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for path, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            own = module.get_base_layer().parameters(recurse=False)
            if any(users[id(parameter)] > 1 for parameter in own):
                yield path


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise NotFoundError(f"The adapter in {str(folder)!r} has no weights: no {WEIGHTS[0]}.")


def _peft_config(folder: Path, name: str) -> Any:
    try:
        with quiet(bars=False):
            from peft import PeftConfig
    except ImportError as error:
        if error.name == "peft" or error.name is None:
            raise NotFoundError(MISSING) from None
        raise
    try:
        with quiet(bars=False):
            return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises many types
        raise UsageError(f"Adapter {name!r} cannot be read: {one_line(error)}.") from None
