"""A trained SAE as a folder in SAELens's layout, with the scale of its inputs folded into the biases.

What SAELens's `gated` and `standard` can express is written as such and read from there; an untied encoder has an
architecture of our own name, which SAELens refuses.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsae.errors import CorruptError, IncompatibleError, NotFoundError
from gsae.files import remove_temporary, replace_file, replace_text
from gsae.store import Plan, SiteSpec

from .architectures.base import Params
from .architectures.gated import GatedParams, UntiedParams
from .architectures.registry import folded
from .architectures.relu import ReluParams

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
READ: dict[str, tuple[str, type[Params]]] = {
    "gated": ("gated", GatedParams),
    "standard": ("relu", ReluParams),
    "gsae_gated_untied": ("gated-untied", UntiedParams),
}
TRANSPOSED = ("W_enc", "W_mag")  # (d_in, d_sae) in the file


@dataclass(frozen=True)
class SAE:
    """A trained SAE for raw activations, as saved in `RUN/saes/<name>`; `metadata` is what the run noted of it."""

    params: Params
    metadata: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """`gated`, `gated-untied` or `relu`: which formula its features follow."""
        return next(ours for ours, kind in READ.values() if type(self.params) is kind)

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


def save_sae(
    folder: Path, params: Params, *, scale: float, site: SiteSpec, plan: Plan, gsae: Mapping[str, Any]
) -> None:
    """Write an SAE that was trained on scale * x so that SAELens, and `load_sae`, apply it to raw x.

    The scale is folded into the biases, weights are float32 and W_enc is (d_in, d_sae) as SAELens has it. `gsae`
    becomes `metadata.gsae`. cfg.json comes last: a folder that has it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    architecture, raw = folded(params, scale).saelens()
    tensors = {name: (t.T if name in TRANSPOSED else t).float().contiguous() for name, t in raw.items()}
    d_sae, d_in = raw["W_dec"].shape
    cfg = {
        "architecture": architecture,
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
            "gsae": {key: _json_number(value) for key, value in gsae.items()},
        },
    }
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path))
    text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    replace_text(folder / CFG, text)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE in SAELens's layout (`cfg.json`, `sae_weights.safetensors`), written by gsae or, unscaled, by it.

    Raises NotFoundError without the files, CorruptError where they contradict one another or cannot be read, and
    IncompatibleError for an architecture or input handling that is not ours.
    """
    folder = Path(folder)
    cfg = _read_cfg(folder)
    kind = READ.get(str(cfg.get("architecture")), (None, None))[1]
    if kind is None:
        raise IncompatibleError(f"{folder} holds a {cfg.get('architecture')!r} SAE; gated and standard are read.")
    if cfg.get("normalize_activations", "none") != "none" or cfg.get("apply_b_dec_to_input", True) is not True:
        raise IncompatibleError(f"{folder}: its inputs are normalised or not centred on b_dec; fold that in first.")
    weights = _read_weights(folder / WEIGHTS)
    expected = sorted(field.name for field in fields(kind))
    if sorted(weights) != expected:
        raise CorruptError(f"{folder}: expected tensors {expected}, found {sorted(weights)}.")
    try:
        d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{folder / CFG} does not give d_in and d_sae.") from None
    shapes = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)} | dict.fromkeys(TRANSPOSED, (d_in, d_sae))
    for name, tensor in weights.items():
        shape = shapes.get(name, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise CorruptError(f"{folder}: {name} has shape {tuple(tensor.shape)}, cfg.json says {shape}.")
    tensors = {name: (t.T if name in TRANSPOSED else t).float().contiguous() for name, t in weights.items()}
    metadata = cfg.get("metadata")
    gsae = metadata.get("gsae") if isinstance(metadata, dict) else None
    return SAE(kind(**tensors), gsae if isinstance(gsae, dict) else {})


def weights_sha256(folder: str | Path) -> str:
    """The sha256 of a saved SAE's weights; raises NotFoundError without them."""
    try:
        return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise NotFoundError(f"There is no SAE in {folder}: {WEIGHTS}: {error.strerror}.") from None


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


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise NotFoundError(f"There is no SAE in {path.parent}: {path.name} is missing.") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from None
