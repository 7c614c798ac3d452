"""A saved SAE in dictionary_learning's layout. SAELens needs no export, because SAEs are saved in its layout."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsae.errors import IncompatibleError
from gsae.evaluate import Listen
from gsae.files import replacing
from gsae.train import SAE, GatedParams, ReluParams, load_sae

from .folder import make_export_folder, not_of_this_export
from .source import ExportSource

AE, CONFIG = "ae.pt", "config.json"


def export(source: ExportSource, out: Path, listen: Listen) -> Path:
    """Export a saved SAE to the folder `out`; return it."""
    return to_dictionary_learning(source.sae, out)


def to_dictionary_learning(sae: str | Path, out: str | Path) -> Path:
    """Write the SAE in folder `sae` as `ae.pt` and `config.json` into folder `out`; return `out`.

    A Gated SAE becomes a `GatedAutoEncoder`, the baseline an `AutoEncoder`; `load_dictionary` reads both. Raises
    IncompatibleError for an untied encoder, which has no class there, or where `out` holds another SAE, and what
    `load_sae` raises.
    """
    found = load_sae(sae)
    dict_class, tensors = _dictionary(found, sae)
    packed = io.BytesIO()  # its name, unlike that of a file, does not become part of the bytes
    torch.save(tensors, packed)
    contents = {AE: packed.getvalue(), CONFIG: f"{json.dumps(_config(found, dict_class), indent=2)}\n".encode()}
    folder = make_export_folder(Path(out))
    for name, data in contents.items():
        if (folder / name).exists() and (folder / name).read_bytes() != data:
            raise not_of_this_export(folder / name)
    for name, data in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    return folder


def _dictionary(sae: SAE, where: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return the name of the class and its tensors by name; nn.Linear has weights (out, in)."""
    p = sae.params
    weights = {"encoder.weight": p.W_enc, "decoder.weight": p.W_dec.T.contiguous()}
    if isinstance(p, GatedParams):
        biases = {"decoder_bias": p.b_dec, "r_mag": p.r_mag, "gate_bias": p.b_gate, "mag_bias": p.b_mag}
        return "GatedAutoEncoder", weights | biases
    if isinstance(p, ReluParams):
        return "AutoEncoder", weights | {"bias": p.b_dec, "encoder.bias": p.b_enc}
    raise IncompatibleError(f"{where} is a {sae.architecture} SAE; dictionary_learning has no class for it.")


def _config(sae: SAE, dict_class: str) -> dict[str, Any]:
    """Return what `load_dictionary` and other readers of config.json look for; unknown values are left out."""
    known = {"lr": "lr", "steps": "steps", "seed": "seed", "l1_penalty": "l1_coefficient", "submodule_name": "site"}
    trainer = {"dict_class": dict_class, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= {theirs: sae.metadata[ours] for theirs, ours in known.items() if ours in sae.metadata}
    return {"trainer": trainer, "buffer": {"d_submodule": sae.d_in}, "gsae": dict(sae.metadata)}
