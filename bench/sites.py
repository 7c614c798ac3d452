"""What the proof of sites costs and how sharply it tells right from wrong, on a loaded model.

Run as `.venv/bin/python bench/sites.py [--model MODEL] [--dtype DTYPE] [--device DEVICE]`. It times the search on a
random instance of the config and the tests on the loaded model, for three sites and for all of all layers. Then it asks
for wrong parts in each layer (the mixer as the MLP, the queries as the heads, the stream before the mixer as the
stream between, the MLP's input as the attention's) and counts those that pass. The largest rounding error of a right
site is given as a share of what is allowed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from gsae.harvest import load_lm, load_meta
from gsae.harvest.model.confirm import confirm
from gsae.harvest.model.layer_parts import Mixer, Parts, failed_test
from gsae.harvest.model.layer_runs import Layer
from gsae.harvest.model.layer_trace import trace_decoder
from gsae.harvest.model.sites import resolve_with_parts

KINDS = ("mlp", "attn", "resid_mid", "mlp_in", "attn_in")


def wrong_parts(parts: Parts) -> dict[str, tuple[str, Parts]]:
    """Return parts that are wrong, each with the kind of site that must not pass."""
    (mixer,) = parts.mixers
    before = mixer.projection.rsplit(".", 1)[0]
    return {
        "the mixer as the MLP": ("mlp", replace(parts, mlp=(mixer.adds,))),
        "the queries as the heads": ("attn", replace(parts, mixers=(Mixer(mixer.adds, f"{before}.q_proj"),))),
        "the stream before as between": ("resid_mid", replace(parts, middle="input_layernorm")),
        "the MLP's input as the attention's": ("attn_in", replace(parts, mixer_in=parts.mlp_in)),
    }


@contextmanager
def rounding() -> Iterator[list[float]]:
    """Record every rounding error that is within what is allowed, 1 at the limit."""
    seen: list[float] = []
    measure = Layer.ulps

    def ulps(self: Layer, *values: Any) -> float:
        error = measure(self, *values)
        if error <= 1:
            seen.append(error)
        return error

    with patch.object(Layer, "ulps", ulps):
        yield seen


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call gives, and its seconds."""
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    lm, meta = load_lm(options.model, dtype=options.dtype, device=options.device), load_meta(options.model)
    names = ["resid.all", *(f"{kind}.all" for kind in KINDS)]
    (sites, parts), search = timed(lambda: resolve_with_parts(meta, names))
    few = [site for site in sites if site.name in ("mlp.10", "attn.10", "resid.15")]
    confirm(lm.model, few, parts)  # the first pass warms up
    of_few, of_all = (timed(lambda some=some: confirm(lm.model, some, parts))[1] for some in (few, sites))
    decoder, passed, layers = trace_decoder(lm.model), [], 0
    with rounding() as errors:
        for number in decoder.calls:
            layer = Layer(decoder.layers[number], decoder.calls[number])
            assert not any(failed_test(layer, kind, parts[number]) for kind in KINDS)
            layers += 1
    for number in decoder.calls:
        layer = Layer(decoder.layers[number], decoder.calls[number])
        for name, (kind, wrong) in wrong_parts(parts[number]).items():
            if not failed_test(layer, kind, wrong):
                passed.append(f"{name} in layer {number}")
    figures = {"search_seconds": search, "three_sites_seconds": of_few, "all_sites_seconds": of_all}
    print(f"{len(sites)} sites; wrong parts tried {4 * layers}, passed {len(passed)} {passed}")
    print(
        json.dumps({"bench": "sites", "met": not passed and max(errors) < 0.5, "largest_error": max(errors), **figures})
    )


if __name__ == "__main__":
    main()
