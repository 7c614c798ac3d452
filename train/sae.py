"""The SAEs of Rajamanoharan et al. 2024 (arXiv 2404.16014) as plain formulas, and a saved one ready for use.

These few lines are the definition: `bank` computes the same values and gradients faster and is tested against
autograd through them. W_enc and W_dec are both (d_sae, d_in); rows of W_dec are dictionary directions of unit norm.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from gsae.store import CorruptError, IncompatibleError, NotFoundError


@dataclass(frozen=True)
class GatedParams:
    """A Gated SAE: W_enc, W_dec (d_sae, d_in); b_dec (d_in); b_gate, b_mag, r_mag (d_sae)."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pi_gate and pi_mag (rows, d_sae) of x (rows, d_in), eqs. 6 and 7: both share one encoder product."""
        a = (x - self.b_dec) @ self.W_enc.T
        return a + self.b_gate, torch.exp(self.r_mag) * a + self.b_mag

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in): 1[pi_gate > 0] * relu(pi_mag), eq. 6."""
        pi_gate, pi_mag = self.gates(x)
        return (pi_gate > 0) * torch.relu(pi_mag)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructions (rows, d_in) of features f (rows, d_sae)."""
        return f @ self.W_dec + self.b_dec

    def loss(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """Eq. 8 for x (rows, d_in): sums over features and dimensions, mean over the rows; a scalar.

        The auxiliary reconstruction, from relu(pi_gate), sees the decoder's weights and bias as constants.
        """
        pi_gate, pi_mag = self.gates(x)
        f, open_gates = (pi_gate > 0) * torch.relu(pi_mag), torch.relu(pi_gate)
        auxiliary = open_gates @ self.W_dec.detach() + self.b_dec.detach()
        error = (x - self.decode(f)).square().sum() + (x - auxiliary).square().sum()
        return (error + l1_coefficient * open_gates.sum()) / len(x)


@dataclass(frozen=True)
class ReluParams:
    """The baseline SAE of the paper's section 2: W_enc, W_dec (d_sae, d_in); b_dec (d_in); b_enc (d_sae)."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Features (rows, d_sae) of x (rows, d_in): relu(W_enc (x - b_dec) + b_enc), eq. 2."""
        return torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructions (rows, d_in) of features f (rows, d_sae), eq. 3."""
        return f @ self.W_dec + self.b_dec

    def loss(self, x: Tensor, l1_coefficient: float) -> Tensor:
        """Eq. 4 for x (rows, d_in): sums over features and dimensions, mean over the rows; a scalar."""
        f = self.encode(x)
        return ((x - self.decode(f)).square().sum() + l1_coefficient * f.sum()) / len(x)


Params = GatedParams | ReluParams
PARAMS: dict[str, type[GatedParams] | type[ReluParams]] = {"gated": GatedParams, "relu": ReluParams}


def names(arch: str) -> tuple[str, ...]:
    """The names of an architecture's parameters, in order."""
    return tuple(field.name for field in fields(PARAMS[arch]))


def initial(arch: str, d_in: int, d_sae: int, seed: int, scaled_mean: Tensor) -> Params:
    """The SAE a run starts from, float32 on the CPU, a function of its arguments alone.

    Decoder rows are random directions of unit norm and W_enc = W_dec, so a latent begins by reading what it
    writes; b_dec (d_in) is the mean of the scaled inputs; all else is 0.
    """
    directions = torch.randn(d_sae, d_in, generator=torch.Generator("cpu").manual_seed(seed))
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    biases = {name: torch.zeros(d_sae) for name in names(arch)[3:]}
    b_dec = scaled_mean.to("cpu", torch.float32, copy=True)
    return PARAMS[arch](W_enc=W_dec.clone(), W_dec=W_dec, b_dec=b_dec, **biases)


def folded(params: Params, scale: float) -> Params:
    """The SAE that does to raw x what `params` does to scale * x: features times 1/scale, the same gates.

    Weights stay as they are (decoder rows keep unit norm), r_mag too; biases are divided by the scale.
    """
    unchanged = ("W_enc", "W_dec", "r_mag")
    biases = {name: getattr(params, name) / scale for name in names(_arch(params)) if name not in unchanged}
    return replace(params, **biases)


def _arch(params: Params) -> str:
    return next(arch for arch, kind in PARAMS.items() if isinstance(params, kind))


# -- a saved SAE

SAELENS_NAMES: dict[Literal["gated", "relu"], str] = {"gated": "gated", "relu": "standard"}


@dataclass(frozen=True)
class SAE:
    """A trained SAE for raw activations, as saved in `RUN/saes/<name>`; `metadata` is what the run noted of it."""

    params: Params
    metadata: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """`gated` or `relu`."""
        return _arch(self.params)

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
        moved = {name: getattr(self.params, name).to(device) for name in names(self.architecture)}
        return SAE(PARAMS[self.architecture](**moved), self.metadata)


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE in SAELens's layout (`cfg.json`, `sae_weights.safetensors`), written by gsae or, unscaled, by it.

    Raises NotFoundError without the files, CorruptError where they contradict one another or cannot be read, and
    IncompatibleError for an architecture or input handling that is not ours.
    """
    folder = Path(folder)
    cfg = _read_cfg(folder)
    arch = next((ours for ours, theirs in SAELENS_NAMES.items() if theirs == cfg.get("architecture")), None)
    if arch is None:
        raise IncompatibleError(f"{folder} holds a {cfg.get('architecture')!r} SAE; gated and standard are read.")
    if cfg.get("normalize_activations", "none") != "none" or cfg.get("apply_b_dec_to_input", True) is not True:
        raise IncompatibleError(f"{folder}: its inputs are normalised or not centred on b_dec; fold that in first.")
    weights = _read_weights(folder / "sae_weights.safetensors")
    if sorted(weights) != sorted(names(arch)):
        raise CorruptError(f"{folder}: expected tensors {sorted(names(arch))}, found {sorted(weights)}.")
    try:
        d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{folder / 'cfg.json'} does not give d_in and d_sae.") from None
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in weights.items():
        expected = shapes.get(name, (d_sae,))
        if tuple(tensor.shape) != expected:
            raise CorruptError(f"{folder}: {name} has shape {tuple(tensor.shape)}, cfg.json says {expected}.")
    tensors = {name: tensor.float() for name, tensor in weights.items()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    metadata = cfg.get("metadata")
    gsae = metadata.get("gsae") if isinstance(metadata, dict) else None
    return SAE(PARAMS[arch](**tensors), gsae if isinstance(gsae, dict) else {})


def _read_cfg(folder: Path) -> dict[str, Any]:
    path = folder / "cfg.json"
    try:
        cfg = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"There is no SAE in {folder}: cfg.json is missing.") from None
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
