"""A trained SAE as a folder in SAELens's layout, with the scale of its inputs folded into the biases.

Architectures that SAELens has are written under its names, so that it reads them. Others have a name of ours, which
SAELens refuses.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.files import remove_temporary, replace_file, replace_text
from gsae.settings import first_fault
from gsae.store import Plan, SiteSpec

from .architectures.base import Params
from .architectures.registry import ARCHITECTURES, readable
from .sae_metadata import SAEMetadata

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@dataclass(frozen=True)
class SAE:
    """A trained SAE for raw activations, as saved in `RUN/saes/<name>`.

    metadata: what the run noted of it (`SAEMetadata`), by field; empty for an SAE that another tool saved.
    """

    params: Params
    metadata: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The formula of its features: `gated`, `relu` or another key of the registry."""
        return next(name for name, kind in ARCHITECTURES.items() if type(self.params) is kind)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.params.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.params.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of raw activations x (rows, d_in), float32."""
        return self.params.encode(x)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructions (rows, d_in) of raw activations from features f (rows, d_sae)."""
        return self.params.decode(f)

    def to(self, device: str) -> "SAE":
        """The same SAE on another device."""
        moved = {name: tensor.to(device) for name, tensor in vars(self.params).items()}
        return SAE(type(self.params)(**moved), self.metadata)


def save_sae(folder: Path, params: Params, *, scale: float, site: SiteSpec, plan: Plan, gsae: SAEMetadata) -> None:
    """Write an SAE that was trained on scale * x, so that SAELens and `load_sae` apply it to raw x.

    The scale is folded into the biases, weights are float32, and W_enc is (d_in, d_sae) as in SAELens. `gsae` becomes
    `metadata.gsae`. cfg.json is written last: a folder that has it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    raw = params.folded(scale).saved()
    tensors = _transposed(vars(raw))
    d_sae, d_in = raw.W_dec.shape
    cfg = {
        "architecture": raw.SAVED_AS,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site.name.startswith("attn.") else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": plan.model.id,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": site.hook_name,
            "hf_hook_name": site.module,
            "dataset_path": plan.dataset.id,
            "context_size": plan.context_size,
            "prepend_bos": True,
            "gsae": gsae.noted(),
        },
    }
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path))
    text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    replace_text(folder / CFG, text)


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE in SAELens's layout: `cfg.json` and `sae_weights.safetensors`, written by gsae or by SAELens.

    Raises NotFoundError if a file is missing, CorruptError if they contradict one another or cannot be read, and
    IncompatibleError for another architecture or for inputs that SAELens would normalise.
    """
    folder = Path(folder)
    cfg = _read_cfg(folder)
    kinds = readable()
    if str(cfg.get("architecture")) not in kinds:
        raise IncompatibleError(
            f"{folder} holds an SAE of architecture {cfg.get('architecture')!r}. Readable are: {', '.join(kinds)}."
        )
    kind = kinds[str(cfg["architecture"])][1]
    if cfg.get("normalize_activations", "none") != "none" or cfg.get("apply_b_dec_to_input", True) is not True:
        raise IncompatibleError(
            f"{folder}: its inputs are normalised, or b_dec is not subtracted from them. Fold that into the weights."
        )
    weights = _read_weights(folder / WEIGHTS)
    expected = sorted(kind.names())
    if sorted(weights) != expected:
        raise CorruptError(f"{folder}: expected tensors {expected}, found {sorted(weights)}.")
    try:
        d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{folder / CFG} does not give d_in and d_sae.") from None
    tensors = _transposed(weights)
    shapes = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (d_sae, d_in) if name.startswith("W_") else (d_sae,))
        if tuple(tensor.shape) != shape:
            raise CorruptError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, which does not fit cfg.json's d_in {d_in} "
                f"and d_sae {d_sae}."
            )
    return SAE(kind(**tensors), _metadata(folder / CFG, cfg).noted())


def weights_sha256(folder: str | Path) -> str:
    """The sha256 of a saved SAE's weights; raises NotFoundError without them."""
    try:
        return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise NotFoundError(f"There is no SAE in {folder}: {WEIGHTS}: {error.strerror}.") from None


def _transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoders, which a file has as (d_in, d_sae), with their dimensions exchanged; all tensors in float32."""
    encoders = [name for name in tensors if name.startswith("W_") and name != "W_dec"]
    return {name: (t.T if name in encoders else t).float().contiguous() for name, t in tensors.items()}


def _read_cfg(folder: Path) -> dict[str, Any]:
    path = folder / CFG
    try:
        cfg = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"There is no SAE in {folder}: {CFG} is missing.") from None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from None
    if not isinstance(cfg, dict):
        raise CorruptError(f"{path} is not a JSON object.")
    return cfg


def _metadata(path: Path, cfg: Mapping[str, Any]) -> SAEMetadata:
    metadata = cfg.get("metadata")
    noted = metadata.get("gsae") if isinstance(metadata, dict) else None
    try:
        return SAEMetadata.model_validate(noted if isinstance(noted, dict) else {})
    except ValidationError as error:
        raise CorruptError(f"{path}: metadata.gsae.{first_fault(error)}.") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise NotFoundError(f"There is no SAE in {path.parent}: {path.name} is missing.") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from None
