"""Is what `gsae features` says of a real SAE what a search over the store in float64 finds?

Run as `.venv/bin/python bench/brute_features.py --features RUN/features/NAME --store STORE`. Latents are drawn at
random among those that fire; each is computed in float64 from the saved weights for every row of the split, and
density, histogram, quantiles, largest and mean value, top contexts with the values at all their rows, and samples are
compared (gsae/tests/support/feature_search.py). Met when nothing differs and values agree to 1e-5 of the latent's
largest.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Print the verdict as one JSON line; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.features and options.store):
        print(json.dumps({"bench": "brute_features", "met": True, "skipped": "needs --features and --store"}))
        return 0
    from gsae.store import open_store
    from gsae.tests.support.feature_search import compare

    found = compare(options.features, open_store(options.store), options.latents, options.seed)
    print(json.dumps({"bench": "brute_features", "met": not found["faults"], **found}))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
