"""The sites of a harvest are confirmed on the loaded model, before the plan is written.

A pass over a few tokens and a few runs of each layer with a site. What was found on a random instance of the config
(`structure.py`) is tested on the weights, the code and the hardware that make the rows, in the model's own dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gsae.errors import UsageError
from gsae.store import SiteSpec

from .layer_parts import Parts, failed_test
from .layer_runs import Layer
from .layer_trace import Decoder, trace_decoder
from .sites import EMBED, NAME

TESTS = {
    "resid": ("chained", "causal"),
    "mlp": ("added", "complete", "separate"),
    "attn": ("decides", "linear", "removed"),
    "mixer": ("decides", "linear", "removed"),
    "resid_mid": ("between",),
    "mlp_in": ("decides",),
    "attn_in": ("decides",),
    EMBED: ("chained", "causal"),
    "module": ("width",),
}
"""The tests that a kind of site passed; docs/format.md says what each is."""


def passed_tests(sites: Iterable[SiteSpec]) -> dict[str, tuple[str, ...]]:
    """Return by site the tests that it passed if `confirm` raised nothing."""
    return {site.name: TESTS[_kind(site.name)] for site in sites}


def confirm(model: Any, sites: Sequence[SiteSpec], parts: Mapping[int, Parts]) -> None:
    """Test sites on a loaded model.

    parts: of the layers with sites, by number. Raises UsageError for the first site that fails.
    """
    kinds = {site.name: _kind(site.name) for site in sites}
    if any(kind != "module" for kind in kinds.values()):
        decoder = trace_decoder(model)
        layers: dict[int, Layer] = {}
        for site in sites:
            if kinds[site.name] != "module":
                _confirm(decoder, site, kinds[site.name], parts, layers)


def _kind(name: str) -> str:
    parts = NAME.fullmatch(name)
    return parts[1] if parts else EMBED if name == EMBED else "module"


def _confirm(decoder: Decoder, site: SiteSpec, kind: str, parts: Mapping[int, Parts], layers: dict[int, Layer]) -> None:
    if not site.module.startswith(f"{decoder.path}."):
        raise UsageError(f"Site {site.name!r}: the loaded model's layers are {decoder.path}, not those of the config.")
    if kind in ("resid", EMBED):
        if site.d_in != decoder.d_model:
            raise UsageError(
                f"Site {site.name!r}: the loaded model's stream is {decoder.d_model} wide, not {site.d_in}."
            )
        return
    number = int(site.name.split(".")[1])
    if number not in layers:
        layers[number] = Layer(decoder.layers[number], decoder.calls[number])
    failed = failed_test(layers[number], kind, parts[number])
    if failed:
        raise UsageError(
            f"Site {site.name!r} is not confirmed on the loaded model: {failed}. "
            "Name the module itself, as module:PATH:in or module:PATH:out."
        )
