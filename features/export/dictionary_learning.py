"""A saved SAE in other projects' own layouts. SAELens's needs no export: it is how SAEs are saved."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsae.errors import IncompatibleError
from gsae.files import replace_file, replace_text
from gsae.train import SAE, GatedParams, ReluParams, load_sae

AE, CONFIG = "ae.pt", "config.json"


def to_dictionary_learning(sae: str | Path, out: str | Path) -> Path:
    """Write the SAE in folder `sae` as dictionary_learning's `ae.pt` and `config.json` into folder `out`; return it.

    A Gated SAE becomes a `GatedAutoEncoder`, the baseline an `AutoEncoder`; `load_dictionary` reads either. Raises
    IncompatibleError for an untied encoder, of which it has no class, or where `out` holds another SAE, and what
    `load_sae` raises.
    """
    folder, found = Path(out), load_sae(sae)
    dict_class, tensors = _dictionary(found, sae)
    config = json.dumps(_config(found, dict_class), indent=2) + "\n"
    packed = io.BytesIO()  # its name, unlike a file's, does not enter the bytes
    torch.save(tensors, packed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise IncompatibleError(f"{folder} is a file; an export needs a folder of its own.") from None
    for name, data in ((AE, packed.getvalue()), (CONFIG, config.encode())):
        if (folder / name).exists() and (folder / name).read_bytes() != data:
            raise IncompatibleError(f"{folder / name} is another SAE's; choose another folder.")
    replace_file(folder / AE, lambda path: path.write_bytes(packed.getvalue()))
    replace_text(folder / CONFIG, config)
    return folder


def _dictionary(sae: SAE, where: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The class and its tensors by name; nn.Linear has its weights as (out, in)."""
    p = sae.params
    weights = {"encoder.weight": p.W_enc, "decoder.weight": p.W_dec.T.contiguous()}
    if isinstance(p, GatedParams):
        biases = {"decoder_bias": p.b_dec, "r_mag": p.r_mag, "gate_bias": p.b_gate, "mag_bias": p.b_mag}
        return "GatedAutoEncoder", weights | biases
    if isinstance(p, ReluParams):
        return "AutoEncoder", weights | {"bias": p.b_dec, "encoder.bias": p.b_enc}
    raise IncompatibleError(f"{where} is a {sae.architecture} SAE; dictionary_learning has no class for it.")


def _config(sae: SAE, dict_class: str) -> dict[str, Any]:
    """What `load_dictionary` and readers of the file look for; what is not known is left out."""
    known = {"lr": "lr", "steps": "steps", "seed": "seed", "l1_penalty": "l1_coefficient", "submodule_name": "site"}
    trainer = {"dict_class": dict_class, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= {theirs: sae.metadata[ours] for theirs, ours in known.items() if ours in sae.metadata}
    return {"trainer": trainer, "buffer": {"d_submodule": sae.d_in}, "gsae": dict(sae.metadata)}
