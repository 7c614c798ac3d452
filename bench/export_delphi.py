"""Does delphi's own loader find in our export every feature above 0, where and as large as we do?

Run as `.venv/bin/python bench/export_delphi.py --features RUN/features/NAME --store STORE --delphi PYTHON`, PYTHON
having delphi (PyPI: eai-delphi, with `--no-deps` and what its import asks for, faiss-cpu, sentence_transformers and
blobfile among it). Compared are the numbers of latent, context, position and the values, each to the bit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CODE = """
import sys
from pathlib import Path
import numpy as np
from delphi.latents.loader import TensorBuffer
locations, values = [], []
for path in Path(sys.argv[1]).glob("*.safetensors"):
    buffer = TensorBuffer(str(path), "module")
    tokens = buffer.tokens.numpy()
    for latent in buffer:
        locations.append(latent.activation_data.locations.numpy())
        values.append(latent.activation_data.activations.numpy())
np.savez(sys.argv[2], locations=np.concatenate(locations), values=np.concatenate(values), tokens=tokens)
"""


def main() -> int:
    """Print the verdict as one JSON line; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--delphi", type=Path, help="a Python that has delphi")
    options = parser.parse_args()
    if not (options.features and options.store and options.delphi):
        print(json.dumps({"bench": "export_delphi", "met": True, "skipped": "needs --features, --store and --delphi"}))
        return 0
    from gsae.features import to_delphi
    from gsae.features.find.firings import read_firings
    from gsae.store import open_store

    store = open_store(options.store)
    facts = json.loads((options.features / "features.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = to_delphi(options.features, store, Path(scratch) / "out"), Path(scratch) / "found.npz"
        subprocess.run([str(options.delphi), "-c", CODE, str(folder), str(found)], check=True)
        theirs = dict(np.load(found))
    files = sorted((options.features / "activations").iterdir())
    ours = [(latent, s, v) for part in read_firings(files, 0, facts["d_sae"]) for latent, s, v in part]
    contexts = np.flatnonzero(store.split() == (facts["split"] == "heldout"))
    context, position = np.divmod(np.concatenate([s for _, s, _ in ours]), facts["context_size"])
    latents = np.concatenate([np.full(len(s), latent) for latent, s, _ in ours])
    places = np.stack([np.searchsorted(contexts, context), position, latents], axis=1)
    order = np.lexsort(theirs["locations"].T[[1, 0, 2]])
    met = bool(
        np.array_equal(theirs["locations"][order], places)
        and np.array_equal(theirs["values"][order], np.concatenate([v for _, _, v in ours]))
        and np.array_equal(theirs["tokens"], store.tokens()[contexts])
    )
    print(json.dumps({"bench": "export_delphi", "met": met, "sae": facts["sae"], "features_above_0": len(places)}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
