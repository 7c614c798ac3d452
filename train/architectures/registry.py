"""The table of architectures. A new one is a file with a subclass of `Params` and one line here.

The key of a variant is ARCHITECTURE-VARIANT. An architecture that `step/fast_bank.FAST` does not list is trained by
autograd.
"""

from .base import Params
from .gated import GatedParams, NoRMagParams, UnfrozenParams, UntiedParams
from .relu import ReluParams
from .rescale_shift import RescaleShiftParams

ARCHITECTURES: dict[str, type[Params]] = {
    "gated": GatedParams,
    "gated-untied": UntiedParams,
    "gated-no_r_mag": NoRMagParams,
    "gated-unfrozen": UnfrozenParams,
    "relu": ReluParams,
    "rescale-shift": RescaleShiftParams,
}


def variants(architecture: str) -> list[str]:
    """The variants of an architecture, without its name."""
    prefix = f"{architecture}-"
    return [name.removeprefix(prefix) for name in ARCHITECTURES if name.startswith(prefix)]


def base_names() -> list[str]:
    """The names of the architectures, without those of variants."""
    return [name for name in ARCHITECTURES if not any(name.startswith(f"{other}-") for other in ARCHITECTURES)]


def readable() -> dict[str, tuple[str, type[Params]]]:
    """Our name and class of every architecture that a file may have, by the name in cfg.json."""
    own = ((name, kind) for name, kind in ARCHITECTURES.items() if "SAVED_AS" in vars(kind))
    return {kind.SAVED_AS: (name, kind) for name, kind in own}
